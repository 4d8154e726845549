// Arguments of the products over sets of ids on the CPU, on raw pointers.
#pragma once

#include <cstdint>

#include "../common/row_view.h"

namespace r1k {

// Columns of the segments of hidden states and of their gradient: 512 bytes of 16 bits, and of float32.
constexpr int64_t kSupportColumns = 256, kSupportHiddenColumns = 128;

// A matrix with adjacent columns.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;
};

// A matrix [N, H] in segments of `columns` columns, each [N, columns] and contiguous.  Rows of the matrix itself start at
// multiples of a power of two, so that a segment of them would have to share a small part of the L2 cache.
struct Segments {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t columns;
};

// The entries (token, id) of all sets, for each block of kBlockTokens tokens by ascending id, then by ascending token.
struct SupportIndex {
  static constexpr int64_t kBlockTokens = 2048;  // their hidden states' columns of a segment stay in the L2 cache
  const int32_t* starts;   // [blocks, V + 1]: where the entries of each id begin in the two below
  const int32_t* entries;  // [M] places of the entries in the sets; kernels have values in the order of the index
  const int32_t* tokens;   // [M]
  int64_t vocab;
  int64_t blocks;

  const int32_t* starts_of(int64_t block) const { return starts + block * (vocab + 1); }
};

// Ids from `begin` to `end` of a block of tokens.
struct SupportRange {
  int64_t block, begin, end;
};

// values = hidden[token] . weight[id].
struct SupportProducts {
  SupportIndex index;
  Segments hidden;  // [N, H], of kSupportColumns
  Rows weight;      // [V, H]
  int64_t width;
  float* values;  // [M]
};

// A value, and the place of its id among the ids of a range that have entries.
struct SupportEntry {
  int32_t row;
  float value;
};

// Entries from `begin` to `end`.
struct SupportSpan {
  int32_t begin, end;
};

// out[token] += sum of values weight[id], by ascending id.  The ids of a block of tokens are taken in ranges; in each,
// entries are ordered by token, then by id.
struct SupportGradHidden {
  static constexpr int64_t kRangeBytes = 1 << 18;  // of the rows of a range, in one segment: they stay in the L2 cache
  SupportIndex index;
  const SupportRange* ranges;
  const SupportSpan* spans;  // [ranges, kBlockTokens]
  const SupportEntry* entries;
  Rows weight;
  int64_t width;
  int64_t tokens;
  float* out;  // [N, H]
};

// What a thread needs for it.
struct SupportMemory {
  alignas(64) float sums[SupportIndex::kBlockTokens * kSupportHiddenColumns];
  alignas(64) char rows[SupportGradHidden::kRangeBytes];
};

// out[id] = or += sum of values hidden[token], by ascending token.
struct SupportGradWeight {
  SupportIndex index;
  Segments hidden;  // of kSupportColumns
  int64_t width;
  const float* values;
  void* out;  // [V, H]
  DType out_dtype;
  bool accumulate;
  bool stream;  // write past the caches
};

}  // namespace r1k
