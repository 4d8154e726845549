// Token statistics on a GPU, on raw pointers.
#pragma once

#include <cstdint>

#include "common/row_view.h"
#include "common/temperature.h"
#include "cuda/stream.h"

namespace r1k {
namespace gpu {

// Rows are reduced in segments of this many entries, which is part of what the bits depend on.
constexpr int64_t kSegment = 32768;

R1K_HOST_DEVICE int64_t segments_of(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

// What is known of one segment of a row: its maximum, the sum beside the maxima, the weighted sum, how many maxima.
struct alignas(16) SegmentSums {
  float top, rest, weighted, count;
};

struct TokenStats {
  RowView logits;            // merged
  int64_t count;             // N
  const int64_t* token_ids;  // [N]
  const bool* mask;          // [N] or null; a false row is not read and gives zeros
  Temperature temperature;
  SegmentSums* partials;     // [N, segments]
  float* logprobs;           // [N]
  double* lse;               // [N]
  double* entropy;           // [N]
  bool exact = true;         // false: float32 logits are products of 16-bit operands, so their powers need less care
};

// N times the number of segments is below 2^31.
void launch_token_stats(const TokenStats& args, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
