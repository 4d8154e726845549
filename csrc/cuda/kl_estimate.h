// KL estimators of single tokens on a GPU, on raw pointers.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace r1k {
namespace gpu {

struct KlEstimate {
  int64_t count;              // N
  const float* logprobs;      // [N]
  const float* ref_logprobs;  // [N]
  int64_t estimator;          // 1, 2, 3: k1, k2, k3
  float* kl;                  // [N]
  float* slope;               // [N]: its derivative with respect to logprobs
};

void launch_kl_estimate(const KlEstimate& args, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
