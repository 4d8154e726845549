// The CUDA operators that touch the vocabulary axis, over PyTorch's stable ABI: check, allocate, launch, register.
// Checks look at shapes, dtypes and devices: values are on the device, and stay there.

#include "bindings_cuda.h"
#include "cuda/token_stats.h"
#include "cuda/token_stats_backward.h"

namespace {

using namespace r1k::bindings;

std::tuple<Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor token_ids, MaybeTensor mask, double temperature,
                                               MaybeTensor temperatures, bool exact) {
  const std::vector<int64_t> sizes = leading_sizes(logits);
  const int64_t count = token_ids.numel();
  Tensor logprobs = empty(logits, sizes, ScalarType::Float);
  Tensor lse = empty(logits, sizes, ScalarType::Double);
  Tensor entropy = empty(logits, sizes, ScalarType::Double);
  R1K_CHECK(logprobs.numel() == count, "token_ids must have the shape of logits without its last dimension");
  if (count == 0) return {logprobs, lse, entropy};

  r1k::gpu::TokenStats args;
  args.logits = merged_rows(logits);
  args.count = count;
  args.exact = exact;
  check_grid(count, args.logits.vocab);
  args.token_ids = device_ints(logits, token_ids, "token_ids", count);
  args.mask = device_bools(logits, mask, "mask", count);
  args.temperature = {temperature, device_floats(logits, temperatures, "temperatures", count)};
  Tensor partials = empty(logits, {count, r1k::gpu::segments_of(args.logits.vocab), 4}, ScalarType::Float);
  args.partials = static_cast<r1k::gpu::SegmentSums*>(partials.data_ptr());
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.lse = static_cast<double*>(lse.data_ptr());
  args.entropy = static_cast<double*>(entropy.data_ptr());
  const OnStream on(logits);
  launch_token_stats(args, on.stream);
  return {logprobs, lse, entropy};
}

// All of `args` but where the result goes.
r1k::gpu::TokenStatsBackward backward_args(const Tensor& logits, const Tensor& token_ids, const Tensor& lse,
                                           const Tensor& entropy, const MaybeTensor& grad_logprobs,
                                           const MaybeTensor& grad_entropy, double temperature) {
  const int64_t count = token_ids.numel();
  r1k::gpu::TokenStatsBackward args = {};
  args.logits = merged_rows(logits);
  R1K_CHECK(logits.numel() == count * args.logits.vocab,
            "token_ids must have the shape of logits without its last dimension");
  args.tokens = args.count = count;
  check_grid(count, args.logits.vocab);
  args.token_ids = device_ints(logits, token_ids, "token_ids", count);
  args.lse = device_doubles(logits, lse, "lse", count);
  args.entropy = device_doubles(logits, entropy, "entropy", count);
  args.grad_logprobs = device_floats(logits, grad_logprobs, "grad_logprobs", count);
  args.grad_entropy = device_floats(logits, grad_entropy, "grad_entropy", count);
  args.temperature = {temperature, nullptr};
  return args;
}

Tensor token_stats_backward(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, MaybeTensor grad_logprobs,
                            MaybeTensor grad_entropy, double temperature) {
  Tensor grad_logits = empty(logits, sizes_of(logits), logits.scalar_type());
  r1k::gpu::TokenStatsBackward args =
      backward_args(logits, token_ids, lse, entropy, grad_logprobs, grad_entropy, temperature);
  if (args.count == 0) return grad_logits;
  args.out = merged_rows(grad_logits);
  const OnStream on(logits);
  launch_token_stats_backward(args, on.stream);
  return grad_logits;
}

void token_stats_backward_out(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, MaybeTensor grad_logprobs,
                              MaybeTensor grad_entropy, double temperature, MaybeTensor temperatures, double softcap,
                              MaybeTensor rows, Tensor out) {
  const int64_t count = token_ids.numel();
  R1K_CHECK(!rows.has_value() || rows->dim() == 1, "rows has ", rows->dim(), " dimensions, expected 1");
  const int64_t row_count = rows.has_value() ? rows->numel() : count;
  if (row_count == 0) return;
  r1k::gpu::TokenStatsBackward args =
      backward_args(logits, token_ids, lse, entropy, grad_logprobs, grad_entropy, temperature);
  args.temperature.factors = device_floats(logits, temperatures, "temperatures", count);
  args.inv_softcap = softcap > 0 ? static_cast<float>(1 / softcap) : 0;
  check_device(logits, "out", out);
  args.out = merged_rows(out);
  R1K_CHECK(logits.dim() == 2 && out.dim() == 2 && out.size(1) == logits.size(1) && args.out.vocab_stride == 1 &&
                (rows.has_value() ? out.size(0) >= row_count : out.size(0) == count),
            "out must be (N, V) like logits, with adjacent columns");
  R1K_CHECK(args.out.dtype == args.logits.dtype || args.logits.dtype == r1k::DType::float32,
            "out must have the dtype of logits, or a narrower one of float32 logits");
  if (overlap(args.logits, args.out)) {
    R1K_CHECK(!rows.has_value(), "rows was given with an out in the memory of logits, expected memory of its own");
    R1K_CHECK(same_row_starts(args.logits, args.out) && args.logits.vocab_stride == 1,
              "out overlaps logits, expected memory of its own, or that of logits row for row");
    args.narrower_in_place = args.out.dtype != args.logits.dtype;
  }
  if (rows.has_value()) {
    R1K_CHECK(row_count <= count, "rows holds ", row_count, " indices, expected at most N = ", count);
    args.rows = device_ints(logits, *rows, "rows", row_count);
    args.count = row_count;
  }
  const OnStream on(logits);
  launch_token_stats_backward(args, on.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels_cuda, R1K_CUDA_KEY, m) {
  m.impl("token_stats", TORCH_BOX(&token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward));
  m.impl("token_stats_backward_out", TORCH_BOX(&token_stats_backward_out));
}
