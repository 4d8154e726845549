// Arguments of the fused policy loss on a GPU, on raw pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/objective.h"
#include "cuda/stream.h"

namespace r1k {
namespace gpu {

// Per token, per sequence, or absent (data == nullptr).
struct Broadcast {
  const float* data;
  bool per_sequence;
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
  float* loss;                // []
  float* metrics;             // [kMetricCount]
  float* grad_logprobs;       // [N]
  float* grad_entropy;        // [N] or null (entropy_coef = 0)
  double* scratch;            // [policy_loss_scratch(args)]
};

int64_t policy_loss_scratch(const PolicyLossArgs& args);
void launch_policy_loss(const PolicyLossArgs& args, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
