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
                                     args.token_ids[n], args.temperature.of(n));
    args.logprobs[n] = static_cast<float>(stats.logprob);
    args.lse[n] = stats.lse;
    args.entropy[n] = stats.entropy;
  }
}

struct RowGradient {
  double g;        // dL/dlogprob
  double eta;      // dL/dentropy
  double lse;
  double entropy;
};

// dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T, for one vector of a row.
template <bool kExact, bool kEntropy>
class VectorGradient {
 public:
  VectorGradient(const RowGradient& in, double temperature, double softcap) : scale_(temperature) {
    const double inv_temperature = 1.0 / temperature;
    // log p = (x - anchor)/T + rest: the anchor is lse T rounded to fp32, the rest what that rounding lost.
    const float anchor = canonical(in.lse * temperature);
    anchor_ = broadcast(anchor);
    rest_ = broadcast(canonical((anchor - in.lse * temperature) * inv_temperature * kLog2E));
    const float minus_g = canonical(-in.g * inv_temperature);
    minus_g_ = broadcast(minus_g);
    minus_g_rest_ = broadcast(canonical(-in.g * inv_temperature - minus_g));
    // log p + H = (x - pivot)/T + offset: a pivot of its own, because the two cancel where p is near e^{-H}.
    const float pivot = canonical((in.lse - in.entropy) * temperature);
    pivot_ = broadcast(pivot);
    offset_ = broadcast(canonical((pivot - (in.lse - in.entropy) * temperature) * inv_temperature));
    minus_eta_ = broadcast(canonical(-in.eta * inv_temperature));
    slope_ = broadcast(static_cast<float>(inv_temperature));
    inv_softcap_ = broadcast(softcap > 0 ? static_cast<float>(1.0 / softcap) : 0.0f);
  }

  // What the soft cap multiplies the gradient with, 1 - tanh^2(u / c), from the capped logit c tanh(u / c).
  VecF through_softcap(VecF x) const {
    const VecF tanh = x * inv_softcap_;
    return (1.0f - tanh) * (1.0f + tanh);
  }

  VecF operator()(VecF x) const {
    const Difference<kExact> d(x, anchor_);
    Exp2 p;
    if constexpr (kExact) {
      p = exp2_scaled(d.value, scale_, d.error * scale_.hi + rest_);
    } else {
      p = exp2_scaled(d.value, scale_, rest_);
    }
    if constexpr (kEntropy) {
      const VecF log_p_plus_h = (p.underflow ? VecF{} : x - pivot_) * slope_ + offset_;
      return p.times(minus_g_ + minus_eta_ * log_p_plus_h);
    } else if constexpr (kExact) {
      return p.times(minus_g_, minus_g_rest_);
    } else {
      return p.times(minus_g_);
    }
  }

 private:
  Exp2Scale scale_;
  VecF anchor_, rest_, minus_g_, minus_g_rest_, pivot_, offset_, minus_eta_, slope_, inv_softcap_;
};

// The target's own entry in double: g (1 - p) cancels as p goes to 1, g (-expm1(log p)) does not.
double target_gradient(const RowGradient& in, double target_logit, double temperature) {
  double logprob = target_logit * (1.0 / temperature) - in.lse;  // the product lse was built with
  if (logprob > 0) logprob = 0;  // rounding only; NaN stays
  double grad = -in.g * std::expm1(logprob);
  if (in.eta != 0 && logprob != -INFINITY) grad -= in.eta * std::exp(logprob) * (logprob + in.entropy);
  return grad / temperature;
}

template <typename T, typename Out, bool kEntropy, bool kSoftcap>
void row_gradient(const T* row, int64_t stride, int64_t vocab, int64_t token_id, double temperature, double softcap,
                  const RowGradient& in, Out* out, bool stream) {
  alignas(64) float block[kBlock];
  alignas(64) Out result[kBlock + kUnroll * kLanes];  // the padded tail of a block may run over
  const VectorGradient<sizeof(Out) == 4, kEntropy> vector(in, temperature, softcap);
  const auto gradient = [&](VecF x) {
    VecF value = vector(x);
    if constexpr (kSoftcap) value *= vector.through_softcap(x);
    // Narrowing wants NaN without a payload, which float32 logits may carry.
    if constexpr (sizeof(Out) < sizeof(T)) value = value == value ? value : broadcast(__builtin_nanf(""));
    return value;
  };
  const float target = to_float(row[token_id * stride]);
  double exact_target = target_gradient(in, target, temperature);
  if constexpr (kSoftcap) exact_target *= (1 - target / softcap) * (1 + target / softcap);
  const Out grad_target = from_float<Out>(canonical(exact_target));

  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int count = static_cast<int>(vocab - begin < kBlock ? vocab - begin : kBlock);
    int k = 0;
    if (stride == 1) {
      for (; k + kLanes <= count; k += kLanes) store(result + k, gradient(load(row + begin + k)));
    }
    if (k < count) {
      const int padded = load_block(row, stride, begin + k, count - k, block);
      for (int j = 0; j < padded; j += kLanes) store(result + k + j, gradient(load(block + j)));
    }
    if (begin <= token_id && token_id < begin + count) result[token_id - begin] = grad_target;
    if (stream) {
      stream_copy(out + begin, result, count * sizeof(Out));
    } else {
      std::memcpy(out + begin, result, count * sizeof(Out));
    }
  }
}

template <typename T, typename Out>
auto row_gradient_variant(bool entropy, bool softcap) {
  if (softcap) return entropy ? row_gradient<T, Out, true, true> : row_gradient<T, Out, false, true>;
  return entropy ? row_gradient<T, Out, true, false> : row_gradient<T, Out, false, false>;
}

template <typename T, typename Out>
void backward_rows(const TokenStatsBackward& args, int64_t begin, int64_t end) {
  const T* data = static_cast<const T*>(args.logits.data);
  const int64_t vocab = args.logits.vocab;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = args.rows != nullptr ? args.rows[r] : r;
    const double g = args.grad_logprobs != nullptr ? args.grad_logprobs[n] : 0;
    const double eta = args.grad_entropy != nullptr ? args.grad_entropy[n] : 0;
    Out* out = static_cast<Out*>(args.out) + n * args.out_stride;
    if (g == 0 && eta == 0) {  // masked or clipped: the row is not read, so nothing in it can matter
      std::memset(out, 0, vocab * sizeof(Out));
      continue;
    }
    const T* row = data + args.logits.offset(n);
    const RowGradient in = {g, eta, args.lse[n], args.entropy[n]};
    const auto run = row_gradient_variant<T, Out>(eta != 0, args.softcap > 0);
    run(row, args.logits.vocab_stride, vocab, args.token_ids[n], args.temperature.of(n), args.softcap, in, out,
        args.stream);
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

void backward(const TokenStatsBackward& args, int64_t begin, int64_t end) {
  switch (args.logits.dtype) {
    case DType::bfloat16: return backward_rows<BFloat16, BFloat16>(args, begin, end);
    case DType::float16: return backward_rows<Float16, Float16>(args, begin, end);
    case DType::float32: break;
  }
  switch (args.out_dtype) {
    case DType::float32: return backward_rows<float, float>(args, begin, end);
    case DType::bfloat16: return backward_rows<float, BFloat16>(args, begin, end);
    case DType::float16: return backward_rows<float, Float16>(args, begin, end);
  }
}

}  // namespace

const TokenStatsKernels token_stats_kernels = {forward, backward};

}  // namespace R1K_ISA
}  // namespace r1k
