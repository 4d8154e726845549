// Matrix product of bfloat16 with an fp32 result on matrix tiles (AMX).  One instruction adds the product of a 16 x 32
// and a 32 x 16 tile to 16 x 16 sums.  Slices of both operands along k are packed into panels of such tiles; a square
// of 2 x 2 tiles of the result is summed over a slice in registers and then added to memory.  As in gemm.cpp, the order
// of every sum follows from k alone.
//
// A float32 operand beside a bfloat16 one is packed as three bfloat16 parts, whose sum it is (gemm_amx_pack.h), and the
// products of the parts are added, those of the small parts first.  Of two float32 operands, where a coarse product is
// enough, two parts each are multiplied, but not the small ones with each other: an error below 2^-16 of each term.
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

// Which parts are multiplied, in order, and whether their tiles must be loaded.
struct Product {
  int left, right;
  bool load_left, load_right;
};
template <int kLeftParts, int kRightParts>
constexpr Product kProducts[] = {{0, 0, true, true}};
template <>
constexpr Product kProducts<3, 1>[] = {{2, 0, true, true}, {1, 0, true, false}, {0, 0, true, true}};
template <>
constexpr Product kProducts<1, 3>[] = {{0, 2, true, true}, {0, 1, false, true}, {0, 0, true, true}};
template <>
constexpr Product kProducts<2, 2>[] = {{1, 0, true, true}, {0, 1, true, true}, {0, 0, false, true}};

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
  for (int64_t k = 0; k < depth; k += kDepth) {
#pragma GCC unroll 3
    for (const Product& parts : kProducts<kLeftParts, kRightParts>) {
      // A small part may be 0, and 0 * inf would be NaN: an operand that is not split has its finite panels there.
      const char* const* const left = kLeftParts == 1 && parts.right > 0 ? a.finite : a.part;
      const char* const* const right = kRightParts == 1 && parts.left > 0 ? b.finite : b.part;
      const int64_t left_at = (k / kDepth * kLeftParts + parts.left) * kTileBytes;
      const int64_t right_at = (k / kDepth * kRightParts + parts.right) * kTileBytes;
      if (parts.load_left) R1K_TILE_LOAD(4, left[0] + left_at, 64);
      if (parts.load_right) R1K_TILE_LOAD(6, right[0] + right_at, 64);
      R1K_TILE_MULTIPLY_ADD(0, 4, 6);
      if (parts.load_right) R1K_TILE_LOAD(7, right[1] + right_at, 64);
      R1K_TILE_MULTIPLY_ADD(1, 4, 7);
      if (parts.load_left) R1K_TILE_LOAD(5, left[1] + left_at, 64);
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

// Two panels, from `first` on.  With at most 16 rows or columns there is only one, and it stands for both.
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

// Calls `run` with how the operands are packed: both are bfloat16, or one is and the other float32, or both float32.
template <typename Run>
auto with_parts(const Gemm& gemm, Run run) {
  const bool wide_a = gemm.a.dtype == DType::float32, wide_b = gemm.b.dtype == DType::float32;
  if (wide_a && wide_b) return run(Split<2>{}, Split<2>{});
  if (wide_a) return run(Split<3>{}, Whole{});
  if (wide_b) return run(Whole{}, Split<3>{});
  return run(Whole{}, Whole{});
}

inline int64_t workspace_bytes(const Gemm& gemm, int64_t rows, int64_t columns) {
  return with_parts(gemm, [&](auto left, auto right) {
    using Sizes = Layout<decltype(left)::kParts, decltype(right)::kParts>;
    return Sizes(rows, columns, min(gemm.k, Sizes::kDepthOfSlice)).bytes;
  });
}

inline GemmTile tile_size(const Gemm& gemm) {
  return {kSquare, kSquare, gemm.b.dtype == DType::float32 ? kSplitBlockColumns : kBlockColumns, 300};
}

inline void block(const Gemm& gemm, const GemmBlock& block, void* workspace) {
  with_parts(gemm, [&](auto left, auto right) {
    block_of<decltype(left), decltype(right)>(gemm, block, static_cast<char*>(workspace));
  });
}

}  // namespace amx
}  // namespace R1K_ISA
}  // namespace r1k
