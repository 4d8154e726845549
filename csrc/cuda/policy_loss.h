// Arguments of the fused policy loss on a GPU, on raw pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/policy_args.h"
#include "cuda/stream.h"

namespace r1k {
namespace gpu {

struct PolicyLossArgs : PolicyLossInputs {
  float* loss;                // []
  float* metrics;             // [kMetricCount]
  float* grad_logprobs;       // [N], or null: only the loss and its metrics
  float* grad_entropy;        // [N] or null (entropy_coef = 0)
  double* scratch;            // [policy_loss_scratch(args)]
};

int64_t policy_loss_scratch(const PolicyLossArgs& args);
void launch_policy_loss(const PolicyLossArgs& args, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
