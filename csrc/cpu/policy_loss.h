// Arguments of the fused policy loss on the CPU, on raw pointers.
#pragma once

#include <cstdint>

#include "../common/objective.h"

namespace r1k {

// Per token, per sequence, or absent (data == nullptr).
struct Broadcast {
  const float* data;
  bool per_sequence;
  float at(int64_t token, int64_t sequence) const { return data[per_sequence ? sequence : token]; }
};

struct PolicyLossArgs {
  Objective objective;
  int64_t tokens;
  int64_t sequences;
  int64_t length;             // T of a (B, T) batch; unused when cu_seqlens is given
  const int64_t* cu_seqlens;  // [S + 1] or null
  const float* logprobs;
  const float* old_logprobs;  // null: on-policy, the ratio is exactly 1
  const float* ref_logprobs;  // null: no KL
  const float* entropy;       // null: not measured
  const bool* mask;           // null: every token counts
  Broadcast advantages;
  Broadcast importance_weights;
  const float* normalizer;    // null: the aggregate's own denominator
  float* grad_logprobs;       // [N]
  float* grad_entropy;        // [N] or null (entropy_coef = 0)

  int64_t begin(int64_t s) const { return cu_seqlens != nullptr ? cu_seqlens[s] : s * length; }
  int64_t end(int64_t s) const { return cu_seqlens != nullptr ? cu_seqlens[s + 1] : (s + 1) * length; }
};

// Sums over the counted tokens of one sequence, added up in sequence order afterwards: the result does not
// depend on the number of threads.
struct SequenceSums {
  double loss = 0, surrogate = 0, kl = 0, entropy = 0, ratio = 0, approx_kl = 0;
  float ratio_min, ratio_max;
  int64_t tokens = 0, clip_low = 0, clip_high = 0, capped = 0, active = 0, nonfinite = 0;
};

int64_t counted_tokens(const PolicyLossArgs& args);
double denominator(const PolicyLossArgs& args, int64_t counted);
void policy_loss_sequences(const PolicyLossArgs& args, double denominator, int64_t begin, int64_t end,
                           SequenceSums* sums);
void policy_loss_reduce(const PolicyLossArgs& args, const SequenceSums* sums, float* loss, float* metrics);

}  // namespace r1k
