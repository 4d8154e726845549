// The GRPO step in two reads and one write of the logits, on raw device pointers.
#pragma once

#include "cuda/grpo_step.h"
#include "cuda/token_stats.h"

namespace r1k {
namespace gpu {

// Memory between the passes, beside the slopes and the scratch of args.policy.
struct GrpoPasses {
  SegmentSums* partials;  // [N, segments]
  double* lse;            // [N]
  double* entropy;        // [N]
};

void launch_grpo_passes(const GrpoStepArgs& args, const GrpoPasses& passes, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
