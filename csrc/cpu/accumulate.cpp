// The ends of gradients: a sum in fp32 times a factor, in the dtype that is wanted; and a few rows added to a sum.

#include "accumulate.h"

#include "isa.h"
#include "vec.h"

namespace r1k {
namespace R1K_ISA {
namespace {

constexpr int64_t kPart = 64 * kLanes;  // stays in the L1 cache

// A factor of inf or NaN must not give what is 0 a gradient.
VecF product(VecF grad, VecF factor) { return grad == 0.0f ? grad : grad * factor; }

template <typename T, typename Out>
void scaled_entries(const Scaled& args, int64_t begin, int64_t end) {
  const T* const grad = static_cast<const T*>(args.grad);
  Out* const out = static_cast<Out*>(args.out);
  const VecF factor = broadcast(args.factor);
  alignas(64) Out result[kPart];
  const auto entry = [&](VecF grad, const Out* before) {
    VecF value = product(grad, factor);
    if (args.accumulate) value += load(before);
    if constexpr (sizeof(Out) == 2) value = value == value ? value : broadcast(__builtin_nanf(""));
    return value;
  };
  for (int64_t part = begin; part < end; part += kPart) {
    const int64_t count = end - part < kPart ? end - part : kPart;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(result + k, entry(load(grad + part + k), out + part + k));
    if (k < count) {
      T last[kLanes] = {};
      Out before[kLanes] = {};
      std::memcpy(last, grad + part + k, (count - k) * sizeof(T));
      if (args.accumulate) std::memcpy(before, out + part + k, (count - k) * sizeof(Out));
      Out rounded[kLanes];
      store(rounded, entry(load(last), before));
      std::memcpy(result + k, rounded, (count - k) * sizeof(Out));
    }
    if (args.stream) {
      stream_copy(out + part, result, count * sizeof(Out));
    } else {
      std::memcpy(out + part, result, count * sizeof(Out));
    }
  }
  if (args.stream) stream_fence();
}

template <typename T>
void scaled_from(const Scaled& args, int64_t begin, int64_t end) {
  switch (args.out_dtype) {
    case DType::float32: return scaled_entries<T, float>(args, begin, end);
    case DType::bfloat16: return scaled_entries<T, BFloat16>(args, begin, end);
    case DType::float16: return scaled_entries<T, Float16>(args, begin, end);
  }
}

void scaled(const Scaled& args, int64_t begin, int64_t end) {
  switch (args.grad_dtype) {
    case DType::float32: return scaled_from<float>(args, begin, end);
    case DType::bfloat16: return scaled_from<BFloat16>(args, begin, end);
    case DType::float16: return scaled_from<Float16>(args, begin, end);
  }
}

template <typename T>
void add_columns(const AddRows& args, int64_t begin, int64_t end) {
  const T* const rows = static_cast<const T*>(args.rows);
  for (int64_t t = 0; t < args.count; ++t) {
    if (args.factors[t] == 0) continue;
    const VecF factor = broadcast(args.factors[t]);
    float* const out = args.out + args.ids[t] * args.out_stride;
    const T* const row = rows + t * args.row_stride;
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) store(out + k, multiply_add(factor, load(row + k), load(out + k)));
    for (; k < end; ++k) out[k] = multiply_add(factor, broadcast(to_float(row[k])), broadcast(out[k]))[0];
  }
}

void add_rows(const AddRows& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::float32: return add_columns<float>(args, begin, end);
    case DType::bfloat16: return add_columns<BFloat16>(args, begin, end);
    case DType::float16: return add_columns<Float16>(args, begin, end);
  }
}

}  // namespace

const AccumulateKernels accumulate_kernels = {scaled, add_rows};

}  // namespace R1K_ISA
}  // namespace r1k
