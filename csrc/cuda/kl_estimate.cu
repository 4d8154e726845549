// KL estimators of single tokens and their derivatives, element by element: one read of both log-probs, one write.
// The arithmetic is that of csrc/common/objective.h, as in the policy loss.

#include "cuda/kl_estimate.h"

#include "common/objective.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

__global__ void __launch_bounds__(kThreads) kl_kernel(const __grid_constant__ KlEstimate args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < args.count; n += step) {
    const Term term = kl_term(args.estimator, args.ref_logprobs[n] - args.logprobs[n]);
    args.kl[n] = term.loss;
    args.slope[n] = term.slope;
  }
}

}  // namespace

void launch_kl_estimate(const KlEstimate& args, const Stream& stream) {
  const int64_t blocks = (args.count + kThreads - 1) / kThreads;
  launch(kl_kernel, {blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads}, stream, args);
}

}  // namespace gpu
}  // namespace r1k
