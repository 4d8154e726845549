// Matrix product of bfloat16 with an fp32 result on matrix tiles (AMX).  One instruction adds the product of a 16 x 32
// and a 32 x 16 tile to 16 x 16 sums.  Slices of both operands along k are packed into panels of such tiles; a square
// of 2 x 2 tiles of the result is summed over a slice in registers and then added to memory.  As in gemm.cpp, the order
// of every sum follows from k alone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "gemm.h"
#include "tiles.h"

namespace r1k {
namespace R1K_ISA {
namespace amx {

constexpr int64_t kSide = 16;        // rows or columns of the result in a tile
constexpr int64_t kDepth = 32;       // elements along k in a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSquare = 2 * kSide;

// Elements along k in a slice.  In registers the products of 32 elements are one term, so a chain has 32 terms.
constexpr int64_t kSlice = 1024;
// Packed, the columns of a block take at most 1 MiB, and these rows 256 KiB. Both stay in the L2 cache.
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kPackedRows = 128;

// A stride that is no power of two keeps panels out of each other's cache sets.
inline int64_t panel_stride(int64_t depth) { return (depth + kDepth - 1) / kDepth * kTileBytes + 64; }

inline int64_t panel_count(int64_t outers) { return (outers + kSide - 1) / kSide; }

typedef uint32_t Row __attribute__((vector_size(64)));  // of a tile: 16 pairs of bfloat16 that are neighbours along k
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef float Sums __attribute__((vector_size(64)));

// Transposes the 16 x 16 pairs of a tile, in four rounds of interleaving rows that lie 8 apart.
inline void transpose(char* tile) {
  constexpr Row kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Row kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Row x[16], y[16];
  std::memcpy(x, tile, sizeof(x));
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      y[2 * k] = __builtin_shuffle(x[k], x[k + 8], kLow);
      y[2 * k + 1] = __builtin_shuffle(x[k], x[k + 8], kHigh);
    }
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) x[k] = y[k];
  }
  std::memcpy(tile, x, sizeof(x));
}

// Elements that are contiguous along k: each row of the operand is a row of tiles.
inline void pack_rows(const uint16_t* from, int64_t outer_stride, int64_t count, int64_t depth, bool transposed,
                      char* to) {
  for (int64_t begin = 0; begin < count; begin += kSide, to += panel_stride(depth)) {
    const int64_t outers = count - begin < kSide ? count - begin : kSide;
    char* tile = to;
    for (int64_t k = 0; k < depth; k += kDepth, tile += kTileBytes) {
      const uint16_t* row = from + begin * outer_stride + k;
      if (outers == kSide && k + kDepth <= depth) {
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) std::memcpy(tile + r * 64, row + r * outer_stride, 64);
      } else {
        const int64_t bytes = (depth - k < kDepth ? depth - k : kDepth) * 2;
        std::memset(tile, 0, kTileBytes);
        for (int64_t r = 0; r < outers; ++r) std::memcpy(tile + r * 64, row + r * outer_stride, bytes);
      }
      if (transposed) transpose(tile);
    }
  }
}

// Rows k and k + 1 of the operand, contiguous across k, become one row of a tile.
inline void interleave(const uint16_t* even, const uint16_t* odd, char* to) {
  Halves x, y;
  std::memcpy(&x, even, sizeof(x));
  std::memcpy(&y, odd, sizeof(y));
  const Row mixed = __builtin_convertvector(x, Row) | __builtin_convertvector(y, Row) << 16;
  std::memcpy(to, &mixed, sizeof(mixed));
}

// Elements that are contiguous across k.  All panels are filled side by side, so that memory is read in long runs.
inline void pack_pairs(const uint16_t* from, int64_t k_stride, int64_t count, int64_t depth, bool transposed,
                       char* to) {
  const int64_t stride = panel_stride(depth), whole = count / kSide, rest = count % kSide;
  for (int64_t begin = 0; begin < depth; begin += kDepth, to += kTileBytes) {
    for (int64_t k = begin; k < begin + kDepth; k += 2) {
      const uint16_t* even = from + k * k_stride;
      char* row = to + (k - begin) * 32;
      const bool both = k + 2 <= depth;
      if (both) {
        for (int64_t panel = 0; panel < whole; ++panel, even += kSide, row += stride) {
          // Runs are too short for the processor to foresee the next rows: these are fetched four pairs before.
          __builtin_prefetch(even + 8 * k_stride);
          __builtin_prefetch(even + 9 * k_stride);
          interleave(even, even + k_stride, row);
        }
        if (rest == 0) continue;
      }
      for (int64_t panel = both ? whole : 0; panel * kSide < count; ++panel, even += kSide, row += stride) {
        const int64_t outers = panel < whole ? kSide : rest;
        uint16_t edge[2][kSide] = {};
        for (int64_t d = 0; d < 2 && k + d < depth; ++d) std::memcpy(edge[d], even + d * k_stride, outers * 2);
        interleave(edge[0], edge[1], row);
      }
    }
    if (!transposed) continue;
    for (int64_t panel = 0; panel * kSide < count; ++panel) transpose(to + panel * stride);
  }
}

// `depth` elements along k of the rows (columns) from `begin` to `end` as tiles, panel after panel.  What is missing in
// the last tiles is 0 along k; across k it is never stored.
inline void pack(const GemmOperand& operand, int64_t k, int64_t depth, int64_t begin, int64_t end, bool is_left,
                 char* to) {
  const uint16_t* from =
      static_cast<const uint16_t*>(operand.data) + k * operand.k_stride + begin * operand.outer_stride;
  if (operand.k_stride == 1) {
    pack_rows(from, operand.outer_stride, end - begin, depth, !is_left, to);
  } else {
    pack_pairs(from, operand.k_stride, end - begin, depth, is_left, to);
  }
}

enum class Write { set, add, stream };  // stream: set, past the caches

inline void write_rows(const float (*sums)[kSquare], float* out, int64_t out_stride, int64_t rows, int64_t columns,
                       Write write) {
  for (int64_t r = 0; r < rows; ++r, out += out_stride) {
    if (columns < kSquare) {
      for (int64_t c = 0; c < columns; ++c) out[c] = write == Write::add ? out[c] + sums[r][c] : sums[r][c];
      continue;
    }
#pragma GCC unroll 2
    for (int half = 0; half < kSquare; half += kSide) {
      Sums sum, old;
      std::memcpy(&sum, sums[r] + half, sizeof(sum));
#if defined(__AVX512F__)
      if (write == Write::stream) {
        _mm512_stream_ps(out + half, (__m512)sum);
        continue;
      }
#endif
      if (write == Write::add) {
        std::memcpy(&old, out + half, sizeof(old));
        sum += old;
      }
      std::memcpy(out + half, &sum, sizeof(sum));
    }
  }
}

// A square of the result, or what is left of one at the edges; there the second panel may be the first again.
inline void square(const char* a0, const char* a1, const char* b0, const char* b1, int64_t depth, float* out,
                   int64_t out_stride, int64_t rows, int64_t columns, Write write) {
  R1K_TILE_ZERO(0);
  R1K_TILE_ZERO(1);
  R1K_TILE_ZERO(2);
  R1K_TILE_ZERO(3);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t at = k / kDepth * kTileBytes;
    R1K_TILE_LOAD(4, a0 + at, 64);
    R1K_TILE_LOAD(6, b0 + at, 64);
    R1K_TILE_MULTIPLY_ADD(0, 4, 6);
    R1K_TILE_LOAD(7, b1 + at, 64);
    R1K_TILE_MULTIPLY_ADD(1, 4, 7);
    R1K_TILE_LOAD(5, a1 + at, 64);
    R1K_TILE_MULTIPLY_ADD(2, 5, 6);
    R1K_TILE_MULTIPLY_ADD(3, 5, 7);
  }
  if (rows == kSquare && columns == kSquare && write == Write::set) {
    const int64_t stride = out_stride * static_cast<int64_t>(sizeof(float));
    R1K_TILE_STORE(0, out, stride);
    R1K_TILE_STORE(1, out + kSide, stride);
    R1K_TILE_STORE(2, out + kSide * out_stride, stride);
    R1K_TILE_STORE(3, out + kSide * out_stride + kSide, stride);
    return;
  }
  alignas(64) float sums[kSquare][kSquare];
  R1K_TILE_STORE(0, sums[0], sizeof(sums[0]));
  R1K_TILE_STORE(1, sums[0] + kSide, sizeof(sums[0]));
  R1K_TILE_STORE(2, sums[kSide], sizeof(sums[0]));
  R1K_TILE_STORE(3, sums[kSide] + kSide, sizeof(sums[0]));
  write_rows(sums, out, out_stride, rows, columns, write);
}

inline int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }

inline int64_t packed_left(int64_t rows, int64_t depth) {
  return panel_count(min(rows, kPackedRows)) * panel_stride(depth);
}

inline int64_t workspace_bytes(const Gemm& gemm, int64_t rows, int64_t columns) {
  const int64_t depth = min(gemm.k, kSlice);
  return packed_left(rows, depth) + panel_count(columns) * panel_stride(depth);
}

// Whether the result is beyond the caches, written once, and in whole lines.
inline bool may_stream(const Gemm& gemm) {
  constexpr int64_t kBeyondCaches = (32 << 20) / sizeof(float);
  return gemm.k <= kSlice && gemm.rows * gemm.columns >= kBeyondCaches && gemm.out_stride % kSide == 0 &&
         reinterpret_cast<uintptr_t>(gemm.out) % 64 == 0;
}

inline void block(const Gemm& gemm, const GemmBlock& block, void* workspace) {
  const tiles::InUse in_use;
  for (int64_t k = 0; k < gemm.k; k += kSlice) {
    const int64_t depth = min(kSlice, gemm.k - k), stride = panel_stride(depth);
    // A line of a large result would be read for nothing before it is written.
    const Write write = gemm.accumulate || k > 0 ? Write::add : may_stream(gemm) ? Write::stream : Write::set;
    char* const left = static_cast<char*>(workspace);
    char* const right = left + packed_left(block.row_end - block.row_begin, depth);
    pack(gemm.b, k, depth, block.column_begin, block.column_end, false, right);
    for (int64_t row_begin = block.row_begin; row_begin < block.row_end; row_begin += kPackedRows) {
      const int64_t row_end = min(row_begin + kPackedRows, block.row_end);
      pack(gemm.a, k, depth, row_begin, row_end, true, left);
      __asm__ volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
      for (int64_t r = row_begin; r < row_end; r += kSquare) {
        const int64_t rows = min(kSquare, row_end - r);
        const char* const a = left + (r - row_begin) / kSide * stride;
        for (int64_t c = block.column_begin; c < block.column_end; c += kSquare) {
          const int64_t columns = min(kSquare, block.column_end - c);
          const char* const b = right + (c - block.column_begin) / kSide * stride;
          square(a, rows > kSide ? a + stride : a, b, columns > kSide ? b + stride : b, depth,
                 gemm.out + r * gemm.out_stride + c, gemm.out_stride, rows, columns, write);
        }
      }
    }
  }
#if defined(__AVX512F__)
  _mm_sfence();  // streamed writes, before other threads read them
#endif
}

}  // namespace amx
}  // namespace R1K_ISA
}  // namespace r1k
