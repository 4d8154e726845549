// Matrix product with an fp32 result.  Slices of both operands along k are packed into cache-sized panels; a tile of
// the result is summed over a slice in registers and then added to memory.  The order of every sum follows from k
// alone: slices of a fixed length in order, made of runs of a fixed length in order, each summed from 0 in order.  So an
// entry has the same bits whatever the rest of the matrices, their strides, its place in a tile or the number of threads.

#include "gemm.h"

#include <type_traits>

#include "gemm_pack.h"
#include "isa.h"
#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif

namespace r1k {
namespace R1K_ISA {
namespace {

// Sums in registers, and beside them room for one row of the right panel and one lane of the left.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;
static_assert(kTileRows <= kLanes);

constexpr int64_t kPackedRows = 18 * kTileRows;  // left panels in half of the L2 cache
constexpr int64_t kRightNear = 1200 << 10;       // bytes of right panels that can be read anew for every row of tiles

constexpr int64_t kRun = 64;  // steps along k summed in one chain

// sum_k a[k][r] b[k][c] of kRows x kTileColumns lanes; the first `columns` of them reach `out`.
template <typename Product, int kRows>
void tile(const uint32_t* a, const uint32_t* b, int64_t steps, float* out, int64_t out_stride, int64_t columns,
          bool add) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    __builtin_prefetch(out + r * out_stride, 1);
    __builtin_prefetch(out + r * out_stride + kTileColumns - 1, 1);
  }
  // Two levels of sums: the rounding errors of one long chain would reach the sixth digit of a log-prob.
  alignas(64) float total[kRows][kTileColumns] = {};
  VecF sum[kRows][kTileVectors] = {};
  for (int64_t k = 0; k < steps;) {
    const int64_t run_end = k + kRun < steps ? k + kRun : steps;
    for (; k < run_end; ++k, a += kTileRows, b += kTileColumns) {
      VecU right[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) right[v] = load_unaligned<VecU>(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const VecU left = VecU{} + a[r];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Product::multiply_add(left, right[v], sum[r][v]);
      }
    }
    if (steps <= kRun) break;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        sum[r][v] += load(total[r] + v * kLanes);
        if (k == steps) continue;
        store(total[r] + v * kLanes, sum[r][v]);
        sum[r][v] = VecF{};
      }
    }
  }
  if (columns == kTileColumns) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        float* to = out + r * out_stride + v * kLanes;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
      }
    }
    return;
  }
  float edge[kRows][kTileColumns];
  std::memcpy(edge, sum, sizeof(edge));
  for (int r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      float* to = out + r * out_stride + c;
      *to = add ? *to + edge[r][c] : edge[r][c];
    }
  }
}

using Tile = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, int64_t, bool);

template <typename Product, int kRows = kTileRows>
Tile tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<Product, kRows - 1>(rows);
  }
  return tile<Product, kRows>;
}

int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t tiles(int64_t size, int64_t tile_size) { return (size + tile_size - 1) / tile_size; }

int64_t packed_left(int64_t rows, int64_t steps) {
  return tiles(min(rows, kPackedRows), kTileRows) * panel_stride<kTileRows>(steps);
}

int64_t packed_right(int64_t columns, int64_t steps) {
  return tiles(columns, kTileColumns) * panel_stride<kTileColumns>(steps);
}

// The elements of a and of b may differ in type; packed they are lanes of one kind.
template <typename Left, typename Right>
void block_of(const Gemm& gemm, const GemmBlock& block, uint32_t* workspace) {
  using Product = typename Left::Product;
  static_assert(std::is_same_v<Product, typename Right::Product>);
  static_assert(Left::kDepth == Right::kDepth && Left::kSteps == Right::kSteps);
  constexpr int64_t kSlice = Left::kSteps * Left::kDepth;
  const auto* const a = static_cast<const typename Left::Element*>(gemm.a.data);
  const auto* const b = static_cast<const typename Right::Element*>(gemm.b.data);
  for (int64_t k = 0; k < gemm.k; k += kSlice) {
    const int64_t depth = min(kSlice, gemm.k - k);
    const int64_t steps = (depth + Left::kDepth - 1) / Left::kDepth;
    const bool add = gemm.accumulate || k > 0;
    uint32_t* const left = workspace;
    uint32_t* const right = workspace + packed_left(block.row_end - block.row_begin, steps);
    const int64_t left_stride = panel_stride<kTileRows>(steps), right_stride = panel_stride<kTileColumns>(steps);
    const int64_t right_bytes = packed_right(block.column_end - block.column_begin, steps) * sizeof(uint32_t);
    pack<Right, kTileColumns>(b + k * gemm.b.k_stride + block.column_begin * gemm.b.outer_stride, gemm.b.outer_stride,
                              gemm.b.k_stride, block.column_end - block.column_begin,
                              gemm.columns - block.column_begin, depth, right);
    for (int64_t row_begin = block.row_begin; row_begin < block.row_end; row_begin += kPackedRows) {
      const int64_t row_end = min(row_begin + kPackedRows, block.row_end);
      pack<Left, kTileRows>(a + k * gemm.a.k_stride + row_begin * gemm.a.outer_stride, gemm.a.outer_stride,
                            gemm.a.k_stride, row_end - row_begin, gemm.rows - row_begin, depth, left);
      const auto compute = [&](int64_t r, int64_t c) {
        tile_of<Product>(row_end - r)(left + (r - row_begin) / kTileRows * left_stride,
                                    right + (c - block.column_begin) / kTileColumns * right_stride, steps,
                                    gemm.out + r * gemm.out_stride + c, gemm.out_stride,
                                    min(kTileColumns, block.column_end - c), add);
      };
      // Where k is long, a right panel stays in the L1 cache while the left ones pass.  Where it is short the traffic
      // of the result counts more, and its rows are visited front to back.
      if (right_bytes <= kRightNear) {
        for (int64_t r = row_begin; r < row_end; r += kTileRows) {
          for (int64_t c = block.column_begin; c < block.column_end; c += kTileColumns) compute(r, c);
        }
      } else {
        for (int64_t c = block.column_begin; c < block.column_end; c += kTileColumns) {
          for (int64_t r = row_begin; r < row_end; r += kTileRows) compute(r, c);
        }
      }
    }
  }
}

#if defined(__AVX512BF16__)
using BFloat16Lanes = BFloat16Pairs;
#else
using BFloat16Lanes = FloatLanes<BFloat16>;
#endif

#if defined(__AMX_BF16__)
bool on_tiles(const Gemm& gemm) {
  const DType a = gemm.a.dtype, b = gemm.b.dtype;
  if (a == DType::float16 || b == DType::float16) return false;
  return a == DType::bfloat16 || b == DType::bfloat16 || gemm.coarse;
}
#endif

int64_t workspace_bytes(const Gemm& gemm, int64_t rows, int64_t columns) {
#if defined(__AMX_BF16__)
  if (on_tiles(gemm)) return amx::workspace_bytes(gemm, rows, columns);
#endif
  const bool pairs = gemm.a.dtype == DType::bfloat16 && gemm.b.dtype == DType::bfloat16;
  const int64_t steps = min(gemm.k, pairs ? BFloat16Lanes::kSteps : FloatLanes<float>::kSteps);
  return (packed_left(rows, steps) + packed_right(columns, steps)) * static_cast<int64_t>(sizeof(uint32_t));
}

void block(const Gemm& gemm, const GemmBlock& block, void* workspace) {
#if defined(__AMX_BF16__)
  if (on_tiles(gemm)) return amx::block(gemm, block, workspace);
#endif
  uint32_t* const lanes = static_cast<uint32_t*>(workspace);
  using Float32 = FloatLanes<float>;
  switch (gemm.a.dtype) {
    case DType::float32:
      switch (gemm.b.dtype) {
        case DType::float32: return block_of<Float32, Float32>(gemm, block, lanes);
        case DType::bfloat16: return block_of<Float32, FloatLanes<BFloat16>>(gemm, block, lanes);
        case DType::float16: return block_of<Float32, FloatLanes<Float16>>(gemm, block, lanes);
      }
      return;
    case DType::bfloat16:
      if (gemm.b.dtype == DType::float32) return block_of<FloatLanes<BFloat16>, Float32>(gemm, block, lanes);
      return block_of<BFloat16Lanes, BFloat16Lanes>(gemm, block, lanes);
    case DType::float16:
      if (gemm.b.dtype == DType::float32) return block_of<FloatLanes<Float16>, Float32>(gemm, block, lanes);
      return block_of<FloatLanes<Float16>, FloatLanes<Float16>>(gemm, block, lanes);
  }
}

GemmTile tile_size([[maybe_unused]] const Gemm& gemm) {
#if defined(__AMX_BF16__)
  if (on_tiles(gemm)) return amx::tile_size(gemm);
#endif
  return {kTileRows, kTileColumns, 1024, 30};
}

}  // namespace

const GemmKernels gemm_kernels = {block, workspace_bytes, tile_size};

}  // namespace R1K_ISA
}  // namespace r1k
