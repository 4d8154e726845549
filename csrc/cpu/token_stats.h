// Arguments of the two vocabulary kernels on the CPU, on raw pointers.
#pragma once

#include <cstdint>

#include "../common/row_view.h"
#include "../common/temperature.h"

namespace r1k {

// What a call may want beside log-prob, log-sum-exp and entropy; r1kernels.ops.row_statistics has the same numbers.
enum Wanted : int { kSumSqProbs = 1, kMeanLogit = 2, kIsTop1 = 4 };

struct TokenStatsForward {
  RowView logits;
  const int64_t* offsets;    // [N + 1] or null: rows differ in length, and row n is [offsets[n], offsets[n + 1])
  const int64_t* token_ids;  // [N]
  const bool* mask;          // [N] or null; a false row is not read and gives zeros
  Temperature temperature;
  float* logprobs;           // [N]
  double* lse;               // [N]
  double* entropy;           // [N]
  int wanted;                // of the statistics below
  double* more;              // [4, N] or null: sum of p^2, mean of z, largest z, 1 if it is the token's and the first
  int64_t count;             // N
};

// The gradient of `rows` of the logits (of all of them where it is null) in rows of their own, in the dtype of the
// logits or, from float32 logits, a narrower one.
struct TokenStatsBackward {
  RowView logits;
  const int64_t* offsets;       // [N + 1] or null, as in the forward; `out` has the same rows
  const int64_t* rows;          // [R] or null: row r of the launch is row rows[r] of everything below
  const int64_t* token_ids;     // [N]
  const double* lse;            // [N]
  const double* entropy;        // [N]
  const float* grad_logprobs;   // [N] or null (all zero)
  const float* grad_entropy;    // [N] or null (all zero)
  const double* sum_sq;         // [N], or null without grad_sum_sq
  const float* grad_sum_sq;     // [N] or null (all zero)
  const float* shift;           // [N] or null (all zero): added to dL/dz of each entry
  Temperature temperature;
  double softcap;               // c > 0: the logits are c tanh(u / c), and the gradient is with respect to u
  void* out;                    // row n at n * out_stride elements; may be the logits' own memory, row for row
  DType out_dtype;
  int64_t out_stride;
  bool stream;                  // write past the caches: the gradient is larger than they are
};

}  // namespace r1k
