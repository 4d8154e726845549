// What the bindings of every operator share: tensors of the stable ABI checked and turned into raw pointers.
// A message that starts with "r1kernels: " speaks of a bad value and is raised to Python as a ValueError by
// _library.call.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "common/objective.h"
#include "cpu/token_stats.h"

#define R1K_CHECK(condition, ...) STD_TORCH_CHECK(condition, "r1kernels: ", __VA_ARGS__)

namespace r1k {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline std::vector<int64_t> leading_sizes(const Tensor& logits) {
  const auto sizes = logits.sizes();
  R1K_CHECK(sizes.size() > 0, "logits must have 1 dimension at least, got 0");
  return std::vector<int64_t>(sizes.begin(), sizes.end() - 1);
}

template <typename T>
const T* data(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  R1K_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == numel, name,
            " must be contiguous, of its declared dtype and hold ", numel, " elements; got ", tensor.numel());
  return static_cast<const T*>(tensor.data_ptr());
}

inline const float* floats(const Tensor& tensor, const char* name, int64_t numel) {
  return data<float>(tensor, name, ScalarType::Float, numel);
}

inline const float* floats(const MaybeTensor& tensor, const char* name, int64_t numel) {
  return tensor.has_value() ? floats(*tensor, name, numel) : nullptr;
}

inline const bool* bools(const MaybeTensor& tensor, const char* name, int64_t numel) {
  return tensor.has_value() ? data<bool>(*tensor, name, ScalarType::Bool, numel) : nullptr;
}

// How many sequences the boundaries (S + 1,) of packed tokens have.
inline int64_t sequences_of(const Tensor& cu_seqlens) {
  R1K_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0, "cu_seqlens has ", cu_seqlens.dim(), " dimensions and ",
            cu_seqlens.numel(), " elements, expected 1 dimension and S + 1 elements for S sequences");
  return cu_seqlens.numel() - 1;
}

inline r1k::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return r1k::DType::float32;
    case ScalarType::BFloat16: return r1k::DType::bfloat16;
    case ScalarType::Half: return r1k::DType::float16;
    default: break;
  }
  R1K_CHECK(false, name, " must be float32, bfloat16 or float16");
}

inline r1k::RowView row_view(const Tensor& logits) {
  r1k::RowView view;
  view.dtype = dtype_of(logits, "logits");
  view.leading = static_cast<int>(logits.dim()) - 1;
  R1K_CHECK(view.leading >= 0 && view.leading <= r1k::RowView::max_leading, "logits must have 1 to ",
            r1k::RowView::max_leading + 1, " dimensions, got ", logits.dim());
  view.data = logits.data_ptr();
  view.vocab = logits.size(view.leading);
  view.vocab_stride = logits.stride(view.leading);
  for (int k = 0; k < view.leading; ++k) {
    view.sizes[k] = logits.size(k);
    view.strides[k] = logits.stride(k);
  }
  return view;
}

inline Objective objective_of(int64_t surrogate, Ratio ratio, int64_t kl, int64_t aggregate, double clip_low,
                              double clip_high, double ratio_cap, double tau_pos, double tau_neg, double kl_coef,
                              double entropy_coef, double max_length) {
  R1K_CHECK(surrogate >= 0 && surrogate <= 7 && ratio >= Ratio::token && ratio <= Ratio::sequence_product && kl >= 1 &&
                kl <= 6 && aggregate >= 0 && aggregate <= 2,
            "surrogate, ratio, kl and aggregate are ", surrogate, ", ", static_cast<int>(ratio), ", ", kl, ", ",
            aggregate, ", expected numbers of r1kernels.objectives");
  return {static_cast<Surrogate>(surrogate),
          ratio,
          kl > 3 ? kl - 3 : kl,
          static_cast<Aggregate>(aggregate),
          static_cast<float>(clip_low),
          static_cast<float>(clip_high),
          static_cast<float>(ratio_cap),
          static_cast<float>(tau_pos),
          static_cast<float>(tau_neg),
          static_cast<float>(kl_coef),
          static_cast<float>(entropy_coef),
          max_length,
          kl > 3};
}

// Rows per task: enough vocabulary to be worth waking a thread for.
inline int64_t row_grain(int64_t vocab) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(vocab, 1)); }

// run(next) on as many threads as there is work for; next() gives each part of [0, count) to one of them, and -1 after
// the last.  A thread takes a part when it is free: one that another process keeps waiting does not keep the others.
template <typename Run>
void parallel_parts(int64_t count, const Run& run) {
  std::atomic<int64_t> taken{0};
  const auto next = [&taken, count] {
    const int64_t part = taken++;
    return part < count ? part : -1;
  };
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1,
                              [&](int64_t, int64_t) { run(next); });
}

// run(begin, end) for ranges of `grain` of [0, count).
template <typename Run>
void parallel_ranges(int64_t count, int64_t grain, const Run& run) {
  parallel_parts((count + grain - 1) / grain, [&](const auto& next) {
    for (int64_t part = next(); part >= 0; part = next()) {
      run(part * grain, std::min(part * grain + grain, count));
    }
  });
}

// Frees the memory that matrix products keep.
void release_gemm_workspaces();

}  // namespace bindings
}  // namespace r1k
