// The temperature of a row of logits.
#pragma once

#include <cstdint>

#include "platform.h"

namespace r1k {

// One temperature for all rows, or one factor more for each.
struct Temperature {
  double common;
  const float* factors;  // [N] or null

  R1K_HOST_DEVICE double of(int64_t row) const { return factors != nullptr ? common * factors[row] : common; }
};

}  // namespace r1k
