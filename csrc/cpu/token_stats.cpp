// The two kernels that touch the vocabulary axis.  Forward: one read of a row gives its log-prob, log-sum-exp
// and entropy.  Backward: one read and one write give d logits from two scalars per token.  Rows are cut into
// blocks that stay in the L1 cache; a block is converted to fp32 once, so every dtype and stride shares the
// arithmetic below.  A row is always computed by one thread in one order: its bits do not depend on its batch.

#include <cmath>

#include "../common/online_lse.h"
#include "isa.h"
#include "token_stats.h"
#include "vec.h"

namespace r1k {
namespace R1K_ISA {
namespace {

constexpr int kBlock = 1024;
static_assert(kBlock % (4 * kLanes) == 0);
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
  for (; k % (2 * kLanes) != 0; ++k) block[k] = -INFINITY;
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

struct RowStats {
  double logprob, lse, entropy;
};

template <typename T>
RowStats row_stats(const T* row, int64_t stride, int64_t vocab, int64_t token_id, double temperature) {
  constexpr bool kExact = sizeof(T) == 4;
  alignas(64) float block[kBlock];
  const Exp2Scale scale(temperature);
  const double inv_temperature = 1.0 / temperature;
  OnlineLse<double> state;

  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int count = static_cast<int>(vocab - begin < kBlock ? vocab - begin : kBlock);
    const int padded = load_block(row, stride, begin, count, block);

    VecF top[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    for (int k = 0; k < padded; k += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) {
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

    // S is summed in double so that 1 - p keeps its precision when one token holds nearly all the mass.
    const VecF m = broadcast(static_cast<float>(state.max));
    VecD sum[2] = {};
    VecF weighted[2] = {};
    for (int k = 0; k < padded; k += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) {
        const Difference<kExact> d(load(block + k + u * kLanes), m);
        const Exp2 e = exp2_scaled(d.value, scale, kExact ? d.error * scale.hi : VecF{});
        accumulate(sum, e.value);
        weighted[u] += e.value * (e.underflow ? VecF{} : d.value);  // 0 * (-inf) = 0
      }
    }
    state.add(horizontal_sum(sum[0]) + horizontal_sum(sum[1]),
              horizontal_sum(weighted[0]) + horizontal_sum(weighted[1]));
  }

  const double target = to_float(row[token_id * stride]);
  const double log_sum = std::log(state.sum);
  return {(target - state.max) * inv_temperature - log_sum, state.max * inv_temperature + log_sum,
          state.entropy(inv_temperature)};
}

template <typename T>
void forward_rows(const TokenStatsForward& args, int64_t row_begin, int64_t row_end) {
  const T* data = static_cast<const T*>(args.logits.data);
  for (int64_t n = row_begin; n < row_end; ++n) {
    if (args.mask != nullptr && !args.mask[n]) {
      args.logprobs[n] = 0;
      args.lse[n] = 0;
      args.entropy[n] = 0;
      continue;
    }
    const RowStats stats = row_stats(data + args.logits.offset(n), args.logits.vocab_stride, args.logits.vocab,
                                     args.token_ids[n], args.temperature);
    args.logprobs[n] = static_cast<float>(stats.logprob);
    args.lse[n] = stats.lse;
    args.entropy[n] = static_cast<float>(stats.entropy);
  }
}

struct RowGradient {
  double g;        // dL/dlogprob
  double eta;      // dL/dentropy
  double lse;
  double entropy;
};

// dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T
template <typename T, bool kEntropy>
void row_gradient(const T* row, int64_t stride, int64_t vocab, int64_t token_id, double temperature,
                  const RowGradient& in, T* out, bool stream) {
  constexpr bool kExact = sizeof(T) == 4;
  alignas(64) float block[kBlock];
  alignas(64) T result[kBlock];
  const Exp2Scale scale(temperature);
  const double inv_temperature = 1.0 / temperature;
  // log p = (x - anchor)/T + rest: the anchor is lse T rounded to fp32, the rest what that rounding lost.
  const float anchor = static_cast<float>(in.lse * temperature);
  const double rest = (anchor - in.lse * temperature) * inv_temperature;
  const VecF a = broadcast(anchor), rest2 = broadcast(static_cast<float>(rest * kLog2E));
  const VecF minus_g = broadcast(static_cast<float>(-in.g * inv_temperature));
  const VecF minus_eta = broadcast(static_cast<float>(-in.eta * inv_temperature));
  const VecF slope = broadcast(static_cast<float>(inv_temperature));
  // log p + H = (x - pivot)/T + offset: a pivot of its own, because the two cancel where p is near e^{-H}.
  const double exact_pivot = (in.lse - in.entropy) * temperature;
  const float pivot = static_cast<float>(exact_pivot);
  const VecF h = broadcast(pivot), offset = broadcast(static_cast<float>((pivot - exact_pivot) * inv_temperature));

  // The target's own entry in double: g (1 - p) cancels as p goes to 1, g (-expm1(log p)) does not.
  double logprob = to_float(row[token_id * stride]) * inv_temperature - in.lse;
  if (logprob > 0) logprob = 0;  // rounding only; NaN stays
  double target = -in.g * std::expm1(logprob);
  if (kEntropy && logprob != -INFINITY) target -= in.eta * std::exp(logprob) * (logprob + in.entropy);
  const T grad_target = from_float<T>(static_cast<float>(target * inv_temperature));

  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int count = static_cast<int>(vocab - begin < kBlock ? vocab - begin : kBlock);
    const int padded = load_block(row, stride, begin, count, block);
    for (int k = 0; k < padded; k += kLanes) {
      const VecF x = load(block + k);
      const Difference<kExact> d(x, a);
      const Exp2 p = exp2_scaled(d.value, scale, kExact ? d.error * scale.hi + rest2 : rest2);
      VecF factor = minus_g;
      if constexpr (kEntropy) {
        const VecF log_p_plus_h = (p.underflow ? VecF{} : x - h) * slope + offset;
        factor += minus_eta * log_p_plus_h;
      }
      store(result + k, p.value * factor);
    }
    if (begin <= token_id && token_id < begin + count) result[token_id - begin] = grad_target;
    if (stream) {
      stream_copy(out + begin, result, count * sizeof(T));
    } else {
      std::memcpy(out + begin, result, count * sizeof(T));
    }
  }
}

template <typename T>
void backward_rows(const TokenStatsBackward& args, int64_t row_begin, int64_t row_end) {
  const T* data = static_cast<const T*>(args.logits.data);
  const int64_t vocab = args.logits.vocab;
  for (int64_t n = row_begin; n < row_end; ++n) {
    const double g = args.grad_logprobs != nullptr ? args.grad_logprobs[n] : 0;
    const double eta = args.grad_entropy != nullptr ? args.grad_entropy[n] : 0;
    T* out = static_cast<T*>(args.grad_logits) + n * vocab;
    if (g == 0 && eta == 0) {  // masked or clipped: the row is not read, so nothing in it can matter
      std::memset(out, 0, vocab * sizeof(T));
      continue;
    }
    const T* row = data + args.logits.offset(n);
    const RowGradient in = {g, eta, args.lse[n], args.entropy[n]};
    const auto run = eta != 0 ? row_gradient<T, true> : row_gradient<T, false>;
    run(row, args.logits.vocab_stride, vocab, args.token_ids[n], args.temperature, in, out, args.stream);
  }
  if (args.stream) stream_fence();
}

void forward(const TokenStatsForward& args, int64_t row_begin, int64_t row_end) {
  switch (args.logits.dtype) {
    case DType::float32: return forward_rows<float>(args, row_begin, row_end);
    case DType::bfloat16: return forward_rows<BFloat16>(args, row_begin, row_end);
    case DType::float16: return forward_rows<Float16>(args, row_begin, row_end);
  }
}

void backward(const TokenStatsBackward& args, int64_t row_begin, int64_t row_end) {
  switch (args.logits.dtype) {
    case DType::float32: return backward_rows<float>(args, row_begin, row_end);
    case DType::bfloat16: return backward_rows<BFloat16>(args, row_begin, row_end);
    case DType::float16: return backward_rows<Float16>(args, row_begin, row_end);
  }
}

}  // namespace

#define R1K_STRING_(x) #x
#define R1K_STRING(x) R1K_STRING_(x)
const TokenStatsKernels token_stats_kernels = {R1K_STRING(R1K_ISA), forward, backward};

}  // namespace R1K_ISA
}  // namespace r1k
