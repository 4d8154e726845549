// Arguments of the fused GRPO step on NVIDIA GPUs, on raw device pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/row_view.h"
#include "cuda/policy_loss.h"
#include "cuda/stream.h"

namespace r1k {
namespace gpu {

struct GrpoStepArgs {
  RowView logits;            // merged
  RowView out;               // of the same shape and dtype; may be the logits themselves
  const int64_t* token_ids;  // [N]
  double temperature;
  PolicyLossArgs policy;     // of a ratio of single tokens; its logprobs and entropy are those below
  float* logprobs;           // [N]
  float* entropy;            // [N]
};

// Why a row goes through separate passes, which read the logits twice, and not through the fused kernel.  The numbers
// are those of r1kernels.ops.grpo_step.
enum class Unfused : int {
  none = 0,
  device = 1,   // it has no clusters of blocks, or little shared memory
  layout = 2,   // logits and gradients differ in memory layout, or in alignment to 16 bytes
  length = 3,   // fewer than two rows' parts fit into a processor's shared memory
  refused = 4,  // the CUDA runtime does not launch such clusters
};

// How a row is cut: a cluster of blocks takes it, each block a part.
struct StepTile {
  int cluster;         // blocks
  int part;            // vectors of 16 bytes of a block's part
  size_t shared;       // bytes of a block
  int blocks;          // for which a processor has the shared memory
  int clusters;        // that the device can run at the same time
  Unfused unfused;
};

// `cluster` is 1, 2, 4 or 8, or 0: the smallest with three blocks on a processor, or else the one with most.
StepTile step_tile(const RowView& logits, const RowView& out, int cluster, const Stream& stream);

// Doubles of scratch memory.
int64_t step_scratch(const GrpoStepArgs& args);

void launch_grpo_step(const GrpoStepArgs& args, const StepTile& tile, double* scratch, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
