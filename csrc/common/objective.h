// The arithmetic of one token of a policy-gradient loss, the same lines on the host and on the device.
//
// Every function returns the loss term and its derivative with respect to the token's log-prob l.  Derivatives
// come from predicates, never from inf * 0: a clipped token whose ratio overflows has slope exactly 0, and a
// token with advantage 0 contributes exactly 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "platform.h"

namespace r1k {

// The numbers are those r1kernels/ops/policy_loss.py passes.
enum class Surrogate : int64_t { clip = 0, cispo = 1, sapo = 2, reinforce = 3 };
enum class Ratio : int64_t { token = 0, sequence = 1 };
enum class Aggregate : int64_t { sequence_mean = 0, token_mean = 1, constant = 2 };

struct Objective {
  Surrogate surrogate;
  Ratio ratio;
  int64_t kl;  // 1, 2, 3: k1, k2, k3
  Aggregate aggregate;
  float clip_low;   // bounds are 1 - clip_low and 1 + clip_high; clip_low may exceed 1
  float clip_high;
  float ratio_cap;  // +inf: none
  float tau_pos;
  float tau_neg;
  float kl_coef;
  float entropy_coef;
  double max_length;
};

// The order is that of METRICS in r1kernels/ops/policy_loss.py.
enum Metric {
  kTokens, kSequences, kSurrogate, kKl, kEntropy, kRatioMean, kRatioMin, kRatioMax, kApproxKl, kClipFraction,
  kClipLowFraction, kClipHighFraction, kRatioCapFraction, kActiveFraction, kNonfiniteTokens, kMetricCount
};

struct Term {
  float loss;
  float slope;  // dloss / dl
};

struct SurrogateTerm {
  float loss;
  float slope;
  bool clipped_low;
  bool clipped_high;
  bool capped;
};

// -min(min(r, cap) A, clip(r, 1 - lo, 1 + hi) A).  On a bound the gradient flows, as in torch.clamp.
R1K_HOST_DEVICE SurrogateTerm clip_term(const Objective& objective, float ratio, float advantage) {
  const float low = 1.0f - objective.clip_low;
  const float high = 1.0f + objective.clip_high;
  if (advantage > 0) {
    if (ratio > high) return {-high * advantage, 0, false, true, false};
  } else {
    if (ratio < low) return {-low * advantage, 0, true, false, false};
    if (ratio > objective.ratio_cap) return {-objective.ratio_cap * advantage, 0, false, false, true};
  }
  return {-ratio * advantage, -ratio * advantage, false, false, false};
}

// -sg[min(r, 1 + hi)] A l
R1K_HOST_DEVICE SurrogateTerm cispo_term(const Objective& objective, float ratio, float advantage, float logprob) {
  const float bound = 1.0f + objective.clip_high;
  const bool clipped = ratio > bound;
  const float weight = (clipped ? bound : ratio) * advantage;
  return {weight == 0 ? 0 : -weight * logprob, -weight, false, clipped, false};
}

// -(4/tau) sigma(tau (r - 1)) A, whose slope is -4 sigma (1 - sigma) r A
R1K_HOST_DEVICE SurrogateTerm sapo_term(const Objective& objective, float ratio, float advantage) {
  const float tau = advantage > 0 ? objective.tau_pos : objective.tau_neg;
  const float x = tau * (ratio - 1.0f);
  const float e = std::exp(-std::fabs(x));
  const float sigma = (x >= 0 ? 1.0f : e) / (1.0f + e);
  const float bump = e == 0 ? 0 : e / ((1.0f + e) * (1.0f + e)) * ratio;  // sigma (1 - sigma) r, 0 at r = inf
  return {-4.0f / tau * sigma * advantage, -4.0f * bump * advantage, false, false, false};
}

// `log_ratio` is l - l_old of the token, or its mean over the sequence (GSPO); the slope of `clip` and `sapo`
// is then with respect to that mean.
R1K_HOST_DEVICE SurrogateTerm surrogate_term(const Objective& objective, float log_ratio, float advantage,
                                             float logprob) {
  if (advantage == 0) return {0, 0, false, false, false};
  switch (objective.surrogate) {
    case Surrogate::clip: return clip_term(objective, std::exp(log_ratio), advantage);
    case Surrogate::cispo: return cispo_term(objective, std::exp(log_ratio), advantage, logprob);
    case Surrogate::sapo: return sapo_term(objective, std::exp(log_ratio), advantage);
    case Surrogate::reinforce: break;
  }
  return {-advantage * logprob, -advantage, false, false, false};
}

// KL estimators with d = l_ref - l: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1.
R1K_HOST_DEVICE Term kl_term(int64_t estimator, float d) {
  if (estimator == 1) return {-d, 1.0f};
  if (estimator == 2) return {0.5f * d * d, -d};
  const float em1 = std::expm1(d);
  // e^d - 1 - d cancels for small d; its series does not (terms beyond d^9 are below one fp32 rounding at 1/2).
  const float series =
      d * d *
      (1 / 2.0f +
       d * (1 / 6.0f +
            d * (1 / 24.0f +
                 d * (1 / 120.0f + d * (1 / 720.0f + d * (1 / 5040.0f + d * (1 / 40320.0f + d / 362880.0f)))))));
  return {std::fabs(d) < 0.5f ? series : em1 - d, -em1};
}

}  // namespace r1k
