// Matrix product of bfloat16 with an fp32 result on matrix tiles (AMX).  One instruction adds the product of a 16 x 32
// and a 32 x 16 tile to 16 x 16 sums.  Slices of both operands along k are packed into panels of such tiles; a square
// of 2 x 2 tiles of the result is summed over a slice in registers and then added to memory.  As in gemm.cpp, the order
// of every sum follows from k alone.
//
// A float32 operand beside a bfloat16 one is packed as three bfloat16 parts, whose sum it is (gemm_amx_pack.h), and the
// products of the parts are added, those of the small parts first.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "gemm.h"
#include "gemm_amx_pack.h"
#include "tiles.h"

namespace r1k {
namespace R1K_ISA {
namespace amx {

// Elements along k in a slice.  In registers the products of 32 elements are one term, so a chain has 32 terms, or 48
// with an operand in three parts.
template <int kParts>
constexpr int64_t kSlice = kParts == 1 ? 1024 : 512;
// Packed, the columns of a block take at most 1 MiB, and these rows 384 KiB. Both stay in the L2 cache.
constexpr int64_t kBlockColumns = 512, kSplitBlockColumns = 320;
constexpr int64_t kPackedRows = 128;

typedef float Sums __attribute__((vector_size(64)));

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

// The panels of two times 16 rows or columns.  `finite` are the same without infinities.
struct Panels {
  const char* part[2];
  const char* finite[2];
};

// A square of the result, or what is left of one at the edges; there the second panel may be the first again.
template <int kLeftParts, int kRightParts>
void square(const Panels& a, const Panels& b, int64_t depth, float* out, int64_t out_stride, int64_t rows,
            int64_t columns, Write write) {
  R1K_TILE_ZERO(0);
  R1K_TILE_ZERO(1);
  R1K_TILE_ZERO(2);
  R1K_TILE_ZERO(3);
  constexpr int kMostParts = kLeftParts > kRightParts ? kLeftParts : kRightParts;
  for (int64_t k = 0; k < depth; k += kDepth) {
#pragma GCC unroll 3
    for (int part = kMostParts - 1; part >= 0; --part) {
      // The second and third parts may be 0, and 0 * inf would be NaN: the other operand has its finite panels there,
      // whose tiles stay in registers from the third part to the second.
      const char* const* const left = part > 0 && kLeftParts == 1 ? a.finite : a.part;
      const char* const* const right = part > 0 && kRightParts == 1 ? b.finite : b.part;
      const int64_t left_at = (k / kDepth * kLeftParts + (kLeftParts > 1 ? part : 0)) * kTileBytes;
      const int64_t right_at = (k / kDepth * kRightParts + (kRightParts > 1 ? part : 0)) * kTileBytes;
      if (kLeftParts > 1 || part != 1) R1K_TILE_LOAD(4, left[0] + left_at, 64);
      if (kRightParts > 1 || part != 1) R1K_TILE_LOAD(6, right[0] + right_at, 64);
      R1K_TILE_MULTIPLY_ADD(0, 4, 6);
      if (kRightParts > 1 || part != 1) R1K_TILE_LOAD(7, right[1] + right_at, 64);
      R1K_TILE_MULTIPLY_ADD(1, 4, 7);
      if (kLeftParts > 1 || part != 1) R1K_TILE_LOAD(5, left[1] + left_at, 64);
      R1K_TILE_MULTIPLY_ADD(2, 5, 6);
      R1K_TILE_MULTIPLY_ADD(3, 5, 7);
    }
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

// The workspace: packed rows, packed columns, and two panels without infinities.
template <int kLeftParts, int kRightParts>
struct Layout {
  static constexpr int64_t kDepthOfSlice = kSlice<(kLeftParts > kRightParts ? kLeftParts : kRightParts)>;

  int64_t left_stride, right_stride, right, finite, bytes;

  Layout(int64_t rows, int64_t columns, int64_t depth)
      : left_stride(panel_stride(depth, kLeftParts)),
        right_stride(panel_stride(depth, kRightParts)),
        right(panel_count(min(rows, kPackedRows)) * left_stride),
        finite(right + panel_count(columns) * right_stride),
        bytes(finite + (kLeftParts != kRightParts ? 2 * panel_stride(depth, 1) : 0)) {}
};

// Whether the result is beyond the caches, written once, and in whole lines.
inline bool may_stream(const Gemm& gemm, int64_t slice) {
  constexpr int64_t kBeyondCaches = (32 << 20) / sizeof(float);
  return gemm.k <= slice && gemm.rows * gemm.columns >= kBeyondCaches && gemm.out_stride % kSide == 0 &&
         reinterpret_cast<uintptr_t>(gemm.out) % 64 == 0;
}

// The two panels from `first`, the second only if there are so many rows or columns.
inline Panels panels(const char* first, int64_t stride, int64_t outers, bool infinite, char* finite) {
  const char* const second = outers > kSide ? first + stride : first;
  Panels result = {{first, second}, {first, second}};
  if (infinite) {
    for (int panel = 0; panel < 2; ++panel, finite += stride) {
      copy_finite(result.part[panel], stride, finite);
      result.finite[panel] = finite;
    }
    __asm__ volatile("" ::: "memory");
  }
  return result;
}

template <typename Left, typename Right>
void block_of(const Gemm& gemm, const GemmBlock& block, char* workspace) {
  using Sizes = Layout<Left::kParts, Right::kParts>;
  const tiles::InUse in_use;
  for (int64_t k = 0; k < gemm.k; k += Sizes::kDepthOfSlice) {
    const int64_t depth = min(Sizes::kDepthOfSlice, gemm.k - k);
    const Sizes sizes(block.row_end - block.row_begin, block.column_end - block.column_begin, depth);
    // A line of a large result would be read for nothing before it is written.
    const Write write =
        gemm.accumulate || k > 0 ? Write::add : may_stream(gemm, Sizes::kDepthOfSlice) ? Write::stream : Write::set;
    char* const left = workspace;
    char* const right = workspace + sizes.right;
    char* const finite = workspace + sizes.finite;
    pack<Right>(gemm.b, k, depth, block.column_begin, block.column_end, false, right);
    const bool infinite_right =
        Left::kParts > Right::kParts && has_infinity(right, sizes.finite - sizes.right);
    for (int64_t row_begin = block.row_begin; row_begin < block.row_end; row_begin += kPackedRows) {
      const int64_t row_end = min(row_begin + kPackedRows, block.row_end);
      pack<Left>(gemm.a, k, depth, row_begin, row_end, true, left);
      const bool infinite_left =
          Right::kParts > Left::kParts && has_infinity(left, panel_count(row_end - row_begin) * sizes.left_stride);
      __asm__ volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
      for (int64_t r = row_begin; r < row_end; r += kSquare) {
        const int64_t rows = min(kSquare, row_end - r);
        const Panels a = panels(left + (r - row_begin) / kSide * sizes.left_stride, sizes.left_stride, rows,
                                infinite_left, finite);
        for (int64_t c = block.column_begin; c < block.column_end; c += kSquare) {
          const int64_t columns = min(kSquare, block.column_end - c);
          const Panels b = panels(right + (c - block.column_begin) / kSide * sizes.right_stride, sizes.right_stride,
                                  columns, infinite_right, finite);
          square<Left::kParts, Right::kParts>(a, b, depth, gemm.out + r * gemm.out_stride + c, gemm.out_stride, rows,
                                              columns, write);
        }
      }
    }
  }
#if defined(__AVX512F__)
  _mm_sfence();  // streamed writes, before other threads read them
#endif
}

template <typename Left, typename Right>
int64_t bytes_of(const Gemm& gemm, int64_t rows, int64_t columns) {
  using Sizes = Layout<Left::kParts, Right::kParts>;
  return Sizes(rows, columns, min(gemm.k, Sizes::kDepthOfSlice)).bytes;
}

inline int64_t workspace_bytes(const Gemm& gemm, int64_t rows, int64_t columns) {
  if (gemm.a.dtype == DType::float32) return bytes_of<Thirds, Whole>(gemm, rows, columns);
  if (gemm.b.dtype == DType::float32) return bytes_of<Whole, Thirds>(gemm, rows, columns);
  return bytes_of<Whole, Whole>(gemm, rows, columns);
}

inline GemmTile tile_size(const Gemm& gemm) {
  return {kSquare, kSquare, gemm.b.dtype == DType::float32 ? kSplitBlockColumns : kBlockColumns};
}

// Operands are bfloat16, or one is and the other float32.
inline void block(const Gemm& gemm, const GemmBlock& block, void* workspace) {
  char* const memory = static_cast<char*>(workspace);
  if (gemm.a.dtype == DType::float32) return block_of<Thirds, Whole>(gemm, block, memory);
  if (gemm.b.dtype == DType::float32) return block_of<Whole, Thirds>(gemm, block, memory);
  return block_of<Whole, Whole>(gemm, block, memory);
}

}  // namespace amx
}  // namespace R1K_ISA
}  // namespace r1k
