// Arguments of the two vocabulary kernels on the CPU, on raw pointers.
#pragma once

#include <cstdint>

namespace r1k {

enum class DType : int { float32, bfloat16, float16 };

inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

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
  int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int k = leading - 1; k > 0; --k) {
      result += row % sizes[k] * strides[k];
      row /= sizes[k];
    }
    return leading > 0 ? result + row * strides[0] : 0;
  }
};

// One temperature for all rows, or one factor more for each.
struct Temperature {
  double common;
  const float* factors;  // [N] or null

  double of(int64_t row) const { return factors != nullptr ? common * factors[row] : common; }
};

struct TokenStatsForward {
  RowView logits;
  const int64_t* token_ids;  // [N]
  const bool* mask;          // [N] or null; a false row is not read and gives zeros
  Temperature temperature;
  float* logprobs;           // [N]
  double* lse;               // [N]
  double* entropy;           // [N]
};

// The gradient of `rows` of the logits (of all of them where it is null) in rows of their own, in the dtype of the
// logits or, from float32 logits, a narrower one.
struct TokenStatsBackward {
  RowView logits;
  const int64_t* rows;          // [R] or null: row r of the launch is row rows[r] of everything below
  const int64_t* token_ids;     // [N]
  const double* lse;            // [N]
  const double* entropy;        // [N]
  const float* grad_logprobs;   // [N] or null (all zero)
  const float* grad_entropy;    // [N] or null (all zero)
  Temperature temperature;
  double softcap;               // c > 0: the logits are c tanh(u / c), and the gradient is with respect to u
  void* out;                    // row n at n * out_stride elements; may be the logits' own memory, row for row
  DType out_dtype;
  int64_t out_stride;
  bool stream;                  // write past the caches: the gradient is larger than they are
};

}  // namespace r1k
