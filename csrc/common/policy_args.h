// What a policy loss reads, on raw pointers, on the host or on a device.
#pragma once

#include <cstdint>

#include "objective.h"

namespace r1k {

// Per token, per sequence, or absent (data == nullptr).
struct Broadcast {
  const float* data;
  bool per_sequence;

  R1K_HOST_DEVICE float at(int64_t token, int64_t sequence) const { return data[per_sequence ? sequence : token]; }
};

struct PolicyLossInputs {
  Objective objective;
  int64_t tokens;
  int64_t sequences;
  int64_t length;             // T of a (B, T) batch; unused when cu_seqlens is given
  const int64_t* cu_seqlens;  // [S + 1] or null
  const float* logprobs;
  const float* old_logprobs;  // null: on-policy, the ratio is exactly 1
  const float* ref_logprobs;  // null: no KL
  const float* entropy;       // null: not measured
  const bool* mask;           // null: every token counts
  Broadcast advantages;
  Broadcast importance_weights;
  const float* normalizer;    // null: the aggregate's own denominator
};

}  // namespace r1k
