// The two kernels that touch the vocabulary axis.  Forward: one read of a row gives its log-prob, log-sum-exp
// and entropy.  Backward: one read and one write give d logits from a few scalars per token.  Rows are cut into
// blocks that stay in the L1 cache; what is loaded is converted to fp32, so every dtype and stride shares the
// arithmetic below.  A row is always computed by one thread in one order: its bits do not depend on its batch.

#include <cmath>
#include <type_traits>

#include "isa.h"
#include "row_stats.h"
#include "token_stats.h"

namespace r1k {
namespace R1K_ISA {
namespace {

template <typename T, bool kSquares, bool kTotal>
void forward_row(const TokenStatsForward& args, int64_t n) {
  const int64_t at = args.offsets != nullptr ? args.offsets[n] : args.logits.offset(n);
  const T* row = static_cast<const T*>(args.logits.data) + at;
  const int64_t stride = args.logits.vocab_stride, token_id = args.token_ids[n];
  const int64_t vocab = args.offsets != nullptr ? args.offsets[n + 1] - at : args.logits.vocab;
  const double temperature = args.temperature.of(n);
  const double inv_temperature = 1.0 / temperature;
  const RowState state = row_state<kSquares, kTotal>(row, stride, vocab, temperature);
  const double target = to_float(row[token_id * stride]);
  const double log_sum = std::log(state.sum);
  const double logprob = (target - state.max) * inv_temperature - log_sum;
  args.logprobs[n] = static_cast<float>(logprob);
  args.lse[n] = state.max * inv_temperature + log_sum;
  args.entropy[n] = state.entropy(inv_temperature);
  if (args.more == nullptr) return;
  double* more = args.more + n;
  if constexpr (kSquares) more[0] = state.squares / (state.sum * state.sum);
  if constexpr (kTotal) more[args.count] = state.total / static_cast<double>(vocab) * inv_temperature;
  if (args.wanted & kIsTop1) {
    more[2 * args.count] = state.max * inv_temperature;
    more[3 * args.count] = logprob == logprob && is_first_maximum(row, stride, token_id, state) ? 1 : 0;
  }
}

template <typename T>
void forward_rows(const TokenStatsForward& args, int64_t row_begin, int64_t row_end) {
  const bool squares = args.wanted & kSumSqProbs, total = args.wanted & kMeanLogit;
  const auto run = squares ? (total ? forward_row<T, true, true> : forward_row<T, true, false>)
                           : (total ? forward_row<T, false, true> : forward_row<T, false, false>);
  for (int64_t n = row_begin; n < row_end; ++n) {
    if (args.mask != nullptr && !args.mask[n]) {
      args.logprobs[n] = 0;
      args.lse[n] = 0;
      args.entropy[n] = 0;
    } else {
      run(args, n);
    }
  }
}

struct RowGradient {
  double g;        // dL/dlogprob
  double eta;      // dL/dentropy
  double zeta;     // dL/dS
  double shift;    // added to dL/dz of each entry
  double lse;
  double entropy;
  double sum_sq;   // S = sum_j p_j^2
};

// Which slopes a row has: g alone, eta too, or any. Most calls have the first two, so the others share one kernel.
enum class Slopes { logprob, entropy, any };

// dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H) + 2 zeta p_j (p_j - S) + shift) / T, for one vector of a row.
template <bool kSubtract, bool kCoarse, Slopes kSlopes>
class VectorGradient {
 public:
  VectorGradient(const RowGradient& in, double temperature, double softcap, const RowExp& row_exp, double factor)
      : row_exp_(row_exp) {
    factor *= kCoarse ? row_exp.coarse_scale : row_exp.scale;
    const double inv_temperature = 1.0 / temperature;
    const float rounded = canonical(factor);
    factor_ = broadcast(rounded);
    factor_rest_ = broadcast(canonical(factor - rounded));
    for (int k = 0; k < 5; ++k) coarse_[k] = broadcast(canonical(factor * kCoarseExp2[k]));
    // log p + H = (x - pivot)/T + offset: a pivot of its own, because the two cancel where p is near e^{-H}.
    const double exact_pivot = (in.lse - in.entropy) * temperature - row_exp.base;
    const float pivot = canonical(exact_pivot);
    pivot_ = broadcast(pivot);
    offset_ = broadcast(canonical((pivot - exact_pivot) * inv_temperature));
    minus_g_ = broadcast(canonical(-in.g * inv_temperature));
    minus_eta_ = broadcast(canonical(-in.eta * inv_temperature));
    slope_ = broadcast(static_cast<float>(inv_temperature));
    two_zeta_ = broadcast(canonical(2 * in.zeta * inv_temperature));
    sum_sq_ = broadcast(canonical(in.sum_sq));
    shift_ = broadcast(canonical(in.shift * inv_temperature));
    inv_softcap_ = broadcast(softcap > 0 ? static_cast<float>(1.0 / softcap) : 0.0f);
  }

  // What the soft cap multiplies the gradient with, 1 - tanh^2(u / c), from the capped logit c tanh(u / c).
  VecF through_softcap(VecF x) const {
    const VecF tanh = x * inv_softcap_;
    return (1.0f - tanh) * (1.0f + tanh);
  }

  VecF operator()(VecF x) const {
    const Power power = row_exp_.power<kSubtract, kCoarse>(x);
    VecF slope;  // with entropy: what p is multiplied with
    if constexpr (kSlopes != Slopes::logprob) {
      slope = multiply_add(minus_eta_, multiply_add(power.x - pivot_, slope_, offset_), minus_g_);
    }
    if constexpr (kCoarse) {
      VecF p = multiply_add(coarse_[4], power.rest, coarse_[3]);
      p = multiply_add(p, power.rest, coarse_[2]);
      p = multiply_add(p, power.rest, coarse_[1]);
      p = multiply_add(p, power.rest, coarse_[0]);
      if constexpr (kSlopes == Slopes::any) return with_all(times_power(p, power), slope);
      if constexpr (kSlopes == Slopes::entropy) p *= slope;
      return times_power(p, power);
    } else if constexpr (kSlopes == Slopes::any) {
      return with_all(times_exp2(power, factor_, factor_rest_), slope);
    } else if constexpr (kSlopes == Slopes::entropy) {
      return times_exp2(power, factor_ * slope);
    } else {
      return times_exp2(power, factor_, factor_rest_);
    }
  }

 private:
  VecF with_all(VecF p, VecF slope) const {
    return multiply_add(p, multiply_add(two_zeta_, p - sum_sq_, slope), shift_);
  }

  const RowExp row_exp_;
  VecF factor_, factor_rest_, coarse_[5], minus_g_, pivot_, offset_, minus_eta_, slope_, inv_softcap_;
  VecF two_zeta_, sum_sq_, shift_;
};

// The target's own entry in double: g (1 - p) cancels as p goes to 1, g (-expm1(log p)) does not.
double target_gradient(const RowGradient& in, double target_logit, double temperature) {
  double logprob = target_logit * (1.0 / temperature) - in.lse;  // the product lse was built with
  if (logprob > 0) logprob = 0;  // rounding only; NaN stays
  double grad = -in.g * std::expm1(logprob);
  if (in.eta != 0 && logprob != -INFINITY) grad -= in.eta * std::exp(logprob) * (logprob + in.entropy);
  if (in.zeta != 0) grad += 2 * in.zeta * std::exp(logprob) * (std::exp(logprob) - in.sum_sq);
  if (in.shift != 0) grad += in.shift;
  return grad / temperature;
}

template <typename T, typename Out, bool kSubtract, Slopes kSlopes, bool kSoftcap>
void row_gradient(const T* row, int64_t stride, int64_t vocab, int64_t token_id, double temperature, double softcap,
                  const RowGradient& in, const RowExp& row_exp, double factor, Out* out, bool stream) {
  constexpr bool kCoarse = kHasScale && std::is_same_v<Out, BFloat16>;
  alignas(64) float block[kBlock];
  alignas(64) Out result[kBlock + kUnroll * kLanes];  // the padded tail of a block may run over
  const VectorGradient<kSubtract, kCoarse, kSlopes> vector(in, temperature, softcap, row_exp, factor);
  const auto gradient = [&](VecF x) {
    VecF value = vector(x);
    if constexpr (kSoftcap) value *= vector.through_softcap(x);
    // Narrowing wants NaN without a payload, which float32 logits may carry.
    if constexpr (sizeof(Out) < sizeof(T) && !kNarrowsAnyNan) {
      value = value == value ? value : broadcast(__builtin_nanf(""));
    }
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
      for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
        const T* const from = row + begin + k;
        __builtin_prefetch(from + kBlock);
        __builtin_prefetch(reinterpret_cast<const char*>(from + kBlock) + 64);
        store_pair(result + k, gradient(load(from)), gradient(load(from + kLanes)));
      }
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

template <typename T, typename Out, bool kSubtract>
auto row_gradient_variant(Slopes slopes, bool softcap) {
  const auto with = [softcap](auto kSlopes) {
    return softcap ? row_gradient<T, Out, kSubtract, kSlopes.value, true>
                   : row_gradient<T, Out, kSubtract, kSlopes.value, false>;
  };
  switch (slopes) {
    case Slopes::logprob: return with(std::integral_constant<Slopes, Slopes::logprob>());
    case Slopes::entropy: return with(std::integral_constant<Slopes, Slopes::entropy>());
    default: return with(std::integral_constant<Slopes, Slopes::any>());
  }
}

template <typename T, typename Out>
void backward_rows(const TokenStatsBackward& args, int64_t begin, int64_t end) {
  const T* data = static_cast<const T*>(args.logits.data);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = args.rows != nullptr ? args.rows[r] : r;
    const int64_t vocab = args.offsets != nullptr ? args.offsets[n + 1] - args.offsets[n] : args.logits.vocab;
    const double g = args.grad_logprobs != nullptr ? args.grad_logprobs[n] : 0;
    const double eta = args.grad_entropy != nullptr ? args.grad_entropy[n] : 0;
    const double zeta = args.grad_sum_sq != nullptr ? args.grad_sum_sq[n] : 0;
    const double shift = args.shift != nullptr ? args.shift[n] : 0;
    Out* out = static_cast<Out*>(args.out) + (args.offsets != nullptr ? args.offsets[n] : n * args.out_stride);
    // Masked or clipped: the row is not read, so nothing in it can matter.
    if (g == 0 && eta == 0 && zeta == 0 && shift == 0) {
      if (vocab > 0) std::memset(out, 0, vocab * sizeof(Out));  // without any entry, `out` may be null
      continue;
    }
    const T* row = data + (args.offsets != nullptr ? args.offsets[n] : args.logits.offset(n));
    const RowGradient in = {g, eta, zeta, shift, args.lse[n], args.entropy[n], zeta != 0 ? args.sum_sq[n] : 0};
    const Slopes slopes = zeta != 0 || shift != 0 ? Slopes::any : eta != 0 ? Slopes::entropy : Slopes::logprob;
    const double temperature = args.temperature.of(n);
    // Without another slope, g is part of the power, so that a tiny g costs no digits: -g/T = factor 2^exponent, with
    // a factor of at least 1, so that no power is beyond the range of a gradient that is within it.
    int exponent = 0;
    double factor = 1;
    if (slopes == Slopes::logprob) {
      factor = -g / temperature;
      if (std::isfinite(factor)) factor = 2 * std::frexp(factor, &exponent), --exponent;
    }
    const RowExp row_exp(in.lse * temperature, temperature, exponent);
    const auto run = (row_exp.subtract ? row_gradient_variant<T, Out, true>
                                       : row_gradient_variant<T, Out, false>)(slopes, args.softcap > 0);
    run(row, args.logits.vocab_stride, vocab, args.token_ids[n], temperature, args.softcap, in, row_exp, factor, out,
        args.stream);
  }
  if (args.stream) stream_fence();
}

void forward(const TokenStatsForward& args, int64_t row_begin, int64_t row_end) {
  const FlushSubnormals flush;
  switch (args.logits.dtype) {
    case DType::float32: return forward_rows<float>(args, row_begin, row_end);
    case DType::bfloat16: return forward_rows<BFloat16>(args, row_begin, row_end);
    case DType::float16: return forward_rows<Float16>(args, row_begin, row_end);
  }
}

void backward(const TokenStatsBackward& args, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
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
