// CUDA operators of policy gradients over tokens and rewards: check, allocate, launch, register.

#include "bindings_cuda_policy.h"
#include "cuda/group_advantages.h"
#include "cuda/policy_loss.h"

namespace {

using namespace r1k::bindings;
namespace gpu = r1k::gpu;

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor logprobs, Tensor advantages, MaybeTensor old_logprobs, MaybeTensor ref_logprobs, MaybeTensor entropy,
    MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor importance_weights, MaybeTensor normalizer,
    int64_t surrogate, int64_t ratio, int64_t kl, int64_t aggregate, double clip_low, double clip_high,
    double ratio_cap, double tau_pos, double tau_neg, double kl_coef, double entropy_coef, double max_length) {
  const std::vector<int64_t> shape = sizes_of(logprobs);
  const int64_t count = logprobs.numel();
  const r1k::Objective objective =
      objective_of(surrogate, static_cast<r1k::Ratio>(ratio), kl, aggregate, clip_low, clip_high, ratio_cap, tau_pos,
                   tau_neg, kl_coef, entropy_coef, max_length);
  gpu::PolicyLossArgs args = policy_args(objective, logprobs, advantages, old_logprobs, ref_logprobs, mask, cu_seqlens,
                                         importance_weights, normalizer);
  args.entropy = device_floats(logprobs, entropy, "entropy", count);

  const bool with_entropy = entropy_coef != 0;
  const OnStream on(logprobs);
  Tensor loss = empty(logprobs, {}, ScalarType::Float);
  Tensor grad_logprobs = empty(logprobs, shape, ScalarType::Float);
  Tensor grad_entropy = empty(logprobs, with_entropy ? shape : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor metrics = empty(logprobs, {r1k::kMetricCount}, ScalarType::Float);
  Tensor scratch = empty(logprobs, {gpu::policy_loss_scratch(args)}, ScalarType::Double);
  args.loss = static_cast<float*>(loss.data_ptr());
  args.metrics = static_cast<float*>(metrics.data_ptr());
  args.grad_logprobs = static_cast<float*>(grad_logprobs.data_ptr());
  args.grad_entropy = with_entropy ? static_cast<float*>(grad_entropy.data_ptr()) : nullptr;
  args.scratch = static_cast<double*>(scratch.data_ptr());
  gpu::launch_policy_loss(args, on.stream);
  return {loss, grad_logprobs, grad_entropy, metrics};
}

struct Sorted {
  Tensor values, indices;
};

// torch.sort(x, stable=True)
Sorted sort_stably(const Tensor& x) {
  std::array<StableIValue, 4> stack = {
      torch::stable::detail::from(x), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor group_advantages(Tensor rewards, MaybeTensor group_ids, int64_t group_size, int64_t scale, int64_t ddof,
                        double eps) {
  const int64_t count = rewards.numel();
  R1K_CHECK(group_ids.has_value() || (group_size > 0 && count % group_size == 0), "group_size is ", group_size,
            ", expected a positive integer that divides the ", count, " rewards");
  R1K_CHECK(scale >= 0 && scale <= 2, "scale is ", scale, ", expected 0, 1 or 2");
  R1K_CHECK(!group_ids.has_value() || group_ids->dim() == 1, "group_ids must have 1 dimension, got ", group_ids->dim());
  gpu::GroupAdvantagesArgs args = {};
  args.count = count;
  args.rewards = device_floats(rewards, rewards, "rewards", count);
  args.group_size = group_size;
  args.scale = static_cast<gpu::AdvantageScale>(scale);
  args.ddof = ddof;
  args.eps = eps;
  device_ints(rewards, group_ids, "group_ids", count);

  const OnStream on(rewards);
  std::optional<Sorted> sorted;
  if (group_ids.has_value()) {
    sorted = sort_stably(*group_ids);
    args.sorted_ids = device_ints(rewards, sorted->values, "sorted group_ids", count);
    args.order = device_ints(rewards, sorted->indices, "order of group_ids", count);
  }
  Tensor advantages = empty(rewards, {count}, ScalarType::Float);
  Tensor scratch = empty(rewards, {gpu::group_advantages_scratch(args)}, ScalarType::Double);
  args.advantages = static_cast<float*>(advantages.data_ptr());
  args.scratch = static_cast<double*>(scratch.data_ptr());
  gpu::launch_group_advantages(args, on.stream);
  return advantages;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels_cuda, R1K_CUDA_KEY, m) {
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
}
