// The whole policy loss in one pass over the tokens: loss, dL/dlogprob and dL/dentropy per token, all metrics.
// Nothing behind the mask is read into arithmetic.  Sums are double and ordered.

#include "policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace r1k {
namespace {

bool counts(const PolicyLossArgs& args, int64_t token) { return args.mask == nullptr || args.mask[token]; }

// Without old log-probs l - l: 0, unless l is NaN or infinite, which must not pass for on-policy.
float log_ratio(const PolicyLossArgs& args, int64_t token) {
  const float* const old = args.old_logprobs == nullptr ? args.logprobs : args.old_logprobs;
  return args.logprobs[token] - old[token];
}

bool has_gradient(const PolicyLossArgs& args, int64_t token) {
  return args.grad_logprobs[token] != 0 || (args.grad_entropy != nullptr && args.grad_entropy[token] != 0);
}

int64_t counted_in(const PolicyLossArgs& args, int64_t begin, int64_t end) {
  return args.mask == nullptr ? end - begin : std::count(args.mask + begin, args.mask + end, true);
}

SequenceSums one_sequence(const PolicyLossArgs& args, double denominator, int64_t sequence) {
  const Objective& objective = args.objective;
  const int64_t begin = args.begin(sequence), end = args.end(sequence);
  SequenceSums sums;
  sums.ratio_min = std::numeric_limits<float>::infinity();
  sums.ratio_max = -std::numeric_limits<float>::infinity();
  sums.tokens = counted_in(args, begin, end);

  const double length = static_cast<double>(std::max<int64_t>(sums.tokens, 1));
  const double weight = 1.0 / (objective.aggregate == Aggregate::sequence_mean ? denominator * length : denominator);

  // GSPO: every token carries the sequence's ratio exp(mean (l - l_old)).
  const bool sequence_ratio = objective.ratio == Ratio::sequence;
  float mean_log_ratio = 0;
  if (sequence_ratio) {
    double total = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (counts(args, t)) total += log_ratio(args, t);
    }
    mean_log_ratio = static_cast<float>(total / length);
  }
  // The ratio's derivative reaches every token of the sequence alike, so its slopes are summed before they are
  // handed out; CISPO's ratio is a constant and its slope stays the token's own.
  const bool shared_slope = sequence_ratio && objective.surrogate != Surrogate::cispo;
  double slope_sum = 0;

  for (int64_t t = begin; t < end; ++t) {
    args.grad_logprobs[t] = 0;
    if (args.grad_entropy != nullptr) args.grad_entropy[t] = 0;
    if (!counts(args, t)) continue;

    const float logprob = args.logprobs[t];
    const float delta = sequence_ratio ? mean_log_ratio : log_ratio(args, t);
    const double importance =
        args.importance_weights.data == nullptr ? 1.0 : args.importance_weights.at(t, sequence);
    // A weight of 0 rejects the token: its ratio may have overflowed, so it goes by the advantage, not by 0 * inf.
    const float advantage = importance == 0 ? 0.0f : args.advantages.at(t, sequence);
    const SurrogateTerm surrogate = surrogate_term(objective, delta, advantage, logprob);
    const double surrogate_loss = surrogate.loss == 0 ? 0 : importance * surrogate.loss;
    const double surrogate_slope = surrogate.slope == 0 ? 0 : importance * surrogate.slope;

    double loss = surrogate_loss, slope = surrogate_slope;
    if (shared_slope) {
      slope_sum += surrogate_slope;
      slope = 0;
    }
    if (args.ref_logprobs != nullptr) {
      const Term kl = kl_term(objective.kl, args.ref_logprobs[t] - logprob);
      sums.kl += kl.loss;
      if (objective.kl_coef != 0) {
        loss += static_cast<double>(objective.kl_coef) * kl.loss;
        slope += static_cast<double>(objective.kl_coef) * kl.slope;
      }
    }
    if (args.entropy != nullptr) {
      sums.entropy += args.entropy[t];
      if (objective.entropy_coef != 0) loss -= static_cast<double>(objective.entropy_coef) * args.entropy[t];
    }
    if (args.grad_entropy != nullptr) args.grad_entropy[t] = static_cast<float>(-weight * objective.entropy_coef);
    args.grad_logprobs[t] = static_cast<float>(weight * slope);

    if (!shared_slope) sums.active += has_gradient(args, t);

    const float ratio = std::exp(delta);
    sums.loss += weight * loss;
    sums.surrogate += weight * surrogate_loss;
    sums.ratio += ratio;
    sums.ratio_min = std::min(sums.ratio_min, ratio);
    sums.ratio_max = std::max(sums.ratio_max, ratio);
    sums.approx_kl += kl_term(3, delta).loss;  // k3 under the behaviour policy: r - 1 - log r
    sums.clip_low += surrogate.clipped_low;
    sums.clip_high += surrogate.clipped_high;
    sums.capped += surrogate.capped;
    sums.nonfinite += !(std::isfinite(loss) && std::isfinite(slope) && std::isfinite(surrogate_slope));
  }

  if (shared_slope) {
    const double shared = weight * slope_sum / length;
    for (int64_t t = begin; t < end; ++t) {
      if (!counts(args, t)) continue;
      args.grad_logprobs[t] = static_cast<float>(args.grad_logprobs[t] + shared);
      sums.active += has_gradient(args, t);
    }
  }
  return sums;
}

}  // namespace

int64_t counted_tokens(const PolicyLossArgs& args) { return counted_in(args, 0, args.tokens); }

double denominator(const PolicyLossArgs& args, int64_t counted) {
  if (args.normalizer != nullptr) return *args.normalizer;
  const double sequences = static_cast<double>(std::max<int64_t>(args.sequences, 1));
  switch (args.objective.aggregate) {
    case Aggregate::sequence_mean: return sequences;
    case Aggregate::token_mean: return static_cast<double>(std::max<int64_t>(counted, 1));
    case Aggregate::constant: return sequences * args.objective.max_length;
  }
  return 1;
}

void policy_loss_sequences(const PolicyLossArgs& args, double denominator, int64_t begin, int64_t end,
                           SequenceSums* sums) {
  for (int64_t s = begin; s < end; ++s) sums[s] = one_sequence(args, denominator, s);
}

void policy_loss_reduce(const PolicyLossArgs& args, const SequenceSums* sums, float* loss, float* metrics) {
  SequenceSums total;
  total.ratio_min = std::numeric_limits<float>::infinity();
  total.ratio_max = -std::numeric_limits<float>::infinity();
  for (int64_t s = 0; s < args.sequences; ++s) {
    total.loss += sums[s].loss;
    total.surrogate += sums[s].surrogate;
    total.kl += sums[s].kl;
    total.entropy += sums[s].entropy;
    total.ratio += sums[s].ratio;
    total.approx_kl += sums[s].approx_kl;
    total.ratio_min = std::min(total.ratio_min, sums[s].ratio_min);
    total.ratio_max = std::max(total.ratio_max, sums[s].ratio_max);
    total.tokens += sums[s].tokens;
    total.clip_low += sums[s].clip_low;
    total.clip_high += sums[s].clip_high;
    total.capped += sums[s].capped;
    total.active += sums[s].active;
    total.nonfinite += sums[s].nonfinite;
  }
  const bool empty = total.tokens == 0;
  const double per_token = empty ? 0 : 1.0 / static_cast<double>(total.tokens);
  *loss = static_cast<float>(total.loss);
  metrics[kTokens] = static_cast<float>(total.tokens);
  metrics[kSequences] = static_cast<float>(args.sequences);
  metrics[kSurrogate] = static_cast<float>(total.surrogate);
  metrics[kKl] = static_cast<float>(total.kl * per_token);
  metrics[kEntropy] = static_cast<float>(total.entropy * per_token);
  metrics[kRatioMean] = empty ? 1.0f : static_cast<float>(total.ratio * per_token);
  metrics[kRatioMin] = empty ? 1.0f : total.ratio_min;
  metrics[kRatioMax] = empty ? 1.0f : total.ratio_max;
  metrics[kApproxKl] = static_cast<float>(total.approx_kl * per_token);
  metrics[kClipFraction] =
      static_cast<float>(static_cast<double>(total.clip_low + total.clip_high + total.capped) * per_token);
  metrics[kClipLowFraction] = static_cast<float>(static_cast<double>(total.clip_low) * per_token);
  metrics[kClipHighFraction] = static_cast<float>(static_cast<double>(total.clip_high) * per_token);
  metrics[kRatioCapFraction] = static_cast<float>(static_cast<double>(total.capped) * per_token);
  metrics[kActiveFraction] = static_cast<float>(static_cast<double>(total.active) * per_token);
  metrics[kNonfiniteTokens] = static_cast<float>(total.nonfinite);
}

}  // namespace r1k
