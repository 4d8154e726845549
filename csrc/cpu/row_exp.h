// e^{(x - reference) / T} of the entries of a row of logits: what both vocabulary kernels spend their time on.
//
//   (x - reference) log2(e) / T = x hi + x lo - shift + (log2 of a factor near 1)
//
// hi + lo is log2(e) / T in two floats and `shift` an integer, so no entry is subtracted from the reference, which
// would round it, and the exponent of 2 is as exact as x.  Where the reference is too far from 0 for that
// (kSubtract), the difference is exact for every entry whose power is not 0.  Included only by files compiled per
// instruction set.
#pragma once

#include <cmath>

#include "vec.h"

namespace r1k {
namespace R1K_ISA {

#if defined(__AVX512F__)
constexpr bool kHasScale = true;  // instructions for the part of x above an integer, and for a 2^x with any integer x
#else
constexpr bool kHasScale = false;
#endif

// While it lives, results below 2^-126 become 0.  A subnormal result costs more than a hundred cycles, and so does
// every product that reads one.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  const unsigned saved_;
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
};

// 2^(rest + exponent).
struct Power {
  VecF x;          // the entry, raised to the least whose power is not 0; minus the reference if that is subtracted
  VecF rest;       // in [-0.5, 0.5]; if coarse, in [0, 1)
  VecF exponent;   // an integer; if coarse, its part above the integer is `rest`
  VecI underflow;  // only without kHasScale: lanes (all ones) whose power is 0
};

#if defined(__AVX512F__)
inline VecF above_integer(VecF x) { return (VecF)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF); }
#endif

class RowExp {
 public:
  // Results are those of the formula above divided by `scale`; with an `exponent`, also by 2^exponent.
  RowExp(double reference, double temperature, int exponent = 0) {
    const double log2e = 1.4426950408889634 / temperature;
    const double hi = static_cast<float>(log2e), far = reference * log2e;
    subtract = !(std::fabs(far) < 0x1p20);  // NaN, too
    base = subtract ? canonical(reference) : 0.0f;
    const double near = subtract ? 0 : std::nearbyint(far), shift = near - exponent;
    scale = std::exp2(subtract ? (base - reference) * log2e : near - far);
    // A coarse power leaves out x lo, which is nearly the same for all entries that count.
    coarse_scale = subtract ? scale : std::exp2(near - reference * hi);
    hi_ = broadcast(static_cast<float>(hi));
    lo_ = broadcast(static_cast<float>(log2e - hi));
    minus_shift_ = broadcast(static_cast<float>(-shift));
    rounds_and_shift_ = broadcast(static_cast<float>(kRounds + shift));
    base_ = broadcast(base);
    floor_ = broadcast(static_cast<float>((shift - (kHasScale ? 300 : 126)) / log2e));
  }

  template <bool kSubtract, bool kCoarse>
  Power power(VecF x) const {
    if constexpr (kSubtract) x = x - base_;
    VecI underflow = {};
    if constexpr (!kHasScale) underflow = x < floor_;
    x = larger(floor_, x);
#if defined(__AVX512F__)
    if constexpr (kCoarse) {
      const VecF exponent = multiply_add(x, hi_, minus_shift_);
      return {x, above_integer(exponent), exponent, underflow};
    }
#endif
    const VecF shifted = multiply_add(x, hi_, kRounds);
    const VecF rest = multiply_add(x, lo_, product_minus(x, hi_, shifted - kRounds));
    return {x, rest, shifted - rounds_and_shift_, underflow};
  }

  bool subtract;              // whether the reference, rounded, is subtracted from every entry
  float base;                 // that reference, else 0
  double scale, coarse_scale;

 private:
  VecF hi_, lo_, minus_shift_, rounds_and_shift_, base_, floor_;
};

// Coefficients of 2^r on [0, 1), minimax with 2^0 = 1: 3e-6.
constexpr float kCoarseExp2[5] = {1.0f, 0.693044841f, 0.241280198f, 0.0522424728f, 0.0134266848f};

inline VecF times_power(VecF mantissa, const Power& power) {
#if defined(__AVX512F__)
  return (VecF)_mm512_scalef_ps((__m512)mantissa, (__m512)power.exponent);
#else
  const VecF capped = power.exponent < 128.0f ? power.exponent : broadcast(128.0f);  // 2^128 is infinite
  const VecI exponent = bit_cast<VecI>(capped + kRounds) + 127;
  return power.underflow ? VecF{} : mantissa * bit_cast<VecF>(exponent << 23);
#endif
}

// factor 2^(...), with about one rounding; `rest` is what fp32 rounded away of the factor.
inline VecF times_exp2(const Power& power, VecF factor, VecF rest) {
  const VecF fraction = exp2_fraction(power.rest) * power.rest;
  return times_power(factor + multiply_add(fraction, factor, rest), power);
}

inline VecF times_exp2(const Power& power, VecF factor) {
  const VecF fraction = exp2_fraction(power.rest) * power.rest;
  return times_power(multiply_add(fraction, factor, factor), power);
}

inline VecF exp2_of(const Power& power) {
  return times_power(multiply_add(exp2_fraction(power.rest), power.rest, 1.0f), power);
}

}  // namespace R1K_ISA
}  // namespace r1k
