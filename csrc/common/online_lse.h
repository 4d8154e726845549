// Online log-sum-exp with entropy: the statistics of one logits row, merged block by block.
//
//   m = max x,  S = sum e^{(x - m)/T},  Q = sum e^{(x - m)/T} (x - m)
//   lse = m/T + log S,  H = log S - Q / (S T)
//
// H is taken from differences to the maximum, so a common offset of the logits costs no precision.
#pragma once

#include <cmath>

#include "platform.h"

namespace r1k {

template <typename Real>
struct OnlineLse {
  Real max = -INFINITY;
  Real sum = 0;
  Real weighted = 0;

  // Moves the reference point to `new_max` >= max.  An empty state is left alone: (-inf) - (-inf) is NaN.
  R1K_HOST_DEVICE void raise_max(Real new_max, Real inv_temperature) {
    if (new_max > max) {
      if (sum != 0) {
        const Real shift = max - new_max;
        const Real factor = std::exp(shift * inv_temperature);
        // shift is -inf when the new maximum is +inf; the row's result is NaN then, through sum.
        weighted = factor == 0 ? 0 : factor * (weighted + shift * sum);
        sum *= factor;
      }
      max = new_max;
    }
  }

  // Adds sums that were taken relative to the current maximum.
  R1K_HOST_DEVICE void add(Real block_sum, Real block_weighted) {
    sum += block_sum;
    weighted += block_weighted;
  }

  R1K_HOST_DEVICE Real lse(Real inv_temperature) const { return max * inv_temperature + std::log(sum); }

  R1K_HOST_DEVICE Real entropy(Real inv_temperature) const {
    return std::log(sum) - weighted / sum * inv_temperature;
  }
};

}  // namespace r1k
