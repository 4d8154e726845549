// The statistics of one row of logits, shared by the kernels that touch the vocabulary axis.  Rows are cut into
// blocks that stay in the L1 cache; a block is converted to fp32 once, so every dtype and stride shares the
// arithmetic.  Included only by files compiled per instruction set.
#pragma once

#include <cmath>

#include "../common/online_lse.h"
#include "row_exp.h"
#include "vec.h"

namespace r1k {
namespace R1K_ISA {

constexpr int kBlock = 128 * kLanes;  // fp32: at most 8 KiB, a fraction of the L1 cache; as many adds in every lane
constexpr int kUnroll = 2;
constexpr int kRun = 8 * kUnroll * kLanes;
static_assert(kBlock % kRun == 0);

// Fills `block` with `count` elements of the row from `begin` and pads to whole vectors with -inf, which adds
// nothing to any sum.  Returns the padded length.
template <typename T>
int load_block(const T* row, int64_t stride, int64_t begin, int count, float* block) {
  int k = 0;
  if (stride == 1) {
    for (; k + kLanes <= count; k += kLanes) store(block + k, load(row + begin + k));
  }
  for (; k < count; ++k) block[k] = to_float(row[(begin + k) * stride]);
  for (; k % (kUnroll * kLanes) != 0; ++k) block[k] = -INFINITY;
  return k;
}

struct BlockSums {
  double sum, weighted, squares;  // of v = e^{(x - max)/T} / scale, v (x - max) and v^2, without the maxima themselves
  int64_t maxima;
};

// The maxima add 1 each and are counted apart: beside them the fp32 sum would lose the rest of the mass, and with it
// 1 - p when one token holds nearly all of it.  Most blocks do not hold the maximum of the row so far.  Memory from
// `next` on is fetched meanwhile, `step` bytes for every kUnroll vectors: it is the next block.
template <bool kSubtract, bool kMaxima, bool kSquares>
BlockSums block_sums(const float* block, int padded, const RowExp& row_exp, float max, const char* next, int step) {
  const VecF top = broadcast(kSubtract ? 0.0f : max);
  VecF sum[kUnroll] = {}, weighted[kUnroll] = {}, squares = {};
  VecI maxima[kUnroll] = {};
  for (int run = 0; run < padded; run += kRun) {
    // Two levels of sums: equal terms round the same way every time, so long sums of them would drift.  There is one
    // sum of squares: two would take more registers than processors have, and 4 % more time.
    VecF partial[kUnroll] = {}, partial_weighted[kUnroll] = {}, partial_squares = {};
    const int run_end = run + kRun < padded ? run + kRun : padded;
    for (int k = run; k < run_end; k += kUnroll * kLanes, next += step) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + 64);
      for (int u = 0; u < kUnroll; ++u) {
        const Power power = row_exp.power<kSubtract, false>(load(block + k + u * kLanes));
        VecF value = exp2_of(power);
        if constexpr (kMaxima) {
          const VecI is_max = power.x == top;
          maxima[u] -= is_max;
          value = is_max ? VecF{} : value;
        }
        partial[u] += value;
        partial_weighted[u] = multiply_add(value, power.x - top, partial_weighted[u]);
        if constexpr (kSquares) partial_squares = multiply_add(value, value, partial_squares);
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      sum[u] += partial[u];
      weighted[u] += partial_weighted[u];
    }
    if constexpr (kSquares) squares += partial_squares;
  }
  BlockSums result = {};
  if constexpr (kSquares) result.squares = horizontal_sum(squares);
  for (int u = 0; u < kUnroll; ++u) {
    result.sum += horizontal_sum(sum[u]);
    result.weighted += horizontal_sum(weighted[u]);
    if constexpr (kMaxima) result.maxima += horizontal_sum(maxima[u]);
  }
  return result;
}

// The largest entry.  With kTotal, `total` grows by the sum of the first `count` entries, without the padding.
template <bool kTotal>
float block_max(const float* block, int padded, int count, double& total) {
  VecF top[kUnroll], sum[kUnroll] = {}, partial[kUnroll] = {};
  for (VecF& t : top) t = broadcast(-INFINITY);
  for (int k = 0; k < padded; k += kUnroll * kLanes) {
    if constexpr (kTotal) {
      if (k % kRun == 0) {  // two levels of sums, as in block_sums
        for (int u = 0; u < kUnroll; ++u) sum[u] += partial[u], partial[u] = VecF{};
      }
      if (k + kUnroll * kLanes > count) {
        for (int j = k; j < count; ++j) total += block[j];
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      const VecF x = load(block + k + u * kLanes);
      top[u] = larger(x, top[u]);
      if constexpr (kTotal) {
        if (k + kUnroll * kLanes <= count) partial[u] += x;
      }
    }
  }
  if constexpr (kTotal) {
    for (int u = 0; u < kUnroll; ++u) total += horizontal_sum(sum[u] + partial[u]);
  }
  return horizontal_max(larger(top[0], top[1]));
}

// `count` elements of the row from `begin` as fp32, padded: where they are, or else copied to `copy`.
template <typename T>
const float* block_of(const T* row, int64_t stride, int64_t begin, int count, float* copy, int& padded) {
  if constexpr (sizeof(T) == 4) {
    if (stride == 1 && count % (kUnroll * kLanes) == 0) {
      padded = count;
      return row + begin;
    }
  }
  padded = load_block(row, stride, begin, count, copy);
  return copy;
}

// With kSquares, `squares` is the sum of e^{2 (x - max)/T}; with kTotal, `total` is the sum of x.
struct RowState : OnlineLse<double> {
  double squares = 0, total = 0;
  int64_t top_block = 0;  // where the block begins that has the first of the maxima
};

// The sums of one row, from one read of it.
template <bool kSquares = false, bool kTotal = false, typename T>
RowState row_state(const T* row, int64_t stride, int64_t vocab, double temperature) {
  alignas(64) float copy[kBlock];
  const double inv_temperature = 1.0 / temperature;
  RowState state;
  RowExp row_exp(0, temperature);

  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int count = static_cast<int>(vocab - begin < kBlock ? vocab - begin : kBlock);
    int padded;
    const float* block = block_of(row, stride, begin, count, copy, padded);
    const float max = block_max<kTotal>(block, padded, count, state.total);
    const bool has_maxima = max >= state.max;
    if (max > state.max) {
      if constexpr (kSquares) state.squares *= std::exp(2 * (state.max - max) * inv_temperature);
      state.raise_max(max, inv_temperature);
      state.top_block = begin;
      row_exp = RowExp(max, temperature);
    }
    if (std::isinf(state.max)) {
      // Nothing finite yet: all -inf, or NaN, which no comparison sees.  Or +inf, of which a row's result is NaN.
      for (int k = 0; k < count; ++k) {
        if (block[k] != block[k] || block[k] == INFINITY) state.sum = NAN;
      }
      continue;
    }
    const auto sums_of =
        row_exp.subtract ? (has_maxima ? block_sums<true, true, kSquares> : block_sums<true, false, kSquares>)
                         : (has_maxima ? block_sums<false, true, kSquares> : block_sums<false, false, kSquares>);
    const BlockSums sums = sums_of(block, padded, row_exp, static_cast<float>(state.max),
                                   reinterpret_cast<const char*>(row + begin + count), kUnroll * kLanes * sizeof(T));
    const double maxima = static_cast<double>(sums.maxima);
    state.add(row_exp.scale * sums.sum + maxima, row_exp.scale * sums.weighted);
    if constexpr (kSquares) state.squares += row_exp.scale * row_exp.scale * sums.squares + maxima;
  }
  return state;
}

// Whether an entry is the first of the maxima.
template <typename T>
bool is_first_maximum(const T* row, int64_t stride, int64_t at, const RowState& state) {
  const int64_t before = at - state.top_block;
  if (before < 0 || before >= kBlock || !(to_float(row[at * stride]) == state.max)) return false;
  alignas(64) float copy[kBlock];
  const float max = static_cast<float>(state.max);
  int padded, equal = 0;
  const float* block = block_of(row, stride, state.top_block, static_cast<int>(before) + 1, copy, padded);
  for (int k = 0; k < before; ++k) equal += block[k] == max;
  return equal == 0;
}

}  // namespace R1K_ISA
}  // namespace r1k
