// Arguments of the fused GRPO step on NVIDIA GPUs, on raw device pointers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

// How the rows of a launch are cut.  A row belongs to the blocks of one cluster; each of their warps keeps its part of
// the row, and what fits of the next ones, in a ring of chunks in shared memory.
struct StepTile {
  int cluster;    // blocks
  int warps;      // that hold logits; one more in each block does the arithmetic of tokens
  int chunk;      // vectors of 16 bytes
  int slots;      // chunks of a ring
  int chunks;     // of a warp's part of a row
  int part;       // vectors of a warp's part
  int lookahead;  // rows whose sums are taken before the gradient of the one before: 1, or 0 where rings are short
  int clusters;   // that run at once; 0: the row does not fit, or the device has no clusters
  size_t shared;  // bytes of a block
};

// `wanted` is {cluster, warps, chunk}, or empty.
StepTile step_tile(const GrpoStepArgs& args, const std::vector<int64_t>& wanted, const Stream& stream);

// Bytes of scratch memory, aligned to 8.
size_t step_scratch(const StepTile& tile);

void launch_grpo_step(const GrpoStepArgs& args, const StepTile& tile, void* scratch, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
