// Arguments of the matrix product with an fp32 result, on raw pointers.
#pragma once

#include <cstdint>

#include "token_stats.h"

namespace r1k {

// One operand: `outer` is the dimension it gives the result, rows of a or columns of b.  One stride is 1.
struct GemmOperand {
  DType dtype;
  const void* data;
  int64_t outer_stride;
  int64_t k_stride;
};

// Both operands have one dtype, or one of them is float32 and the other a 16-bit one.
struct Gemm {
  int64_t rows, columns, k;
  GemmOperand a, b;
  float* out;
  int64_t out_stride;
  bool accumulate;  // out += a b instead of out = a b
  bool coarse;      // 16 bits of float32 operands are enough
};

// A rectangle of the result.
struct GemmBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};

struct GemmTile {
  int64_t rows, columns;      // blocks that are multiples of these waste nothing
  int64_t max_block_columns;  // the largest number of columns of b that fit a cache when packed
  int64_t pack_cost;          // of an element, in multiplications
};

struct GemmKernels {
  // Computes one block, sequentially.  `workspace` is aligned to 64 bytes.
  void (*block)(const Gemm&, const GemmBlock&, void* workspace);
  int64_t (*workspace_bytes)(const Gemm&, int64_t rows, int64_t columns);
  GemmTile (*tile)(const Gemm&);
};

}  // namespace r1k
