// What the bindings of CUDA operators share: tensors checked to lie where the kernels run, and their stream.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cuda/stream.h"
#include "cuda/token_stats.h"

// The dispatch key that the operators of namespace r1kernels_cuda are registered for.  The tests' emulator runs the
// kernels on tensors of the CPU.
#ifndef R1K_CUDA_KEY
#define R1K_CUDA_KEY CUDA
#endif

namespace r1k {
namespace bindings {

// While it lives, the device of a tensor is current; `stream` is where torch queues its work there.
struct OnStream {
  explicit OnStream(const Tensor& like)
      : device(like.get_device_index()), stream(gpu::current_stream(like.get_device_index())) {}

  const gpu::OnDevice device;
  const gpu::Stream stream;
};

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Every other tensor of a call lies where the first one does: a kernel would take the address of host memory as well.
inline void check_device(const Tensor& first, const char* name, const Tensor& tensor) {
  R1K_CHECK(same_device(first, tensor), name, " is on another device than the first argument");
}
inline void check_device(const Tensor& first, const char* name, const MaybeTensor& tensor) {
  if (tensor.has_value()) check_device(first, name, *tensor);
}

// `data` of bindings.h for a tensor on the device of `first`, and for one that may be absent.
template <typename T>
const T* device_data(const Tensor& first, const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  check_device(first, name, tensor);
  return data<T>(tensor, name, dtype, numel);
}
template <typename T>
const T* device_data(const Tensor& first, const MaybeTensor& tensor, const char* name, ScalarType dtype,
                     int64_t numel) {
  return tensor.has_value() ? device_data<T>(first, *tensor, name, dtype, numel) : nullptr;
}

// TensorLike: Tensor or MaybeTensor.
template <typename TensorLike>
const float* device_floats(const Tensor& first, const TensorLike& tensor, const char* name, int64_t numel) {
  return device_data<float>(first, tensor, name, ScalarType::Float, numel);
}
template <typename TensorLike>
const double* device_doubles(const Tensor& first, const TensorLike& tensor, const char* name, int64_t numel) {
  return device_data<double>(first, tensor, name, ScalarType::Double, numel);
}
template <typename TensorLike>
const int64_t* device_ints(const Tensor& first, const TensorLike& tensor, const char* name, int64_t numel) {
  return device_data<int64_t>(first, tensor, name, ScalarType::Long, numel);
}
template <typename TensorLike>
const bool* device_bools(const Tensor& first, const TensorLike& tensor, const char* name, int64_t numel) {
  return device_data<bool>(first, tensor, name, ScalarType::Bool, numel);
}

// row_view of bindings.h in as few leading dimensions as possible.
inline r1k::RowView merged_rows(const Tensor& logits) { return r1k::merged(row_view(logits)); }

// A block takes one segment of a row.
inline void check_grid(int64_t rows, int64_t vocab) {
  constexpr int64_t kMost = 2147483647;
  R1K_CHECK(vocab <= kMost, "logits has V = ", vocab, ", expected less than 2^31");
  const int64_t segments = r1k::gpu::segments_of(vocab);
  R1K_CHECK(rows <= kMost / std::max<int64_t>(segments, 1), "logits has ", rows, " rows of ", segments,
            " segments, expected less than 2^31 segments in all");
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

}  // namespace bindings
}  // namespace r1k
