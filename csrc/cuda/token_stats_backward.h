// The gradient of token statistics with respect to the logits on a GPU, on raw pointers.
#pragma once

#include <cstdint>

#include "common/row_view.h"
#include "common/temperature.h"
#include "cuda/stream.h"

namespace r1k {
namespace gpu {

struct TokenStatsBackward {
  RowView logits;              // merged
  int64_t tokens;              // N
  const int64_t* token_ids;    // [N]
  const double* lse;           // [N]
  const double* entropy;       // [N]
  const float* grad_logprobs;  // [N] or null (all zero)
  const float* grad_entropy;   // [N] or null (all zero)
  Temperature temperature;
  float inv_softcap;     // 1 / c > 0: the logits are c tanh(u / c), and the gradient is with respect to u
  const int64_t* rows;   // [R] or null: row r of the result is that of row rows[r]
  int64_t count;         // rows of the result: R or N
  RowView out;           // merged, of adjacent entries
  bool narrower_in_place;  // rows of `out` begin where those of the logits do, with entries of half the size
};

// The result is of the logits' dtype, or a narrower one of float32 logits; it may take their own memory, row for row.
// `count` times the number of segments of a row (token_stats.h) is below 2^31.
void launch_token_stats_backward(const TokenStatsBackward& args, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
