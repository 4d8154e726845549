// The fused GRPO step on NVIDIA GPUs over PyTorch's stable ABI: check, allocate, launch, register.

#include <cmath>

#include "bindings_cuda_policy.h"
#include "cuda/grpo_passes.h"
#include "cuda/grpo_step.h"

namespace {

using namespace r1k::bindings;

void check_tile(const std::vector<int64_t>& tile) {
  R1K_CHECK(tile.empty() || (tile.size() == 1 && tile[0] > 0 && tile[0] <= 8 && (tile[0] & (tile[0] - 1)) == 0),
            "tile must be [blocks of a cluster], which is 1, 2, 4 or 8, or empty");
}

// What was asked for must be possible; what the library chooses may be separate passes.
r1k::gpu::StepTile chosen_tile(const r1k::RowView& logits, const r1k::RowView& out, const std::vector<int64_t>& tile,
                               const r1k::gpu::Stream& stream) {
  const int cluster = tile.empty() ? 0 : static_cast<int>(tile[0]);
  const r1k::gpu::StepTile chosen = r1k::gpu::step_tile(logits, out, cluster, stream);
  R1K_CHECK(tile.empty() || chosen.unfused == r1k::gpu::Unfused::none, "a row does not fit a cluster of ", cluster,
            " blocks on this device");
  return chosen;
}

// Blocks of a cluster, blocks for which a processor has the shared memory, clusters at once, why the step is not fused.
std::tuple<int64_t, int64_t, int64_t, int64_t> grpo_step_tile(Tensor logits, Tensor grad_logits) {
  check_device(logits, "grad_logits", grad_logits);
  const OnStream on(logits);
  const r1k::gpu::StepTile tile = r1k::gpu::step_tile(merged_rows(logits), merged_rows(grad_logits), 0, on.stream);
  return {tile.cluster, tile.blocks, tile.clusters, static_cast<int64_t>(tile.unfused)};
}

// Two reads of the logits, for rows or devices that the fused kernel cannot take.
void run_passes(r1k::gpu::GrpoStepArgs& args, const Tensor& logits, const r1k::gpu::Stream& stream) {
  const int64_t count = args.policy.tokens;
  check_grid(count, args.logits.vocab);
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
  check_tile(tile);

  r1k::gpu::GrpoStepArgs args;
  args.logits = merged_rows(logits);
  args.out = merged_rows(grad_logits);
  R1K_CHECK(!overlap(args.logits, args.out) ||
                (same_row_starts(args.logits, args.out) && args.logits.vocab_stride == 1),
            "grad_logits overlaps logits, expected memory of its own, or that of logits row for row");
  R1K_CHECK(temperature > 0 && std::isfinite(temperature), "temperature is ", temperature,
            ", expected a positive finite number");
  args.token_ids = device_ints(logits, token_ids, "token_ids", count);
  args.temperature = temperature;
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.entropy = static_cast<float*>(entropy.data_ptr());
  args.policy = policy_args(objective_of(surrogate, r1k::Ratio::token, kl, aggregate, clip_low, clip_high, ratio_cap,
                                         tau_pos, tau_neg, kl_coef, entropy_coef, max_length),
                            logprobs, advantages, old_logprobs, ref_logprobs, mask, cu_seqlens, importance_weights,
                            normalizer);
  args.policy.entropy = args.entropy;
  args.policy.loss = static_cast<float*>(loss.data_ptr());
  args.policy.metrics = static_cast<float*>(metrics.data_ptr());

  const OnStream on(logits);
  const r1k::gpu::StepTile chosen = chosen_tile(args.logits, args.out, tile, on.stream);
  if (chosen.unfused != r1k::gpu::Unfused::none) {
    run_passes(args, logits, on.stream);
  } else {
    check_grid(count, args.logits.vocab);
    const Tensor scratch = empty(logits, {r1k::gpu::step_scratch(args)}, ScalarType::Double);
    r1k::gpu::launch_grpo_step(args, chosen, static_cast<double*>(scratch.data_ptr()), on.stream);
  }
  return {loss, metrics, logprobs, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels_cuda, R1K_CUDA_KEY, m) {
  m.impl("grpo_step", TORCH_BOX(&grpo_step));
  m.impl("grpo_step_tile", TORCH_BOX(&grpo_step_tile));
}
