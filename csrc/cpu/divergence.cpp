// Divergence of two distributions over the vocabulary, row by row, and its gradient with respect to the student's
// logits.  With p the student, q the teacher and d = log q_j - log p_j, an entry is described by the larger of the
// two probabilities and by t = e^{-|d|}: every sum is made of terms >= 0 and every difference of probabilities is
// big * (1 - t), so nothing cancels however close p and q are.  An error of the log-sum-exps enters to second order.

#include "divergence.h"

#include <cmath>

#include "isa.h"
#include "row_stats.h"
#include "vec_log.h"

namespace r1k {
namespace R1K_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;

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

int load_rows(const RowView& view, int64_t row, int64_t begin, int count, float* block) {
  const int64_t offset = view.offset(row);
  switch (view.dtype) {
    case DType::float32:
      return load_block(static_cast<const float*>(view.data) + offset, view.vocab_stride, begin, count, block);
    case DType::bfloat16:
      return load_block(static_cast<const BFloat16*>(view.data) + offset, view.vocab_stride, begin, count, block);
    case DType::float16:
      return load_block(static_cast<const Float16*>(view.data) + offset, view.vocab_stride, begin, count, block);
  }
  return 0;
}

OnlineLse<double> state_of(const RowView& view, int64_t row, double temperature) {
  const int64_t offset = view.offset(row), stride = view.vocab_stride, vocab = view.vocab;
  switch (view.dtype) {
    case DType::float32:
      return row_state(static_cast<const float*>(view.data) + offset, stride, vocab, temperature);
    case DType::bfloat16:
      return row_state(static_cast<const BFloat16*>(view.data) + offset, stride, vocab, temperature);
    case DType::float16:
      return row_state(static_cast<const Float16*>(view.data) + offset, stride, vocab, temperature);
  }
  return {};
}

// log p = (x - value)/T + rest, as an exponent of 2: the anchor is lse T rounded to fp32.
struct Anchor {
  Anchor(double lse, double temperature) {
    const double exact = lse * temperature;
    const float rounded = canonical(exact);
    value = broadcast(rounded);
    rest = broadcast(canonical((rounded - exact) / temperature * kLog2E));
  }
  VecF value, rest;
};

// One entry of both rows.  Lanes where `dead` holds have both probabilities 0.
struct Entry {
  VecF big;        // max(p, q)
  VecF t;          // min(p, q) / max(p, q)
  VecF one_minus;  // 1 - t
  VecF distance;   // |d|
  VecI q_is_big;
  VecI dead;
};

// The two rows of logits as one: their log-sum-exps, and d without the rounding of either of them.
template <bool kExact>
class Entries {
 public:
  Entries(double lse_student, double lse_teacher, double temperature)
      : scale_(temperature), student_(lse_student, temperature), teacher_(lse_teacher, temperature) {
    const double gap = (lse_teacher - lse_student) * temperature;
    const float hi = canonical(gap);
    gap_ = broadcast(hi);
    gap_rest_ = broadcast(canonical(gap - hi));
    slope_ = broadcast(static_cast<float>(1.0 / temperature));
  }

  Entry operator()(VecF x, VecF y) const {
    const Difference<true> logits(y, x);
    const Difference<true> d(logits.value, gap_);
    const VecF lost = d.error + (logits.error - gap_rest_);
    const VecF sum = d.value + lost;  // d T
    const VecF rest = (d.value - sum) + lost;

    Entry entry;
    entry.q_is_big = sum >= 0.0f;
    const VecF far = entry.q_is_big ? -sum : sum;
    const VecF far_rest = rest == rest ? (entry.q_is_big ? -rest : rest) : VecF{};  // inf - inf
    const Exp2 ratio = exp2_scaled(far, scale_, far_rest * scale_.hi);
    entry.t = ratio.value();
    entry.one_minus = ratio.underflow ? broadcast(1.0f) : multiply_add(-ratio.fraction, ratio.power, 1.0f - ratio.power);
    entry.distance = -far * slope_;

    const VecF logit = entry.q_is_big ? y : x;
    const VecF rest_of = entry.q_is_big ? teacher_.rest : student_.rest;
    const Difference<kExact> from_anchor(logit, entry.q_is_big ? teacher_.value : student_.value);
    Exp2 big;
    if constexpr (kExact) {
      big = exp2_scaled(from_anchor.value, scale_, multiply_add(from_anchor.error, scale_.hi, rest_of));
    } else {
      big = exp2_scaled(from_anchor.value, scale_, rest_of);
    }
    entry.big = big.value();
    entry.dead = big.underflow;
    return entry;
  }

 private:
  Exp2Scale scale_;
  Anchor student_, teacher_;
  VecF gap_, gap_rest_, slope_;
};

// a log(a / o) - a + o >= 0, the term of KL(a||o); `a_is_big` says which of the two is entry.big.
VecF kl_term(const Entry& entry, VecI a_is_big) {
  const VecF d = a_is_big ? entry.distance : -entry.distance;
  VecF p = broadcast(2.4922436e-5f);  // minimax of (e^{-d} + d - 1) / d^2 on [-0.5, 0.5]: 4e-10
  p = multiply_add(p, d, -1.9962174e-4f);
  p = multiply_add(p, d, 1.3888738e-3f);
  p = multiply_add(p, d, -8.333182e-3f);
  p = multiply_add(p, d, 4.1666668e-2f);
  p = multiply_add(p, d, -1.6666667e-1f);
  p = multiply_add(p, d, 0.5f);
  const VecF near = (a_is_big ? entry.big : entry.big * entry.t) * (d * d * p);
  const VecF small = entry.t == 0.0f ? VecF{} : entry.t * entry.distance;  // 0 * inf = 0
  const VecF far = entry.big * (a_is_big ? entry.distance - entry.one_minus : entry.one_minus - small);
  const VecF term = entry.distance < 0.5f ? near : far;
  // Underflow makes a probability 0, but one that is not -inf against one that is stays infinitely far from it.
  const VecF none = a_is_big & (entry.distance == INFINITY) ? broadcast(INFINITY) : VecF{};
  return entry.dead ? none : term;
}

struct JsdTerms {
  VecF student, teacher;  // of KL(p||m) and KL(q||m)
};

struct Mixture {
  explicit Mixture(double beta) : q(broadcast(static_cast<float>(beta))), p(broadcast(static_cast<float>(1 - beta))) {}
  VecF q, p;
};

// Weights of the larger and of the smaller probability in m.
struct JsdWeights {
  JsdWeights(const Entry& entry, const Mixture& m)
      : big(entry.q_is_big ? m.q : m.p), small(entry.q_is_big ? m.p : m.q) {}
  VecF big, small;
};

// log(m / big) and log(m / small).  The latter is infinite where the smaller probability is 0.
Log1p log_of_m_over_big(const Entry& entry, const JsdWeights& weights) {
  return log1p_of(-weights.small * entry.one_minus, multiply_add(weights.small, entry.t, weights.big));
}

Log1p log_of_m_over_small(const Entry& entry, const JsdWeights& weights) {
  return log1p_of(weights.big * entry.one_minus / entry.t, weights.big / entry.t + weights.small);
}

JsdTerms jsd_terms(const Entry& entry, const Mixture& mixture) {
  const JsdWeights weights(entry, mixture);
  const VecF of_big = entry.big * log_of_m_over_big(entry, weights).gap;
  const Log1p log_small = log_of_m_over_small(entry, weights);
  const VecF small = entry.big * entry.t;
  // small (m / small - 1) alone is left where the logarithm's part of the gap is rounded away.
  const VecF of_small = entry.t < 0x1p-60f ? entry.big * weights.big : small * log_small.gap;
  const VecF student = entry.q_is_big ? of_small : of_big;
  const VecF teacher = entry.q_is_big ? of_big : of_small;
  return {entry.dead ? VecF{} : student, entry.dead ? VecF{} : teacher};
}

struct Sums {
  double student = 0, teacher = 0;  // of jsd; a KL is in `student`
};

template <bool kExact, Divergence kKind>
Sums row_sums(const DivergenceForward& args, int64_t row, const Entries<kExact>& entries) {
  alignas(64) float student[kBlock], teacher[kBlock];
  const Mixture mixture(args.beta);
  Sums total;
  for (int64_t begin = 0; begin < args.student.vocab; begin += kBlock) {
    const int64_t left = args.student.vocab - begin;
    const int count = static_cast<int>(left < kBlock ? left : kBlock);
    const int padded = load_rows(args.student, row, begin, count, student);
    load_rows(args.teacher, row, begin, count, teacher);
    VecF sum_student = {}, sum_teacher = {};
    for (int run = 0; run < padded; run += kRun) {
      VecF partial_student = {}, partial_teacher = {};
      const int run_end = run + kRun < padded ? run + kRun : padded;
      for (int k = run; k < run_end; k += kLanes) {
        const Entry entry = entries(load(student + k), load(teacher + k));
        if constexpr (kKind == Divergence::jsd) {
          const JsdTerms terms = jsd_terms(entry, mixture);
          partial_student += terms.student;
          partial_teacher += terms.teacher;
        } else {
          const VecI a_is_big = kKind == Divergence::forward_kl ? entry.q_is_big : ~entry.q_is_big;
          partial_student += kl_term(entry, a_is_big);
        }
      }
      sum_student += partial_student;
      sum_teacher += partial_teacher;
    }
    total.student += horizontal_sum(sum_student);
    total.teacher += horizontal_sum(sum_teacher);
  }
  return total;
}

template <bool kExact, Divergence kKind>
void forward_rows(const DivergenceForward& args, int64_t row_begin, int64_t row_end) {
  const double inv_temperature = 1.0 / args.temperature;
  for (int64_t n = row_begin; n < row_end; ++n) {
    if (args.mask != nullptr && !args.mask[n]) {
      args.value[n] = 0;
      for (double* out : {args.lse_student, args.lse_teacher, args.inner, args.student_entropy, args.teacher_entropy})
        out[n] = 0;
      continue;
    }
    const OnlineLse<double> student = state_of(args.student, n, args.temperature);
    const OnlineLse<double> teacher = state_of(args.teacher, n, args.temperature);
    args.lse_student[n] = student.lse(inv_temperature);
    args.lse_teacher[n] = teacher.lse(inv_temperature);
    args.student_entropy[n] = student.entropy(inv_temperature);
    args.teacher_entropy[n] = teacher.entropy(inv_temperature);
    // NaN, inf, or no word at all in either row: the entropy is NaN, and so is the divergence.
    const double nan_or_zero = (args.student_entropy[n] + args.teacher_entropy[n]) * 0;
    const Entries<kExact> entries(args.lse_student[n], args.lse_teacher[n], args.temperature);
    const Sums sums = row_sums<kExact, kKind>(args, n, entries);
    args.inner[n] = sums.student + nan_or_zero;
    args.value[n] = static_cast<float>(
        kKind == Divergence::jsd ? args.beta * sums.teacher + (1 - args.beta) * args.inner[n] : args.inner[n]);
  }
}

// dL/dx_j for one vector of a row.
//   forward_kl  g (p_j - q_j) / T
//   reverse_kl  g p_j (log p_j - log q_j - KL(p||q)) / T
//   jsd         g (1 - beta) p_j (log(p_j / m_j) - KL(p||m)) / T
template <bool kExact, Divergence kKind>
class VectorGradient {
 public:
  VectorGradient(const DivergenceBackward& args, int64_t row)
      : entries_(args.lse_student[row], args.lse_teacher[row], args.temperature),
        mixture_(args.beta),
        inner_(broadcast(canonical(args.inner[row]))),
        g_(broadcast(canonical(args.grad[row] * (kKind == Divergence::jsd ? 1 - args.beta : 1) / args.temperature))) {}

  VecF operator()(VecF x, VecF y) const {
    const Entry entry = entries_(x, y);
    VecF grad;
    if constexpr (kKind == Divergence::forward_kl) {
      const VecF difference = entry.big * entry.one_minus;
      grad = g_ * (entry.q_is_big ? -difference : difference);
    } else {
      const VecF p = entry.q_is_big ? entry.big * entry.t : entry.big;
      VecF log_ratio;
      if constexpr (kKind == Divergence::reverse_kl) {
        log_ratio = entry.q_is_big ? -entry.distance : entry.distance;
      } else {
        const JsdWeights weights(entry, mixture_);
        const VecF f = entry.q_is_big ? weights.big * entry.one_minus / entry.t : -weights.small * entry.one_minus;
        const VecF one_plus = entry.q_is_big ? weights.big / entry.t + weights.small
                                             : multiply_add(weights.small, entry.t, weights.big);
        log_ratio = -log1p_of(f, one_plus).log;
      }
      grad = p == 0.0f ? VecF{} : g_ * (p * (log_ratio - inner_));  // 0 * inf = 0
    }
    return entry.dead ? VecF{} : grad;
  }

 private:
  Entries<kExact> entries_;
  Mixture mixture_;
  VecF inner_, g_;
};

template <typename T>
void write_block(T* out, const float* grad, int count, bool stream) {
  alignas(64) T result[kBlock];
  for (int k = 0; k < count; k += kLanes) {
    const VecF x = load(grad + k);
    store(result + k, x == x ? x : broadcast(__builtin_nanf("")));  // a NaN's low bits may not be rounded
  }
  if (stream) {
    stream_copy(out, result, count * sizeof(T));
  } else {
    std::memcpy(out, result, count * sizeof(T));
  }
}

template <typename T>
T* row_of(const RowView& view, int64_t row) {
  return static_cast<T*>(const_cast<void*>(view.data)) + view.offset(row);
}

void write_block(const RowView& out, int64_t row, int64_t begin, const float* grad, int count, bool stream) {
  switch (out.dtype) {
    case DType::float32: return write_block(row_of<float>(out, row) + begin, grad, count, stream);
    case DType::bfloat16: return write_block(row_of<BFloat16>(out, row) + begin, grad, count, stream);
    case DType::float16: return write_block(row_of<Float16>(out, row) + begin, grad, count, stream);
  }
}

void zero_row(const RowView& out, int64_t row) {
  const int64_t size = size_of(out.dtype);
  std::memset(static_cast<char*>(const_cast<void*>(out.data)) + out.offset(row) * size, 0, out.vocab * size);
}

template <bool kExact, Divergence kKind>
void backward_rows(const DivergenceBackward& args, int64_t row_begin, int64_t row_end) {
  alignas(64) float student[kBlock], teacher[kBlock];
  const int64_t vocab = args.student.vocab;
  for (int64_t n = row_begin; n < row_end; ++n) {
    // An infinite KL(p||q) stays infinite under any finite change of the logits: its gradient is 0.
    const bool infinite = kKind == Divergence::reverse_kl && args.inner[n] == INFINITY;
    if (args.grad[n] == 0 || infinite) {
      zero_row(args.out, n);
      continue;
    }
    const VectorGradient<kExact, kKind> gradient(args, n);
    const VecF inv_softcap = broadcast(args.softcap > 0 ? static_cast<float>(1.0 / args.softcap) : 0.0f);
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
      const int count = static_cast<int>(vocab - begin < kBlock ? vocab - begin : kBlock);
      const int padded = load_rows(args.student, n, begin, count, student);
      load_rows(args.teacher, n, begin, count, teacher);
      for (int k = 0; k < padded; k += kLanes) {
        const VecF x = load(student + k);
        VecF grad = gradient(x, load(teacher + k));
        if (args.softcap > 0) {  // 1 - tanh^2, whose factors lose nothing near the cap
          const VecF tanh = x * inv_softcap;
          grad *= (1.0f - tanh) * (1.0f + tanh);
        }
        store(student + k, grad);
      }
      write_block(args.out, n, begin, student, count, args.stream);
    }
  }
  if (args.stream) stream_fence();
}

template <bool kExact>
void forward_of_kind(const DivergenceForward& args, int64_t begin, int64_t end) {
  switch (args.kind) {
    case Divergence::forward_kl: return forward_rows<kExact, Divergence::forward_kl>(args, begin, end);
    case Divergence::reverse_kl: return forward_rows<kExact, Divergence::reverse_kl>(args, begin, end);
    case Divergence::jsd: return forward_rows<kExact, Divergence::jsd>(args, begin, end);
  }
}

template <bool kExact>
void backward_of_kind(const DivergenceBackward& args, int64_t begin, int64_t end) {
  switch (args.kind) {
    case Divergence::forward_kl: return backward_rows<kExact, Divergence::forward_kl>(args, begin, end);
    case Divergence::reverse_kl: return backward_rows<kExact, Divergence::reverse_kl>(args, begin, end);
    case Divergence::jsd: return backward_rows<kExact, Divergence::jsd>(args, begin, end);
  }
}

// 16-bit logits to 16-bit gradients do without the roundings of x - anchor: their own are coarser.
void forward(const DivergenceForward& args, int64_t begin, int64_t end) {
  const bool exact = args.student.dtype == DType::float32 || args.teacher.dtype == DType::float32;
  (exact ? forward_of_kind<true> : forward_of_kind<false>)(args, begin, end);
}

void backward(const DivergenceBackward& args, int64_t begin, int64_t end) {
  const bool exact = args.student.dtype == DType::float32 || args.teacher.dtype == DType::float32 ||
                     args.out.dtype == DType::float32;
  (exact ? backward_of_kind<true> : backward_of_kind<false>)(args, begin, end);
}

}  // namespace

const DivergenceKernels divergence_kernels = {forward, backward};

}  // namespace R1K_ISA
}  // namespace r1k
