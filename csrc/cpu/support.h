// Arguments of the products over sets of ids on the CPU, on raw pointers.
#pragma once

#include <cstdint>

#include "../common/row_view.h"

namespace r1k {

// A matrix with adjacent columns.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;
};

// The entries (token, id) of all sets, for each block of kBlockTokens tokens by ascending id, then by ascending token.
struct SupportIndex {
  static constexpr int64_t kBlockTokens = 2048;  // their hidden states' columns of a segment stay in the L2 cache
  const int32_t* starts;   // [blocks, V + 1]: where the entries of each id begin in the two below
  const int32_t* entries;  // [M] places of the entries in the sets
  const int32_t* tokens;   // [M]
  int64_t vocab;
  int64_t blocks;

  const int32_t* starts_of(int64_t block) const { return starts + block * (vocab + 1); }
};

// values[entry] = or += hidden[token] . weight[id].
struct SupportProducts {
  SupportIndex index;
  Rows hidden, weight;  // [N, H], [V, H]
  int64_t width;
  float* values;  // [M]
  bool accumulate;
};

// out[token] += sum of values[entry] weight[id], by ascending id.
struct SupportGradHidden {
  SupportIndex index;
  Rows weight;
  int64_t width;
  const float* values;
  float* out;  // [N, H]
};

// out[id] = or += sum of values[entry] hidden[token], by ascending token.
struct SupportGradWeight {
  SupportIndex index;
  Rows hidden;
  int64_t width;
  const float* values;
  void* out;  // [V, H]
  DType out_dtype;
  bool accumulate;
  bool stream;  // write past the caches
};

// Columns that a part of grad_hidden and of grad_weight has: with AVX-512, 512 bytes of float32, and of 16 bits.
constexpr int64_t kSupportHiddenColumns = 128, kSupportWeightColumns = 256;

}  // namespace r1k
