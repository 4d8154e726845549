// The whole policy loss in one pass over the tokens: loss, dL/dlogprob and dL/dentropy per token, all metrics.
// Nothing behind the mask is read into arithmetic.  Sums are double and ordered.

#include "policy_loss.h"

#include <algorithm>
#include <cmath>

namespace r1k {
namespace {

bool counts(const PolicyLossArgs& args, int64_t token) { return args.mask == nullptr || args.mask[token]; }

// Without old log-probs l - l: 0, unless l is NaN or infinite, which must not pass for on-policy.
float log_ratio(const PolicyLossArgs& args, int64_t token) {
  const float* const old = args.old_logprobs == nullptr ? args.logprobs : args.old_logprobs;
  return args.logprobs[token] - old[token];
}

int64_t counted_in(const PolicyLossArgs& args, int64_t begin, int64_t end) {
  return args.mask == nullptr ? end - begin : std::count(args.mask + begin, args.mask + end, true);
}

PolicySums one_sequence(const PolicyLossArgs& args, double denominator, int64_t sequence) {
  const Objective& objective = args.objective;
  const int64_t begin = args.begin(sequence), end = args.end(sequence);
  const int64_t counted = counted_in(args, begin, end);
  const double length = static_cast<double>(std::max<int64_t>(counted, 1));
  const double weight = 1.0 / (objective.aggregate == Aggregate::sequence_mean ? denominator * length : denominator);

  // GSPO: every token carries the sequence's ratio exp(mean (l - l_old)); VESPO: the product of the ratios.
  const bool sequence_ratio = of_sequences(objective.ratio);
  float sequence_log_ratio = 0;
  if (sequence_ratio) {
    double total = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (counts(args, t)) total += log_ratio(args, t);
    }
    sequence_log_ratio = static_cast<float>(objective.ratio == Ratio::sequence_product ? total : total / length);
  }
  const auto token_at = [&](int64_t t) {
    PolicyToken token;
    token.weight = weight;
    token.logprob = args.logprobs[t];
    token.log_ratio = sequence_ratio ? sequence_log_ratio : log_ratio(args, t);
    token.has_ref = args.ref_logprobs != nullptr;
    token.ref = token.has_ref ? args.ref_logprobs[t] : 0;
    token.entropy = args.entropy != nullptr ? args.entropy[t] : 0;
    token.advantage = args.advantages.at(t, sequence);
    token.importance = args.importance_weights.data == nullptr ? 1 : args.importance_weights.at(t, sequence);
    return token;
  };

  // The ratio's derivative reaches every token of the sequence alike, so its slopes are summed before they are
  // handed out; a ratio that is a constant has none.
  const bool shared_slope =
      shares_surrogate(objective) || (shares_kl(objective) && args.ref_logprobs != nullptr);
  double slope_sum = 0;
  for (int64_t t = begin; shared_slope && t < end; ++t) {
    if (!counts(args, t)) continue;
    slope_sum += shared_slope_of(objective, token_at(t));
  }

  PolicySums sums;
  for (int64_t t = begin; t < end; ++t) {
    PolicyGradient gradient = {0, 0};
    if (counts(args, t)) gradient = add_token(sums, objective, token_at(t), shared_slope, slope_sum / length);
    args.grad_logprobs[t] = gradient.g;
    if (args.grad_entropy != nullptr) args.grad_entropy[t] = gradient.eta;
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
                           PolicySums* sums) {
  for (int64_t s = begin; s < end; ++s) sums[s] = one_sequence(args, denominator, s);
}

void policy_loss_reduce(const PolicyLossArgs& args, const PolicySums* sums, float* loss, float* metrics) {
  PolicySums total;
  for (int64_t s = 0; s < args.sequences; ++s) total.merge(sums[s]);
  finish(total, args.sequences, loss, metrics);
}

}  // namespace r1k
