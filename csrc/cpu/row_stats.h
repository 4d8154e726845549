// The statistics of one row of logits, shared by the kernels that touch the vocabulary axis.  Rows are cut into
// blocks that stay in the L1 cache; a block is converted to fp32 once, so every dtype and stride shares the
// arithmetic.  Included only by files compiled per instruction set.
#pragma once

#include <cmath>

#include "../common/online_lse.h"
#include "vec.h"

namespace r1k {
namespace R1K_ISA {

constexpr int kBlock = 128 * kLanes;  // fp32: at most 8 KiB, a fraction of the L1 cache; as many adds in every lane
constexpr int kUnroll = 2;
constexpr int kRun = 8 * kUnroll * kLanes;
static_assert(kBlock % kRun == 0);
constexpr double kLog2E = 1.4426950408889634;

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

// x - a and what fp32 rounds away of it (Knuth's two-sum).  16-bit inputs do not need the second part: their
// outputs are rounded a thousand times more coarsely.
template <bool kExact>
struct Difference {
  Difference(VecF x, VecF a) : value(x - a), error() {
    if constexpr (kExact) {
      const VecF bb = value - x;
      const VecF lost = (x - (value - bb)) - (a + bb);
      error = lost == lost ? lost : VecF{};  // inf - inf; a NaN in x stays in value
    }
  }
  VecF value;
  VecF error;
};

// Maximum, sum and weighted sum of one row, from one read of it.
template <typename T>
OnlineLse<double> row_state(const T* row, int64_t stride, int64_t vocab, double temperature) {
  constexpr bool kExact = sizeof(T) == 4;
  alignas(64) float block[kBlock];
  const Exp2Scale scale(temperature);
  const double inv_temperature = 1.0 / temperature;
  OnlineLse<double> state;

  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int count = static_cast<int>(vocab - begin < kBlock ? vocab - begin : kBlock);
    const int padded = load_block(row, stride, begin, count, block);

    VecF top[kUnroll];
    for (VecF& t : top) t = broadcast(-INFINITY);
    for (int k = 0; k < padded; k += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) {
        const VecF x = load(block + k + u * kLanes);
        top[u] = x > top[u] ? x : top[u];
      }
    }
    const float block_max = horizontal_max(top[0] > top[1] ? top[0] : top[1]);
    state.raise_max(block_max, inv_temperature);
    if (state.max == -INFINITY) {  // nothing finite yet: all -inf, or NaN, which no comparison sees
      for (int k = 0; k < count; ++k) {
        if (block[k] != block[k]) state.sum = NAN;
      }
      continue;
    }

    // The maxima add 1 each and are counted apart: beside them the fp32 sum would lose the rest of the mass, and
    // with it 1 - p when one token holds nearly all of it.
    const VecF m = broadcast(static_cast<float>(state.max));
    VecF sum[kUnroll] = {}, weighted[kUnroll] = {};
    VecI maxima[kUnroll] = {};
    for (int run = 0; run < padded; run += kRun) {
      // Two levels of sums: equal terms round the same way every time, so long sums of them would drift.
      VecF partial[kUnroll] = {}, partial_weighted[kUnroll] = {};
      const int run_end = run + kRun < padded ? run + kRun : padded;
      for (int k = run; k < run_end; k += kUnroll * kLanes) {
        for (int u = 0; u < kUnroll; ++u) {
          const Difference<kExact> d(load(block + k + u * kLanes), m);
          Exp2 e;
          if constexpr (kExact) {
            e = exp2_scaled(d.value, scale, d.error * scale.hi);
          } else {
            e = exp2_scaled(d.value, scale);
          }
          const VecI is_max = d.value == 0.0f;
          maxima[u] -= is_max;
          const VecF value = e.value();
          partial[u] += is_max ? VecF{} : value;
          partial_weighted[u] += value * (e.underflow ? VecF{} : d.value);  // 0 * (-inf) = 0
        }
      }
      for (int u = 0; u < kUnroll; ++u) {
        sum[u] += partial[u];
        weighted[u] += partial_weighted[u];
      }
    }
    double block_sum = 0, block_weighted = 0;
    for (int u = 0; u < kUnroll; ++u) {
      block_sum += horizontal_sum(sum[u]) + static_cast<double>(horizontal_sum(maxima[u]));
      block_weighted += horizontal_sum(weighted[u]);
    }
    state.add(block_sum, block_weighted);
  }

  return state;
}

}  // namespace R1K_ISA
}  // namespace r1k
