// One counted token of a policy loss: its gradients, and what it adds to the loss and the metrics.  Shared by
// the policy loss on CPUs, on NVIDIA GPUs, and in the fused step.
//
//   loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t),  g = dloss/dl,  eta = dloss/dH
//
// with r_t kl_t in place of kl_t if the objective says so.
//
// Sums are float64 and as good as their order, which is the caller's.
#pragma once

#include <cmath>
#include <cstdint>

#include "objective.h"

namespace r1k {

struct PolicyToken {
  double weight;     // 1 / denominator, or 1 / (denominator * counted tokens of the sequence)
  float logprob;     // l
  float log_ratio;   // l - l_old, or its mean or sum over the sequence; l - l without old log-probs
  float ref;         // l_ref; not read without has_ref
  float entropy;     // H, 0 where it is not given
  float advantage;   // A
  float importance;  // 1 where it is not given
  bool has_ref;
};

struct PolicyGradient {
  float g;    // dloss/dl
  float eta;  // dloss/dH
};

struct PolicySums {
  double loss = 0, surrogate = 0, kl = 0, entropy = 0, ratio = 0, approx_kl = 0;
  float ratio_min = INFINITY, ratio_max = -INFINITY;
  int64_t tokens = 0, clip_low = 0, clip_high = 0, capped = 0, active = 0, nonfinite = 0;

  R1K_HOST_DEVICE void merge(const PolicySums& other) {
    loss += other.loss;
    surrogate += other.surrogate;
    kl += other.kl;
    entropy += other.entropy;
    ratio += other.ratio;
    approx_kl += other.approx_kl;
    ratio_min = other.ratio_min < ratio_min ? other.ratio_min : ratio_min;
    ratio_max = other.ratio_max > ratio_max ? other.ratio_max : ratio_max;
    tokens += other.tokens;
    clip_low += other.clip_low;
    clip_high += other.clip_high;
    capped += other.capped;
    active += other.active;
    nonfinite += other.nonfinite;
  }
};

// factor * value in float64, and 0 where the value is: a ratio that overflowed belongs to a factor of any size.
R1K_HOST_DEVICE double weighted(double factor, float value) { return value == 0 ? 0 : factor * value; }

// A weight of 0 rejects the token: its ratio may have overflowed, so it goes by the advantage, not by 0 * inf.
R1K_HOST_DEVICE SurrogateTerm surrogate_of(const Objective& objective, const PolicyToken& token) {
  return surrogate_term(objective, token.log_ratio, token.importance == 0 ? 0.0f : token.advantage, token.logprob);
}

// What a token adds to the slope with respect to the sequence's mean log-ratio.
R1K_HOST_DEVICE double shared_slope_of(const Objective& objective, const PolicyToken& token) {
  double slope = 0;
  if (shares_surrogate(objective)) slope = weighted(token.importance, surrogate_of(objective, token).slope);
  if (shares_kl(objective) && token.has_ref) {
    const double factor = static_cast<double>(objective.kl_coef) * std::exp(token.log_ratio);
    slope += weighted(factor, kl_term(objective.kl, token.ref - token.logprob).loss);
  }
  return slope;
}

// With `shared`, `shared_slope` is the mean of `shared_slope_of` over the sequence.
R1K_HOST_DEVICE PolicyGradient add_token(PolicySums& sums, const Objective& objective, const PolicyToken& token,
                                         bool shared = false, double shared_slope = 0) {
  const SurrogateTerm term = surrogate_of(objective, token);
  const double surrogate_loss = weighted(token.importance, term.loss);
  const double surrogate_slope = weighted(token.importance, term.slope);
  double loss = surrogate_loss;
  double slope = (shared ? shared_slope : 0) + (shared && shares_surrogate(objective) ? 0 : surrogate_slope);
  double kl_slope = 0;
  if (token.has_ref) {
    const float d = token.ref - token.logprob;
    const Term kl = kl_term(objective.kl, d);
    double kl_loss = kl.loss;
    kl_slope = kl.slope;
    if (objective.kl_ratio) {
      const double r = std::exp(token.log_ratio);
      kl_loss = weighted(r, kl.loss);
      kl_slope = weighted(r, objective.ratio == Ratio::sequence ? kl.slope : kl_ratio_slope(objective.kl, d));
    }
    sums.kl += kl_loss;
    kl_slope = objective.kl_coef == 0 ? 0 : static_cast<double>(objective.kl_coef) * kl_slope;
    if (objective.kl_coef != 0) loss += static_cast<double>(objective.kl_coef) * kl_loss;
    slope += kl_slope;
  }
  sums.entropy += token.entropy;
  PolicyGradient gradient = {static_cast<float>(token.weight * slope), 0};
  if (objective.entropy_coef != 0) {
    loss -= static_cast<double>(objective.entropy_coef) * token.entropy;
    gradient.eta = static_cast<float>(-token.weight * objective.entropy_coef);
  }

  const float ratio = std::exp(token.log_ratio);
  sums.loss += token.weight * loss;
  sums.surrogate += token.weight * surrogate_loss;
  sums.ratio += ratio;
  sums.ratio_min = ratio < sums.ratio_min ? ratio : sums.ratio_min;  // NaN never
  sums.ratio_max = ratio > sums.ratio_max ? ratio : sums.ratio_max;
  sums.approx_kl += kl_term(3, token.log_ratio).loss;  // k3 under the behaviour policy: r - 1 - log r
  sums.tokens += 1;
  sums.clip_low += term.clipped_low;
  sums.clip_high += term.clipped_high;
  sums.capped += term.capped;
  sums.active += gradient.g != 0 || gradient.eta != 0;
  sums.nonfinite += !(std::isfinite(loss) && std::isfinite(kl_slope) && std::isfinite(surrogate_slope));
  return gradient;
}

// The sums of all tokens -> the loss and its metrics.
R1K_HOST_DEVICE void finish(const PolicySums& sums, int64_t sequences, float* loss, float* metrics) {
  const bool empty = sums.tokens == 0;
  const double per_token = empty ? 0 : 1 / static_cast<double>(sums.tokens);
  const int64_t clipped = sums.clip_low + sums.clip_high + sums.capped;
  *loss = static_cast<float>(sums.loss);
  metrics[kTokens] = static_cast<float>(sums.tokens);
  metrics[kSequences] = static_cast<float>(sequences);
  metrics[kSurrogate] = static_cast<float>(sums.surrogate);
  metrics[kKl] = static_cast<float>(sums.kl * per_token);
  metrics[kEntropy] = static_cast<float>(sums.entropy * per_token);
  metrics[kRatioMean] = empty ? 1.0f : static_cast<float>(sums.ratio * per_token);
  metrics[kRatioMin] = empty ? 1.0f : sums.ratio_min;
  metrics[kRatioMax] = empty ? 1.0f : sums.ratio_max;
  metrics[kApproxKl] = static_cast<float>(sums.approx_kl * per_token);
  metrics[kClipFraction] = static_cast<float>(static_cast<double>(clipped) * per_token);
  metrics[kClipLowFraction] = static_cast<float>(static_cast<double>(sums.clip_low) * per_token);
  metrics[kClipHighFraction] = static_cast<float>(static_cast<double>(sums.clip_high) * per_token);
  metrics[kRatioCapFraction] = static_cast<float>(static_cast<double>(sums.capped) * per_token);
  metrics[kActiveFraction] = static_cast<float>(static_cast<double>(sums.active) * per_token);
  metrics[kNonfiniteTokens] = static_cast<float>(sums.nonfinite);
}

}  // namespace r1k
