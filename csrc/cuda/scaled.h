// A gradient times a factor that only the device knows, on raw pointers.
#pragma once

#include <cstdint>

#include "common/row_view.h"
#include "cuda/stream.h"

namespace r1k {
namespace gpu {

// out = or += grad * factor, 0 where grad is 0.  Both begin at multiples of 16 bytes; they may be the same memory.
struct Scaled {
  int64_t count;
  const void* grad;
  DType grad_dtype;
  const float* factor;  // [1]
  void* out;
  DType out_dtype;  // that of grad, or float32, or anything from float32
  bool accumulate;
};

void launch_scaled(const Scaled& args, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
