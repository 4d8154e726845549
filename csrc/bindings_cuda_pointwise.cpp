// CUDA operators that go through tensors element by element: check, allocate, launch, register.

#include <string>

#include "bindings_cuda.h"
#include "cuda/kl_estimate.h"
#include "cuda/scaled.h"

namespace {

using namespace r1k::bindings;

std::tuple<Tensor, Tensor> kl_estimate(Tensor logprobs, Tensor ref_logprobs, int64_t estimator) {
  const int64_t count = logprobs.numel();
  R1K_CHECK(estimator >= 1 && estimator <= 3, "estimator is ", estimator, ", expected 1, 2 or 3");
  Tensor kl = empty(logprobs, sizes_of(logprobs), ScalarType::Float);
  Tensor slope = empty(logprobs, sizes_of(logprobs), ScalarType::Float);
  r1k::gpu::KlEstimate args;
  args.count = count;
  args.logprobs = floats(logprobs, "logprobs", count);
  args.ref_logprobs = device_floats(logprobs, ref_logprobs, "ref_logprobs", count);
  args.estimator = estimator;
  args.kl = static_cast<float*>(kl.data_ptr());
  args.slope = static_cast<float*>(slope.data_ptr());
  if (count == 0) return {kl, slope};
  const OnStream on(logprobs);
  launch_kl_estimate(args, on.stream);
  return {kl, slope};
}

std::string strides_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t k = 0; k < tensor.dim(); ++k) text += (k ? ", " : "") + std::to_string(tensor.stride(k));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

void check_vectors(const char* name, const Tensor& tensor) {
  R1K_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, name, " has strides ",
            strides_of(tensor), ", expected contiguous memory aligned to 16 bytes");
}

void scaled(Tensor grad, Tensor factor, Tensor out, bool accumulate) {
  r1k::gpu::Scaled args;
  args.count = grad.numel();
  args.grad = grad.data_ptr();
  args.grad_dtype = dtype_of(grad, "grad");
  args.factor = device_floats(grad, factor, "factor", 1);
  args.out = out.data_ptr();
  args.out_dtype = dtype_of(out, "out");
  args.accumulate = accumulate;
  check_device(grad, "out", out);
  R1K_CHECK(out.numel() == args.count, "out holds ", out.numel(), " elements, expected ", args.count, " as grad does");
  R1K_CHECK(args.grad_dtype == args.out_dtype || args.grad_dtype == r1k::DType::float32 ||
                args.out_dtype == r1k::DType::float32,
            "grad and out must have one dtype, or one of them float32");
  check_vectors("grad", grad);
  check_vectors("out", out);
  if (args.count == 0) return;
  const OnStream on(grad);
  launch_scaled(args, on.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels_cuda, R1K_CUDA_KEY, m) {
  m.impl("kl_estimate", TORCH_BOX(&kl_estimate));
  m.impl("scaled", TORCH_BOX(&scaled));
}
