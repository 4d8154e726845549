// The fused GRPO step on NVIDIA GPUs over PyTorch's stable ABI: check, allocate, launch, register.

#include "bindings_cuda.h"
#include "cuda/grpo_passes.h"
#include "cuda/grpo_step.h"

namespace {

using namespace r1k::bindings;

// One number per sequence, or per token; per sequence where packed tokens are as many as their sequences.
r1k::gpu::Broadcast broadcast(const Tensor& logits, const MaybeTensor& tensor, const char* name,
                              const r1k::gpu::PolicyLossArgs& args) {
  if (!tensor.has_value()) return {nullptr, false};
  const bool per_token = tensor->dim() == logits.dim() - 1 && tensor->numel() == args.tokens;
  const bool per_sequence = !per_token || (args.cu_seqlens != nullptr && tensor->numel() == args.sequences);
  return {device_floats(logits, tensor, name, per_sequence ? args.sequences : args.tokens), per_sequence};
}

// Two reads of the logits, for rows or devices that the fused kernel cannot take.
void run_passes(r1k::gpu::GrpoStepArgs& args, const Tensor& logits, const r1k::gpu::Stream& stream) {
  const int64_t count = args.policy.tokens;
  const Tensor partials = empty(logits, {count, r1k::gpu::segments_of(args.logits.vocab), 4}, ScalarType::Float);
  const Tensor statistics = empty(logits, {2, count}, ScalarType::Double);
  const Tensor slopes = empty(logits, {2, count}, ScalarType::Float);
  const Tensor scratch = empty(logits, {r1k::gpu::policy_loss_scratch(args.policy)}, ScalarType::Double);
  r1k::gpu::GrpoPasses passes;
  passes.partials = static_cast<r1k::gpu::SegmentSums*>(partials.data_ptr());
  passes.lse = static_cast<double*>(statistics.data_ptr());
  passes.entropy = passes.lse + count;
  args.policy.grad_logprobs = static_cast<float*>(slopes.data_ptr());
  args.policy.grad_entropy = args.policy.objective.entropy_coef != 0 ? args.policy.grad_logprobs + count : nullptr;
  args.policy.scratch = static_cast<double*>(scratch.data_ptr());
  r1k::gpu::launch_grpo_passes(args, passes, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_step(
    Tensor logits, Tensor token_ids, Tensor advantages, MaybeTensor old_logprobs, MaybeTensor ref_logprobs,
    MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor importance_weights, MaybeTensor normalizer,
    double temperature, int64_t surrogate, int64_t kl, int64_t aggregate, double clip_low, double clip_high,
    double ratio_cap, double tau_pos, double tau_neg, double kl_coef, double entropy_coef, double max_length,
    std::vector<int64_t> tile, Tensor grad_logits) {
  const std::vector<int64_t> shape = leading_sizes(logits);
  Tensor loss = empty(logits, {}, ScalarType::Float);
  Tensor metrics = empty(logits, {r1k::kMetricCount}, ScalarType::Float);
  Tensor logprobs = empty(logits, shape, ScalarType::Float);
  Tensor entropy = empty(logits, shape, ScalarType::Float);
  const int64_t count = logprobs.numel();

  R1K_CHECK(!shape.empty(), "logits must be (B, T, V), or (N, V) with cu_seqlens");
  R1K_CHECK(sizes_of(grad_logits) == sizes_of(logits) && grad_logits.scalar_type() == logits.scalar_type(),
            "grad_logits must have the shape and dtype of logits");
  R1K_CHECK(grad_logits.stride(grad_logits.dim() - 1) == 1 || grad_logits.size(grad_logits.dim() - 1) <= 1,
            "grad_logits must have adjacent entries over the vocabulary");
  check_device(logits, "grad_logits", grad_logits);
  R1K_CHECK(tile.empty() || (tile.size() == 3 && tile[0] > 0 && tile[0] <= 8 && tile[1] > 0 && tile[1] <= 15 &&
                             tile[2] > 0 && tile[2] <= 4096),
            "tile must be [blocks of a cluster, warps, vectors of a chunk] within [8, 15, 4096]");

  r1k::gpu::GrpoStepArgs args;
  args.logits = merged_rows(logits);
  args.out = merged_rows(grad_logits);
  args.token_ids = device_ints(logits, token_ids, "token_ids", count);
  args.temperature = temperature;
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.entropy = static_cast<float*>(entropy.data_ptr());
  r1k::gpu::PolicyLossArgs& policy = args.policy;
  policy = {};
  policy.objective = {static_cast<r1k::Surrogate>(surrogate),
                      r1k::Ratio::token,
                      kl,
                      static_cast<r1k::Aggregate>(aggregate),
                      static_cast<float>(clip_low),
                      static_cast<float>(clip_high),
                      static_cast<float>(ratio_cap),
                      static_cast<float>(tau_pos),
                      static_cast<float>(tau_neg),
                      static_cast<float>(kl_coef),
                      static_cast<float>(entropy_coef),
                      max_length};
  policy.tokens = count;
  policy.length = shape.back();
  policy.sequences = 1;
  for (size_t k = 0; k + 1 < shape.size(); ++k) policy.sequences *= shape[k];
  if (cu_seqlens.has_value()) policy.sequences = cu_seqlens->numel() - 1;
  policy.cu_seqlens = device_ints(logits, cu_seqlens, "cu_seqlens", policy.sequences + 1);
  policy.logprobs = args.logprobs;
  policy.old_logprobs = device_floats(logits, old_logprobs, "old_logprobs", count);
  policy.ref_logprobs = device_floats(logits, ref_logprobs, "ref_logprobs", count);
  policy.entropy = args.entropy;
  policy.mask = device_bools(logits, mask, "mask", count);
  policy.advantages = broadcast(logits, advantages, "advantages", policy);
  policy.importance_weights = broadcast(logits, importance_weights, "importance_weights", policy);
  policy.normalizer = device_floats(logits, normalizer, "normalizer", 1);
  policy.loss = static_cast<float*>(loss.data_ptr());
  policy.metrics = static_cast<float*>(metrics.data_ptr());

  const OnStream on(logits);
  const r1k::gpu::StepTile chosen = r1k::gpu::step_tile(args, tile, on.stream);
  R1K_CHECK(tile.empty() || chosen.clusters > 0, "a row does not fit tile [", tile[0], ", ", tile[1], ", ", tile[2],
            "] on this device");
  if (chosen.clusters == 0) {
    run_passes(args, logits, on.stream);
  } else {
    const int64_t doubles = static_cast<int64_t>(r1k::gpu::step_scratch(chosen) / sizeof(double));
    const Tensor scratch = empty(logits, {doubles}, ScalarType::Double);
    r1k::gpu::launch_grpo_step(args, chosen, scratch.data_ptr(), on.stream);
  }
  return {loss, metrics, logprobs, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels_cuda, R1K_CUDA_KEY, m) { m.impl("grpo_step", TORCH_BOX(&grpo_step)); }
