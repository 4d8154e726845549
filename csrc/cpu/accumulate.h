// Arguments of the kernels that finish gradients on the CPU, on raw pointers.
#pragma once

#include <cstdint>

#include "../common/row_view.h"

namespace r1k {

// out = or += grad * factor, 0 where grad is 0.
struct Scaled {
  const void* grad;
  DType grad_dtype;
  float factor;
  void* out;
  DType out_dtype;
  bool accumulate;
  bool stream;  // write past the caches
};

// out[ids[t]] += factors[t] * rows[t] for every t in order.
struct AddRows {
  float* out;
  int64_t out_stride;
  const int64_t* ids;    // [N]
  const float* factors;  // [N]
  const void* rows;      // [N, H] with adjacent columns
  DType dtype;
  int64_t row_stride;
  int64_t count;
};

}  // namespace r1k
