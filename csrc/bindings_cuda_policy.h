// The arguments of a policy loss on CUDA tensors, checked: for the loss itself and for the fused step.
#pragma once

#include "bindings_cuda.h"
#include "cuda/policy_loss.h"

namespace r1k {
namespace bindings {

// Packed tokens may be as many as their sequences (some are empty then, or all hold one): per sequence it is.
inline Broadcast broadcast(const MaybeTensor& tensor, const char* name, const Tensor& logprobs,
                                const gpu::PolicyLossArgs& args) {
  if (!tensor.has_value()) return {nullptr, false};
  const bool per_token = tensor->dim() == logprobs.dim() && tensor->numel() == args.tokens;
  const bool per_sequence = !per_token || (args.cu_seqlens != nullptr && tensor->numel() == args.sequences);
  return {device_floats(logprobs, tensor, name, per_sequence ? args.sequences : args.tokens), per_sequence};
}

// All that is given; log-probs are of this shape, (B, T) or packed (N,).
inline gpu::PolicyLossArgs policy_args(const Objective& objective, const Tensor& logprobs, const Tensor& advantages,
                                       const MaybeTensor& old_logprobs, const MaybeTensor& ref_logprobs,
                                       const MaybeTensor& mask, const MaybeTensor& cu_seqlens,
                                       const MaybeTensor& importance_weights, const MaybeTensor& normalizer) {
  const std::vector<int64_t> shape = sizes_of(logprobs);
  R1K_CHECK(!shape.empty(), "logprobs must be (..., T), or (N,) with cu_seqlens, got 0 dimensions");
  gpu::PolicyLossArgs args = {};
  args.objective = objective;
  args.tokens = logprobs.numel();
  args.length = shape.back();
  args.sequences = 1;
  if (cu_seqlens.has_value()) {
    args.sequences = sequences_of(*cu_seqlens);
    args.cu_seqlens = device_ints(logprobs, cu_seqlens, "cu_seqlens", args.sequences + 1);
    R1K_CHECK(args.sequences > 0 || args.tokens == 0,
              "cu_seqlens holds one number, expected it to run from 0 to N = ", args.tokens);
  } else {
    for (size_t k = 0; k + 1 < shape.size(); ++k) args.sequences *= shape[k];
  }
  args.logprobs = device_floats(logprobs, logprobs, "logprobs", args.tokens);
  args.old_logprobs = device_floats(logprobs, old_logprobs, "old_logprobs", args.tokens);
  args.ref_logprobs = device_floats(logprobs, ref_logprobs, "ref_logprobs", args.tokens);
  args.mask = device_bools(logprobs, mask, "mask", args.tokens);
  args.advantages = broadcast(advantages, "advantages", logprobs, args);
  args.importance_weights = broadcast(importance_weights, "importance_weights", logprobs, args);
  args.normalizer = device_floats(logprobs, normalizer, "normalizer", 1);
  return args;
}

}  // namespace bindings
}  // namespace r1k
