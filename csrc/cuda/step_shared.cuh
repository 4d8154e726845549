// What the blocks of a cluster share while they take a step: how it is laid out in shared memory, and when it is free.
#pragma once

#include "common/vocabulary.h"
#include "cuda/grpo_step.h"
#include "cuda/hopper.cuh"

namespace r1k {
namespace gpu {

constexpr int kVec = 16;          // bytes
constexpr int kMaxWarps = 15;     // that hold logits: with the one that plans, four for each scheduler
constexpr int kMaxCluster = 8;    // more is not portable
constexpr int kMaxParts = kMaxWarps * kMaxCluster;
constexpr int kUnroll = 2;        // vectors a lane holds at a time
constexpr int kGroup = kUnroll * kWarp;  // vectors a warp holds at a time
// Rows of which a block may hold sums or plans.  A warp publishes the sums of row q once its block has a plan for row
// q - 2, for which every block published row q - 2, after reading its plan for row q - 4: that slot is free everywhere.
constexpr int kDepth = 4;

enum class RowKind : int { zero, policy, policy_and_entropy };

// What becomes of a row, once its token's loss is known.
struct RowPlan {
  RowGradient row;
  float own;   // the gradient of the token's own entry
  RowKind kind;
  int64_t id;  // the token
};

struct StepShared {
  float sums[kDepth][kMaxParts][4];  // top, rest, weighted, count of each part of a row
  float own[kDepth];                 // the token's own logit
  RowPlan plan[kDepth];
  Barrier published[kDepth];         // sums and logit, by all warps of the cluster
  Barrier planned[kDepth];
};

struct Step {
  GrpoStepArgs args;
  StepTile tile;
};

__host__ __device__ constexpr size_t align_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

__host__ __device__ inline size_t rings_offset(const StepTile& tile) {
  return align_up(sizeof(StepShared) + sizeof(Barrier) * tile.warps * tile.slots, 128);
}

}  // namespace gpu
}  // namespace r1k
