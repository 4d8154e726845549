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
enum class Surrogate : int64_t {
  clip = 0, cispo = 1, sapo = 2, reinforce = 3, dppo_tv = 4, dppo_kl = 5, ipo = 6, vespo = 7
};
enum class Ratio : int64_t { token = 0, sequence = 1, sequence_token = 2, sequence_product = 3 };
enum class Aggregate : int64_t { sequence_mean = 0, token_mean = 1, constant = 2 };

struct Objective {
  Surrogate surrogate;
  Ratio ratio;
  int64_t kl;  // 1, 2, 3: k1, k2, k3
  Aggregate aggregate;
  float clip_low;   // bounds are 1 - clip_low and 1 + clip_high; clip_low may exceed 1; vespo: powers, A <= 0 and A > 0
  float clip_high;
  float ratio_cap;  // +inf: none
  float tau_pos;
  float tau_neg;
  float kl_coef;
  float entropy_coef;
  double max_length;
  bool kl_ratio;  // the KL term is multiplied by the ratio
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

// -min(min(r, cap) A, clip(r, 1 - lo, 1 + hi) A).  On a bound the gradient flows, as in torch.clamp.  A cap below
// 1 + hi holds where A > 0, and where A < 0 the bound 1 + hi holds in its place.
R1K_HOST_DEVICE SurrogateTerm clip_term(const Objective& objective, float ratio, float advantage) {
  const float low = 1.0f - objective.clip_low;
  const float high = 1.0f + objective.clip_high;
  const float cap = objective.ratio_cap;
  if (advantage > 0) {
    const float bound = cap < high ? cap : high;
    if (ratio > bound) return {-bound * advantage, 0, false, true, false};
  } else {
    const float bound = cap < high ? high : cap;
    if (ratio < low) return {-low * advantage, 0, true, false, false};
    if (ratio > bound) return {-bound * advantage, 0, false, false, true};
  }
  return {-ratio * advantage, -ratio * advantage, false, false, false};
}

// -weight l with a constant weight: a weight of 0 gives exactly 0, whatever l is.
R1K_HOST_DEVICE SurrogateTerm weighted_logprob(float weight, float logprob, bool low, bool high, bool capped) {
  return {weight == 0 ? 0 : -weight * logprob, -weight, low, high, capped};
}

// -sg[clamp(r, 1 - lo, 1 + hi)] A l
R1K_HOST_DEVICE SurrogateTerm cispo_term(const Objective& objective, float ratio, float advantage, float logprob) {
  const float low = 1.0f - objective.clip_low;
  const float high = 1.0f + objective.clip_high;
  const bool clipped_high = ratio > high, clipped_low = !clipped_high && ratio < low;
  const float weight = (clipped_high ? high : clipped_low ? low : ratio) * advantage;
  return weighted_logprob(weight, logprob, clipped_low, clipped_high, false);
}

// KL(Bernoulli(p_old) || Bernoulli(p)), from l and l_old; a log-prob above 0, by a rounding, is 0.
R1K_HOST_DEVICE float binary_kl(float logprob, float old) {
  const float rest = -std::expm1(logprob), rest_old = -std::expm1(old);  // 1 - p, 1 - p_old
  const float of_rest = rest_old <= 0 ? 0 : rest_old * (std::log(rest_old) - std::log(rest < 0 ? 0 : rest));
  const float p_old = std::exp(old);
  return (p_old == 0 ? 0 : p_old * (old - logprob)) + of_rest;
}

// -sg[min(r, cap)] A l; 0 where the policy has moved too far already in the direction of A: p - p_old or, with
// `dppo_kl`, KL(p_old || p) beyond the bounds hi (A > 0) and lo (A < 0).
R1K_HOST_DEVICE SurrogateTerm dppo_term(const Objective& objective, float log_ratio, float advantage, float logprob) {
  const float old = logprob - log_ratio, up = std::exp(logprob) - std::exp(old);
  const bool kl = objective.surrogate == Surrogate::dppo_kl;
  const bool ahead = advantage > 0 ? up > 0 : up < 0;
  const float moved = !ahead ? 0 : kl ? binary_kl(logprob, old) : std::fabs(up);
  if (moved > (advantage > 0 ? objective.clip_high : objective.clip_low)) {
    return {0, 0, advantage < 0, advantage > 0, false};
  }
  const float ratio = std::exp(log_ratio);
  const bool capped = ratio > objective.ratio_cap;
  return weighted_logprob((capped ? objective.ratio_cap : ratio) * advantage, logprob, false, false, capped);
}

// -r A + tau (log r)^2; the first is 0 where p - p_old is beyond -lo or hi, whatever the sign of A.
R1K_HOST_DEVICE SurrogateTerm ipo_term(const Objective& objective, float log_ratio, float advantage, float logprob) {
  const float up = std::exp(logprob) - std::exp(logprob - log_ratio);
  const bool high = up > objective.clip_high, low = up < -objective.clip_low;
  const float gain = high || low || advantage == 0 ? 0 : std::exp(log_ratio) * advantage;
  const float tau = advantage > 0 ? objective.tau_pos : objective.tau_neg;
  const float pull = tau == 0 ? 0 : tau * log_ratio;
  return {(pull == 0 ? 0 : pull * log_ratio) - gain, 2.0f * pull - gain, low && advantage != 0, high && advantage != 0, false};
}

// -sg[phi(w)] A l with log phi = tau + k log w - tau w, for w = prod_t r_t of the sequence within [1e-8, e^20].
R1K_HOST_DEVICE SurrogateTerm vespo_term(const Objective& objective, float log_ratio, float advantage, float logprob) {
  const float tau = advantage > 0 ? objective.tau_pos : objective.tau_neg;
  const double power = advantage > 0 ? objective.clip_high : objective.clip_low;
  const float low = -18.420680743952367f, high = 20.0f;
  const double log_w = log_ratio > high ? high : log_ratio < low ? low : log_ratio;
  const float phi = static_cast<float>(std::exp(tau + power * log_w - tau * std::exp(log_w)));
  return weighted_logprob(phi * advantage, logprob, false, false, false);
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

// The surrogates after `reinforce`.
R1K_RARE SurrogateTerm rare_term(const Objective& objective, float log_ratio, float advantage, float logprob) {
  if (objective.surrogate == Surrogate::ipo) return ipo_term(objective, log_ratio, advantage, logprob);
  if (advantage == 0) return {0, 0, false, false, false};
  if (objective.surrogate == Surrogate::vespo) return vespo_term(objective, log_ratio, advantage, logprob);
  return dppo_term(objective, log_ratio, advantage, logprob);
}

// `log_ratio` is l - l_old of the token, or its mean or sum over the sequence; the slope of `clip` and `sapo` is then
// with respect to that mean.
R1K_HOST_DEVICE SurrogateTerm surrogate_term(const Objective& objective, float log_ratio, float advantage,
                                             float logprob) {
  if (objective.surrogate > Surrogate::reinforce) return rare_term(objective, log_ratio, advantage, logprob);
  if (advantage == 0) return {0, 0, false, false, false};
  switch (objective.surrogate) {
    case Surrogate::clip: return clip_term(objective, std::exp(log_ratio), advantage);
    case Surrogate::cispo: return cispo_term(objective, std::exp(log_ratio), advantage, logprob);
    case Surrogate::sapo: return sapo_term(objective, std::exp(log_ratio), advantage);
    default: break;
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

// k + dk/dl, the slope of r k over r, without the cancellation of e^d.
R1K_HOST_DEVICE float kl_ratio_slope(int64_t estimator, float d) {
  return estimator == 1 ? 1.0f - d : estimator == 2 ? d * (0.5f * d - 1.0f) : -d;
}

// ---- what the tokens of a sequence share -------------------------------------------------------------------

R1K_HOST_DEVICE bool of_sequences(Ratio ratio) { return ratio != Ratio::token; }

// The sequence's ratio has a gradient, which reaches each of its tokens alike: the surrogate's ...
R1K_HOST_DEVICE bool shares_surrogate(const Objective& objective) {
  return objective.ratio == Ratio::sequence &&
         (objective.surrogate == Surrogate::clip || objective.surrogate == Surrogate::sapo);
}
// ... and that of the KL term.
R1K_HOST_DEVICE bool shares_kl(const Objective& objective) {
  return objective.ratio == Ratio::sequence && objective.kl_ratio && objective.kl_coef != 0;
}

}  // namespace r1k
