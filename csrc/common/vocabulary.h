// The arithmetic of one row of logits on a GPU: what a thread adds up of the entries it reads, what becomes of a row's
// sums, and the gradient of an entry.  r1kernels/triton/token_stats*.py says the same in Triton.
//
//   l = z_y - lse z,  H = -sum_j p_j log p_j,  z = x / T,  p = softmax z
//   dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T
//
// The token's own entry is left out of the sums and joins at the end, in float64: a log-prob near 0 keeps its relative
// accuracy.  kExact is for results as fine as float32 itself, and keeps what float32 rounds away on the way.
#pragma once

#include <cmath>
#include <cstdint>

#include "arithmetic.h"

namespace r1k {

// Powers are taken as 2^(d (c + c_rest)), c + c_rest = log2(e) / T.
struct Scale {
  float c;
  float c_rest;
};

R1K_HOST_DEVICE Scale scale_of(double temperature) {
  const double scale = kLog2E / temperature;
  const float c = static_cast<float>(scale);
  return {c, static_cast<float>(scale - c)};
}

struct Power {
  float d;  // the exponent's difference, finite where the power is 0: 0 times it is 0
  float e;
};

// 2^(d (c + c_rest) + lost) with a small `lost`.
template <bool kExact>
R1K_HOST_DEVICE float exp2_of_product(float d, Scale s, float lost) {
  if (!kExact) return exp2_fast(std::fma(d, s.c, lost));
  const float power = product(d, s.c);
  lost += product_error(d, s.c, power) + d * s.c_rest;
  const float e = exp2_fast(power);
  return e + e * (lost * static_cast<float>(kLn2));
}

struct Difference {
  float d;
  float lost;  // to the exponent of its power
};

// x - top where the power is not 0, else a d that is finite; NaN stays.
R1K_HOST_DEVICE Difference exact_difference(float x, float top, Scale s) {
  const float lowest = -1000.0f / s.c;  // 2^-1000 is 0
  const float d = difference(x, top);
  if (d < lowest) return {lowest, 0};  // where x is -inf, what was lost would be inf - inf
  return {d, difference_error(x, top, d) * s.c};
}

// x - top and e^{(x - top)/T}, for an x of -inf or NaN as well.
R1K_HOST_DEVICE Power below(float x, float top, Scale s) {
  const Difference d = exact_difference(x, top, s);
  return {d.d, exp2_of_product<true>(d.d, s, d.lost)};
}

// What a thread has added up, relative to the maximum `top` of what it has seen.  With kExact
//   rest = sum e^{(x - top)/T},  weighted = sum e^{(x - top)/T} (x - top),
// where the maxima are not in `rest`, for their ones would cost the digits of everything else, but in `count`.  Without
// it one rounding less a power pays: exponents are x c - r with r = top c as float32 rounds it, and
//   rest = sum 2^{x c - r},  weighted = sum 2^{x c - r} (x c - r).
struct RowSums {
  float top = kLowest;
  float rest = 0;
  float weighted = 0;
  float count = 0;
};

// What r rounds off a larger exponent would matter: there r is top c as it is, and exponents are (x - top) c.
constexpr float kFarExponent = 1 << 20;
R1K_HOST_DEVICE bool is_near(float reference) { return std::fabs(reference) < kFarExponent; }

// What the sums of a maximum `old_top` are multiplied by where `top` takes its place, for kExact = false.
R1K_HOST_DEVICE Power moved(float old_top, float top, Scale s) {
  const float old_reference = product(old_top, s.c), reference = product(top, s.c);
  const bool old_is_near = is_near(old_reference);
  const float from_far = old_is_near ? std::fma(-top, s.c, old_reference) : (old_top - top) * s.c;
  const float from_near = old_is_near ? old_reference - reference : std::fma(old_top, s.c, -reference);
  const float shift = is_near(reference) ? from_near : from_far;
  return {std::fmax(shift, kLowest), exp2_fast(shift)};
}

// 2^(x c - r) for the r of `top`.
R1K_HOST_DEVICE Power power_of(float x, float top, float reference, Scale s) {
  const float exponent = is_near(reference) ? std::fma(x, s.c, -reference) : (x - top) * s.c;
  return {std::fmax(exponent, kLowest), exp2_fast(exponent)};
}

template <bool kExact>
R1K_HOST_DEVICE void raise_top(RowSums& sums, float top, Power kept) {
  // In a factor of 0 the weighted sum may be 0 * inf.
  sums.weighted = kept.e == 0 ? 0 : kept.e * (sums.weighted + kept.d * (sums.rest + sums.count));
  if (kExact && top > sums.top) {
    sums.rest += sums.count;
    sums.count = 0;
  }
  sums.rest *= kept.e;
  sums.top = top;
}

template <bool kExact>
R1K_HOST_DEVICE Power kept_of(const RowSums& sums, float top, Scale s) {
  return kExact ? below(sums.top, top, s) : moved(sums.top, top, s);
}

// Adds kCount entries.
template <bool kExact, int kCount>
R1K_HOST_DEVICE void add_entries(RowSums& sums, const float (&x)[kCount], Scale s) {
  float top = x[0];
  for (int k = 1; k < kCount; ++k) top = std::fmax(top, x[k]);
  top = std::fmax(top, sums.top);
  const float old_reference = product(sums.top, s.c), reference = product(top, s.c);
  // Sums of their own: the running ones would round equal terms the same way every time.
  float rest = 0, weighted = 0;
  if (!kExact && is_near(old_reference) && is_near(reference)) {
    const float shift = old_reference - reference;
    raise_top<false>(sums, top, {shift, exp2_fast(shift)});
    for (int k = 0; k < kCount; ++k) {
      const float exponent = std::fma(x[k], s.c, -reference), e = exp2_fast(exponent);
      weighted = std::fma(e, std::fmax(exponent, kLowest), weighted);  // 0 * (-inf) = 0
      rest += e;
    }
  } else {
    raise_top<kExact>(sums, top, kept_of<kExact>(sums, top, s));
    for (int k = 0; k < kCount; ++k) {
      const Power power = kExact ? below(x[k], top, s) : power_of(x[k], top, reference, s);
      weighted += power.e * power.d;
      rest += kExact && power.d == 0 ? 0 : power.e;
      if (kExact) sums.count += power.d == 0 ? 1.0f : 0.0f;
    }
  }
  sums.rest += rest;
  sums.weighted += weighted;
}

// The same sums relative to a maximum that is no less; `rest` then has everything below `top`.
template <bool kExact>
R1K_HOST_DEVICE RowSums relative_to(RowSums sums, float top, Scale s) {
  if (sums.top != top) raise_top<kExact>(sums, top, kept_of<kExact>(sums, top, s));
  return sums;
}

// ---- the row as a whole, in float64 ------------------------------------------------------------------------

// Sums of parts of a row relative to `top`, which no entry exceeds: a logit with kExact, else an exponent x c.
struct RowTotals {
  double top;
  double total = 0;
  double weighted = 0;
};

// What the parts were summed with.
template <bool kExact>
R1K_HOST_DEVICE double scale_of_sums(double temperature) {
  const double c = 1 / temperature * kLog2E;
  return kExact ? c : static_cast<double>(static_cast<float>(c));
}

// What sums of a maximum are relative to; c is scale_of_sums.
template <bool kExact>
R1K_HOST_DEVICE double reference_of(float top, double c) {
  const float rounded = product(top, static_cast<float>(c));
  return kExact ? top : is_near(rounded) ? rounded : top * c;
}

// No sums yet, of a row whose parts have maxima up to `top` and whose token has the logit x.
template <bool kExact>
R1K_HOST_DEVICE RowTotals row_totals(float top, double x, double c) {
  return {std::fmax(kExact ? x : x * c, reference_of<kExact>(top, c))};
}

// Where the results are rounded to 16 bits anyway (kExact = false), powers are float32: they are a row's slowest steps.
template <bool kExact>
R1K_HOST_DEVICE double exp2_of_row(double units, double c) {
  return kExact ? std::exp2(units * c) : static_cast<double>(std::exp2(static_cast<float>(units)));
}

// Adds sums relative to their own maximum.
template <bool kExact>
R1K_HOST_DEVICE void add_part(RowTotals& totals, float top, double part, double weighted, double c) {
  const double shift = reference_of<kExact>(top, c) - totals.top;
  const double factor = exp2_of_row<kExact>(shift, c);
  totals.total += factor * part;
  totals.weighted += factor == 0 ? 0 : factor * (weighted + shift * part);
}

struct RowStatistics {
  double logprob, lse, entropy;
};

// From the totals of all other entries, and the token's own logit x.
template <bool kExact>
R1K_HOST_DEVICE RowStatistics row_statistics(RowTotals totals, double x, double temperature, double c) {
  // One unit of `top` is so many nats; the sums are those of a temperature that is log2(e) / c, a rounding away.
  const double nats = kExact ? 1 / temperature : 1 / temperature / c;
  const double nats_of_sums = kExact ? c * kLn2 : kLn2;
  const double own = kExact ? x : x * c;
  const double d = own - totals.top;  // of a token at +inf NaN, as all of its row is
  const double e = exp2_of_row<kExact>(d, c);
  totals.total += e;
  totals.weighted += e == 0 ? 0 : e * d;
  const double mean = totals.weighted / totals.total;  // sum_j p_j (x_j - top)
  const double log_total = std::log(totals.total);
  // The logarithm's slope in the temperature is the mean; no word at all: lse is -inf.
  const double log_sum = log_total + (totals.total == 0 ? 0 : (nats - nats_of_sums) * mean);
  const double lse = totals.top * nats + log_sum;
  return {own == totals.top ? -log_sum : own * nats - lse, lse, log_total - mean * nats_of_sums};
}

// ---- the gradient ------------------------------------------------------------------------------------------

// What every entry of a row needs.  The anchor is the float32 next to lse T.  p = e^{(x - anchor)/T} from_anchor, and
// from_anchor, which is the same for all of a row, is part of minus_g and minus_eta: where logits are large it is far
// from 1.  log p and H cancel where x is near the pivot, (lse - H) T.  With kExact their sum is therefore
// (x - pivot)/T + offset; else it is (x - anchor)/T + offset, in units of log 2 that minus_eta has, and the offset is
// made such that this is as exact at the pivot.
struct RowGradient {
  Scale scale;
  float anchor;
  float minus_g, minus_g_rest;
  float minus_eta, pivot, offset, slope;

  R1K_HOST_DEVICE float rounded_exponent(float x) const { return product(x - anchor, scale.c); }
};

// e^{anchor/T - lse}.  It is between 1/V and V: the largest logit is a float32 at most T log V below lse T.  The bounds
// are for logits above 1e15, where lse has lost the logarithm of its sum.
template <bool kExact>
R1K_HOST_DEVICE double from_anchor(float anchor, double lse, double temperature) {
  const double exponent = (anchor - lse * temperature) * (1 / temperature * kLog2E);
  const double bounded = exponent > 40 ? 40 : exponent < -40 ? -40 : exponent;  // NaN stays
  return kExact ? std::exp2(bounded) : static_cast<double>(std::exp2(static_cast<float>(bounded)));
}

template <bool kExact>
R1K_HOST_DEVICE RowGradient row_gradient(double lse, double entropy, double temperature, double g, double eta) {
  const double inv_t = 1 / temperature;
  const double scale = inv_t * kLog2E;
  const double pivot = (lse - entropy) * temperature;
  RowGradient row;
  row.scale = scale_of(temperature);
  row.anchor = static_cast<float>(lse * temperature);
  const double unit = from_anchor<kExact>(row.anchor, lse, temperature) * inv_t;
  row.pivot = static_cast<float>(pivot);
  row.offset = kExact ? static_cast<float>((row.pivot - pivot) * inv_t)
                      : static_cast<float>((row.pivot - pivot) * scale - row.rounded_exponent(row.pivot));
  row.minus_g = static_cast<float>(-g * unit);
  row.minus_g_rest = static_cast<float>(-g * unit - row.minus_g);
  row.minus_eta = static_cast<float>(-eta * unit * (kExact ? 1 : kLn2));
  row.slope = static_cast<float>(inv_t);
  return row;
}

// -(g + eta (log p + H)) p / T of an entry that is not the token's own.
template <bool kExact, bool kEntropy>
R1K_HOST_DEVICE float entry_gradient(float x, const RowGradient& row) {
  if (!kExact) {
    constexpr float kZero = -200;  // 2^-200 is 0, and 0 times the logarithm must be
    const float y = kEntropy ? max_or_nan(row.rounded_exponent(x), kZero) : row.rounded_exponent(x);
    return exp2_fast(y) * (kEntropy ? std::fma(row.minus_eta, y + row.offset, row.minus_g) : row.minus_g);
  }
  const Difference exact = exact_difference(x, row.anchor, row.scale);
  const float p = exp2_of_product<true>(exact.d, row.scale, exact.lost);
  float slope = row.minus_g;
  if (kEntropy) {
    const float log_p_plus_h = std::fma(p == 0 ? 0.0f : x - row.pivot, row.slope, row.offset);  // 0 * (-inf) = 0
    slope = std::fma(row.minus_eta, log_p_plus_h, slope);
  }
  return std::fma(p, slope, p * row.minus_g_rest);  // rounded once: the rest is less than that
}

// (g (1 - p) - eta p (log p + H)) / T of the token itself.
template <bool kExact>
R1K_HOST_DEVICE float own_gradient(double x, double lse, double entropy, double temperature, double g, double eta) {
  const double inv_t = 1 / temperature;
  double log_p = x * inv_t - lse;
  if (log_p > 0) log_p = 0;  // rounding alone
  if (!kExact) {
    const float l = static_cast<float>(log_p), p = std::exp(l);
    const float of_entropy = p == 0 ? 0 : p * static_cast<float>(log_p + entropy);
    return static_cast<float>((-g * std::expm1(l) - eta * of_entropy) * inv_t);
  }
  const double p = std::exp(log_p);
  // g (1 - p) cancels as p goes to 1, -g expm1(log p) does not.
  const double of_entropy = p == 0 ? 0 : p * (log_p + entropy);
  return static_cast<float>((-g * std::expm1(log_p) - eta * of_entropy) * inv_t);
}

}  // namespace r1k
