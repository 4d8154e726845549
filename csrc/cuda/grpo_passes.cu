// What grpo_step.cu does in one launch, for rows that are too long for the shared memory of a cluster, rows whose
// gradients lie otherwise than their logits, and devices without clusters: statistics, policy loss, gradient.

#include "cuda/grpo_passes.h"

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/token_stats_backward.h"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) narrow_kernel(const double* from, float* to, int64_t count) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n < count) to[n] = static_cast<float>(from[n]);
}

}  // namespace

void launch_grpo_passes(const GrpoStepArgs& args, const GrpoPasses& passes, const Stream& stream) {
  const PolicyLossArgs& policy = args.policy;
  const Temperature temperature = {args.temperature, nullptr};
  const int64_t count = policy.tokens;
  launch_token_stats({args.logits, count, args.token_ids, policy.mask, temperature, passes.partials, args.logprobs,
                      passes.lse, passes.entropy},
                     stream);
  launch(narrow_kernel, {(count + kThreads - 1) / kThreads, kThreads}, stream, passes.entropy, args.entropy, count);
  launch_policy_loss(policy, stream);
  TokenStatsBackward backward = {};
  backward.logits = args.logits;
  backward.tokens = backward.count = count;
  backward.token_ids = args.token_ids;
  backward.lse = passes.lse;
  backward.entropy = passes.entropy;
  backward.grad_logprobs = policy.grad_logprobs;
  backward.grad_entropy = policy.grad_entropy;
  backward.temperature = temperature;
  backward.out = args.out;
  launch_token_stats_backward(backward, stream);
}

}  // namespace gpu
}  // namespace r1k
