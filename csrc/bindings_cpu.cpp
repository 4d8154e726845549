// The CPU operators over PyTorch's stable ABI: check, allocate, launch, register.  The schemas are declared in
// r1kernels/_schemas.py.  A message that starts with "r1kernels: " speaks of a bad value and is raised to Python
// as a ValueError by _library.call.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/group_advantages.h"
#include "cpu/isa.h"
#include "cpu/policy_loss.h"
#include "cpu/token_stats.h"
#include "cuda_methods.h"

namespace {

using namespace r1k::bindings;

// Rows for which `skipped` holds are never looked up: anything may stand there.
template <typename Skipped>
void check_ids(const int64_t* ids, int64_t count, int64_t vocab, const Skipped& skipped) {
  for (int64_t n = 0; n < count; ++n) {
    R1K_CHECK(skipped(n) || (ids[n] >= 0 && ids[n] < vocab), "token_ids[", n, "] is ", ids[n],
              ", expected an id in [0, ", vocab,
              ") (position counted over all dimensions); mask tokens that do not count, such as -100");
  }
}

// log-prob, log-sum-exp and entropy; with `more`, also what `wanted` names.
std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& logits, const Tensor& token_ids, const MaybeTensor& mask,
                                              double temperature, const MaybeTensor& temperatures, int wanted,
                                              double* more) {
  const std::vector<int64_t> sizes = leading_sizes(logits);
  const int64_t count = token_ids.numel();
  Tensor logprobs = empty(logits, sizes, ScalarType::Float);
  Tensor lse = empty(logits, sizes, ScalarType::Double);
  Tensor entropy = empty(logits, sizes, ScalarType::Double);
  R1K_CHECK(logprobs.numel() == count, "token_ids must have the shape of logits without its last dimension");
  if (count == 0) return {logprobs, lse, entropy};

  r1k::TokenStatsForward args = {};
  args.logits = row_view(logits);
  args.token_ids = data<int64_t>(token_ids, "token_ids", ScalarType::Long, count);
  args.mask = bools(mask, "mask", count);
  args.temperature = {temperature, floats(temperatures, "temperatures", count)};
  check_ids(args.token_ids, count, args.logits.vocab,
            [&](int64_t n) { return args.mask != nullptr && !args.mask[n]; });
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.lse = static_cast<double*>(lse.data_ptr());
  args.entropy = static_cast<double*>(entropy.data_ptr());
  args.wanted = wanted;
  args.more = more;
  args.count = count;
  const auto forward = r1k::active_kernels()->token_stats->forward;
  parallel_ranges(count, row_grain(args.logits.vocab), [&](int64_t begin, int64_t end) { forward(args, begin, end); });
  return {logprobs, lse, entropy};
}

std::tuple<Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor token_ids, MaybeTensor mask,
                                               double temperature, MaybeTensor temperatures, bool /*exact*/) {
  return statistics(logits, token_ids, mask, temperature, temperatures, 0, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_statistics(Tensor logits, Tensor token_ids, MaybeTensor mask,
                                                            double temperature, MaybeTensor temperatures,
                                                            bool /*exact*/, int64_t wanted) {
  R1K_CHECK(wanted >= 0 && wanted < 8, "wanted is ", wanted, ", expected a number of r1kernels.ops.row_statistics");
  std::vector<int64_t> sizes = leading_sizes(logits);
  sizes.insert(sizes.begin(), 4);
  Tensor more = empty(logits, sizes, ScalarType::Double);
  double* const values = static_cast<double*>(more.data_ptr());
  std::fill(values, values + more.numel(), 0.0);  // of rows behind the mask, and what is not wanted
  auto [logprobs, lse, entropy] =
      statistics(logits, token_ids, mask, temperature, temperatures, static_cast<int>(wanted), values);
  return {logprobs, lse, entropy, more};
}

// All of `args` but where the result goes.
r1k::TokenStatsBackward backward_args(const Tensor& logits, const Tensor& token_ids, const Tensor& lse,
                                      const Tensor& entropy, const MaybeTensor& grad_logprobs,
                                      const MaybeTensor& grad_entropy, double temperature, const MaybeTensor& sum_sq,
                                      const MaybeTensor& grad_sum_sq, const MaybeTensor& shift) {
  const int64_t count = token_ids.numel();
  r1k::TokenStatsBackward args = {};
  args.logits = row_view(logits);
  args.token_ids = data<int64_t>(token_ids, "token_ids", ScalarType::Long, count);
  args.lse = data<double>(lse, "lse", ScalarType::Double, count);
  args.entropy = data<double>(entropy, "entropy", ScalarType::Double, count);
  args.grad_logprobs = floats(grad_logprobs, "grad_logprobs", count);
  args.grad_entropy = floats(grad_entropy, "grad_entropy", count);
  args.grad_sum_sq = floats(grad_sum_sq, "grad_sum_sq", count);
  if (grad_sum_sq.has_value()) {
    R1K_CHECK(sum_sq.has_value(), "sum_sq is None, expected a tensor like grad_sum_sq");
    args.sum_sq = data<double>(*sum_sq, "sum_sq", ScalarType::Double, count);
  }
  args.shift = floats(shift, "shift", count);
  args.temperature = {temperature, nullptr};
  R1K_CHECK(logits.numel() == count * args.logits.vocab,
            "token_ids must have the shape of logits without its last dimension");
  check_ids(args.token_ids, count, args.logits.vocab, [&](int64_t n) {
    return (args.grad_logprobs == nullptr || args.grad_logprobs[n] == 0) &&
           (args.grad_entropy == nullptr || args.grad_entropy[n] == 0) &&
           (args.grad_sum_sq == nullptr || args.grad_sum_sq[n] == 0) && (args.shift == nullptr || args.shift[n] == 0);
  });
  return args;
}

// Moves the rows [R] up to the top, each by column ranges so that threads never meet.
void compact_rows(char* data, int64_t row_bytes, int64_t stride_bytes, const int64_t* rows, int64_t count) {
  constexpr int64_t kColumns = 64 << 10;
  torch::stable::parallel_for(0, (row_bytes + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, last = std::min(end * kColumns, row_bytes);
    for (int64_t r = 0; r < count; ++r) {  // ascending: rows[r] >= r, so nothing is overwritten before it has moved
      if (rows[r] != r) {
        std::memcpy(data + r * stride_bytes + first, data + rows[r] * stride_bytes + first, last - first);
      }
    }
  });
}

void token_stats_backward_out(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy,
                              MaybeTensor grad_logprobs, MaybeTensor grad_entropy, double temperature,
                              MaybeTensor temperatures, double softcap, MaybeTensor rows, Tensor out,
                              MaybeTensor sum_sq, MaybeTensor grad_sum_sq, MaybeTensor shift) {
  const int64_t count = token_ids.numel();
  R1K_CHECK(!rows.has_value() || rows->dim() == 1, "rows has ", rows->dim(), " dimensions, expected 1");
  const int64_t row_count = rows.has_value() ? rows->numel() : count;
  if (row_count == 0) return;
  r1k::TokenStatsBackward args = backward_args(logits, token_ids, lse, entropy, grad_logprobs, grad_entropy,
                                               temperature, sum_sq, grad_sum_sq, shift);
  args.temperature.factors = floats(temperatures, "temperatures", count);
  args.softcap = softcap;
  const r1k::RowView out_view = row_view(out);
  const bool is_matrix = logits.dim() == 2 && out.dim() == 2 && out.size(0) == count;
  R1K_CHECK(out_view.vocab == args.logits.vocab && out.numel() == logits.numel() &&
                (out.is_contiguous() || (is_matrix && (out_view.vocab_stride == 1 || out_view.vocab == 1))),
            "out must be (N, V) like logits, with adjacent columns, or contiguous with the shape of logits");
  R1K_CHECK(is_matrix || !rows.has_value(), "rows need logits (N, V)");
  R1K_CHECK(out_view.dtype == args.logits.dtype || args.logits.dtype == r1k::DType::float32,
            "out must have the dtype of logits, or a narrower one of float32 logits");
  if (rows.has_value()) {
    args.rows = data<int64_t>(*rows, "rows", ScalarType::Long, row_count);
    for (int64_t r = 0; r < row_count; ++r) {
      R1K_CHECK(args.rows[r] < count && args.rows[r] >= r && (r == 0 || args.rows[r] > args.rows[r - 1]),
                "rows must ascend within [0, ", count, ")");
    }
  }
  args.out = out.data_ptr();
  args.out_dtype = out_view.dtype;
  args.out_stride = out.is_contiguous() ? out_view.vocab : out_view.strides[0];
  constexpr int64_t kBeyondCaches = 32 << 20;
  args.stream = args.out != args.logits.data && out.numel() * r1k::size_of(out_view.dtype) >= kBeyondCaches;
  const auto backward = r1k::active_kernels()->token_stats->backward;
  parallel_ranges(row_count, row_grain(args.logits.vocab), [&](int64_t begin, int64_t end) { backward(args, begin, end); });
  if (args.rows != nullptr) {
    const int64_t size = r1k::size_of(out_view.dtype);
    compact_rows(static_cast<char*>(args.out), out_view.vocab * size, args.out_stride * size, args.rows, row_count);
  }
}

// Packed tokens may be as many as their sequences (some are empty then, or all hold one): per sequence it is.
r1k::Broadcast broadcast(const MaybeTensor& tensor, const char* name, const Tensor& logprobs, int64_t sequences,
                         bool packed) {
  if (!tensor.has_value()) return {nullptr, false};
  const bool per_token = tensor->dim() == logprobs.dim() && tensor->numel() == logprobs.numel();
  const bool per_sequence = !per_token || (packed && tensor->numel() == sequences);
  return {floats(tensor, name, per_sequence ? sequences : logprobs.numel()), per_sequence};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor logprobs, Tensor advantages, MaybeTensor old_logprobs, MaybeTensor ref_logprobs, MaybeTensor entropy,
    MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor importance_weights, MaybeTensor normalizer,
    int64_t surrogate, int64_t ratio, int64_t kl, int64_t aggregate, double clip_low, double clip_high,
    double ratio_cap, double tau_pos, double tau_neg, double kl_coef, double entropy_coef, double max_length) {
  const auto sizes = logprobs.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  const int64_t count = logprobs.numel();
  R1K_CHECK(!shape.empty(), "logprobs must be (..., T), or (N,) with cu_seqlens, got 0 dimensions");

  r1k::PolicyLossArgs args;
  args.objective =
      objective_of(surrogate, static_cast<r1k::Ratio>(ratio), kl, aggregate, clip_low, clip_high, ratio_cap, tau_pos,
                   tau_neg, kl_coef, entropy_coef, max_length);
  args.tokens = count;
  args.length = shape.back();
  args.cu_seqlens = nullptr;
  if (cu_seqlens.has_value()) {
    args.sequences = sequences_of(*cu_seqlens);
    args.cu_seqlens = data<int64_t>(*cu_seqlens, "cu_seqlens", ScalarType::Long, args.sequences + 1);
    R1K_CHECK(args.cu_seqlens[0] == 0 && args.cu_seqlens[args.sequences] == count, "cu_seqlens runs from ",
              args.cu_seqlens[0], " to ", args.cu_seqlens[args.sequences], ", expected 0 to N = ", count);
    for (int64_t s = 0; s < args.sequences; ++s) {
      R1K_CHECK(args.cu_seqlens[s] <= args.cu_seqlens[s + 1], "cu_seqlens[", s + 1, "] is ",
                args.cu_seqlens[s + 1], ", expected no less than cu_seqlens[", s, "] = ", args.cu_seqlens[s]);
    }
  } else {
    args.sequences = 1;
    for (size_t k = 0; k + 1 < shape.size(); ++k) args.sequences *= shape[k];
  }
  args.logprobs = floats(logprobs, "logprobs", count);
  args.old_logprobs = floats(old_logprobs, "old_logprobs", count);
  args.ref_logprobs = floats(ref_logprobs, "ref_logprobs", count);
  args.entropy = floats(entropy, "entropy", count);
  args.mask = bools(mask, "mask", count);
  const bool packed = cu_seqlens.has_value();
  args.advantages = broadcast(advantages, "advantages", logprobs, args.sequences, packed);
  args.importance_weights =
      broadcast(importance_weights, "importance_weights", logprobs, args.sequences, packed);
  args.normalizer = floats(normalizer, "normalizer", 1);
  R1K_CHECK(args.normalizer == nullptr || (*args.normalizer > 0 && std::isfinite(*args.normalizer)),
            "normalizer is ", *args.normalizer, ", expected a positive finite number");

  const bool with_entropy = entropy_coef != 0;
  Tensor loss = empty(logprobs, {}, ScalarType::Float);
  Tensor grad_logprobs = empty(logprobs, shape, ScalarType::Float);
  Tensor grad_entropy = empty(logprobs, with_entropy ? shape : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor metrics = empty(logprobs, {r1k::kMetricCount}, ScalarType::Float);
  args.grad_logprobs = static_cast<float*>(grad_logprobs.data_ptr());
  args.grad_entropy = with_entropy ? static_cast<float*>(grad_entropy.data_ptr()) : nullptr;

  std::vector<r1k::PolicySums> sums(args.sequences);
  const double denominator = r1k::denominator(args, r1k::counted_tokens(args));
  const int64_t mean_length = std::max<int64_t>(1, count / std::max<int64_t>(args.sequences, 1));
  torch::stable::parallel_for(0, args.sequences, std::max<int64_t>(1, 4096 / mean_length),
                              [&](int64_t begin, int64_t end) {
                                r1k::policy_loss_sequences(args, denominator, begin, end, sums.data());
                              });
  r1k::policy_loss_reduce(args, sums.data(), static_cast<float*>(loss.data_ptr()),
                          static_cast<float*>(metrics.data_ptr()));
  return {loss, grad_logprobs, grad_entropy, metrics};
}

Tensor group_advantages(Tensor rewards, MaybeTensor group_ids, int64_t group_size, int64_t scale, int64_t ddof,
                        double eps) {
  const int64_t count = rewards.numel();
  Tensor advantages = empty(rewards, {count}, ScalarType::Float);
  const float* r = floats(rewards, "rewards", count);
  for (int64_t k = 0; k < count; ++k) {
    R1K_CHECK(!std::isinf(r[k]), "rewards[", k, "] is ", r[k], ", expected a finite number, or NaN for unscorable");
  }
  const int64_t* ids =
      group_ids.has_value() ? data<int64_t>(*group_ids, "group_ids", ScalarType::Long, count) : nullptr;
  R1K_CHECK(ids != nullptr || (group_size > 0 && count % group_size == 0), "group_size is ", group_size,
            ", expected a positive integer that divides the ", count, " rewards");
  R1K_CHECK(scale >= 0 && scale <= 2, "scale is ", scale, ", expected 0, 1 or 2");
  r1k::group_advantages({count, r, ids, group_size, static_cast<r1k::AdvantageScale>(scale), ddof, eps,
                         static_cast<float*>(advantages.data_ptr())});
  return advantages;
}

std::tuple<Tensor, Tensor> kl_estimate(Tensor logprobs, Tensor ref_logprobs, int64_t estimator) {
  const auto sizes = logprobs.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  const int64_t count = logprobs.numel();
  R1K_CHECK(estimator >= 1 && estimator <= 3, "estimator is ", estimator, ", expected 1, 2 or 3");
  Tensor kl = empty(logprobs, shape, ScalarType::Float);
  Tensor slope = empty(logprobs, shape, ScalarType::Float);
  const float* l = floats(logprobs, "logprobs", count);
  const float* l_ref = floats(ref_logprobs, "ref_logprobs", count);
  float* kl_out = static_cast<float*>(kl.data_ptr());
  float* slope_out = static_cast<float*>(slope.data_ptr());
  torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const r1k::Term term = r1k::kl_term(estimator, l_ref[n] - l[n]);
      kl_out[n] = term.loss;
      slope_out[n] = term.slope;
    }
  });
  return {kl, slope};
}

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(r1k::active_kernels()->name); }

PyObject* cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const r1k::Kernels& kernels : r1k::supported_kernels()) {
    PyObject* name = PyUnicode_FromString(kernels.name);
    PyList_Append(names, name);
    Py_DECREF(name);
  }
  return names;
}

PyObject* use_cpu_isa(PyObject*, PyObject* wanted) {
  for (const r1k::Kernels& kernels : r1k::supported_kernels()) {
    if (PyUnicode_CompareWithASCIIString(wanted, kernels.name) == 0) {
      r1k::active_kernels() = &kernels;
      Py_RETURN_NONE;
    }
  }
  return PyErr_Format(PyExc_ValueError, "instruction set is %R, expected one of cpu_isas()", wanted);
}

PyObject* release_workspace(PyObject*, PyObject*) {
  release_gemm_workspaces();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the CPU instruction set in use."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Names of the sets of kernels that this processor can run, the fastest last."},
    {"use_cpu_isa", use_cpu_isa, METH_O, "Uses another instruction set; for tests."},
    {"release_workspace", release_workspace, METH_NOARGS, "Frees the memory that products keep for packed operands."},
    {"cuda_architectures", r1k::cuda_architectures, METH_NOARGS, "What the CUDA kernels are compiled for."},
    {"cuda_missing", r1k::cuda_missing, METH_O, "Why no CUDA kernel can run on a device (its index); '' where one can."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) {
  m.impl("token_stats", TORCH_BOX(&token_stats));
  m.impl("token_stats_backward_out", TORCH_BOX(&token_stats_backward_out));
  m.impl("token_statistics", TORCH_BOX(&token_statistics));
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("kl_estimate", TORCH_BOX(&kl_estimate));
}

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
