// Rows of a strided (..., V) tensor.
#pragma once

#include <cstdint>

#include "platform.h"

namespace r1k {

enum class DType : int { float32, bfloat16, float16 };

R1K_HOST_DEVICE int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Rows of a strided (..., V) tensor, addressed without a copy.  Strides are in elements.
struct RowView {
  static constexpr int max_leading = 7;
  const void* data;
  DType dtype;
  int64_t vocab;
  int64_t vocab_stride;
  int leading;
  int64_t sizes[max_leading];
  int64_t strides[max_leading];

  // Element offset of row `row` of the flattened leading dimensions.
  R1K_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int k = leading - 1; k > 0; --k) {
      result += row % sizes[k] * strides[k];
      row /= sizes[k];
    }
    return leading > 0 ? result + row * strides[0] : 0;
  }
};

// The same rows in as few leading dimensions as their strides allow: usual tensors have one.
inline RowView merged(const RowView& rows) {
  RowView view = rows;
  view.leading = 0;
  for (int k = 0; k < rows.leading; ++k) {
    const int64_t size = rows.sizes[k], stride = rows.strides[k];
    if (size == 1) continue;  // its stride says nothing
    const int last = view.leading - 1;
    if (last >= 0 && view.strides[last] == size * stride) {
      view.sizes[last] *= size;
      view.strides[last] = stride;
    } else {
      view.sizes[view.leading] = size;
      view.strides[view.leading++] = stride;
    }
  }
  if (view.vocab == 1) view.vocab_stride = 1;
  return view;
}

// Whether views of memory share a part of it.
inline bool overlap(const RowView& a, const RowView& b) {
  const auto end = [](const RowView& rows) {
    int64_t last = (rows.vocab - 1) * rows.vocab_stride;
    for (int k = 0; k < rows.leading; ++k) last += (rows.sizes[k] - 1) * rows.strides[k];
    return static_cast<const char*>(rows.data) + (last + 1) * size_of(rows.dtype);
  };
  return a.data < end(b) && b.data < end(a);
}

// Whether every row of a merged view starts at the address where that of the other does.
inline bool same_row_starts(const RowView& a, const RowView& b) {
  bool same = a.data == b.data && a.leading == b.leading;
  for (int k = 0; same && k < a.leading; ++k) {
    same = a.sizes[k] == b.sizes[k] && a.strides[k] * size_of(a.dtype) == b.strides[k] * size_of(b.dtype);
  }
  return same;
}

// Whether entries are adjacent and every row of a merged view starts at a multiple of 16 bytes.
inline bool aligned16(const RowView& rows) {
  if (rows.vocab_stride != 1 || reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) return false;
  for (int k = 0; k < rows.leading; ++k) {
    if (rows.strides[k] * size_of(rows.dtype) % 16 != 0) return false;
  }
  return true;
}

}  // namespace r1k
