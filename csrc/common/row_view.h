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

}  // namespace r1k
