// The matrix product over PyTorch's stable ABI: check, cut into blocks, launch, register.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "bindings.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace {

using namespace r1k::bindings;

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The stride of a dimension of size 1 is never used: it counts as 1.
r1k::GemmOperand operand(const Tensor& matrix, const char* name, int outer) {
  const int64_t outer_stride = matrix.size(outer) == 1 ? 1 : matrix.stride(outer);
  const int64_t k_stride = matrix.size(1 - outer) == 1 ? 1 : matrix.stride(1 - outer);
  R1K_CHECK(matrix.numel() == 0 || outer_stride == 1 || k_stride == 1, name, " has strides (", matrix.stride(0), ", ",
            matrix.stride(1), "), expected one of them to be 1");
  return {dtype_of(matrix, name), matrix.data_ptr(), outer_stride, k_stride};
}

// How the result is cut into blocks.  The cut changes no bits: it only weighs the cost of packing, which falls with
// the size of a block, against threads without work.
struct Cut {
  int64_t rows, columns;  // of a block

  int64_t blocks(const r1k::Gemm& gemm) const { return ceil_div(gemm.rows, rows) * ceil_div(gemm.columns, columns); }
};

Cut cut(const r1k::Gemm& gemm, const r1k::GemmTile& tile, int64_t threads) {
  constexpr int64_t kMaxRows = 2048;         // 4 to 8 MiB of result
  constexpr double kWorthAThread = 1 << 20;  // multiplications: some 10 microseconds
  const double work = static_cast<double>(gemm.rows) * gemm.columns * gemm.k;
  const int64_t useful_threads = std::max<int64_t>(1, std::min<double>(threads, work / kWorthAThread));
  int64_t row_cuts = ceil_div(gemm.rows, kMaxRows), column_cuts = ceil_div(gemm.columns, tile.max_block_columns);
  for (;;) {
    const Cut result = {ceil_div(ceil_div(gemm.rows, row_cuts), tile.rows) * tile.rows,
                        ceil_div(ceil_div(gemm.columns, column_cuts), tile.columns) * tile.columns};
    const int64_t blocks = result.blocks(gemm);
    const bool balanced = blocks >= 4 * useful_threads || blocks % useful_threads == 0;
    const bool rows_left = result.rows > tile.rows, columns_left = result.columns > tile.columns;
    if (balanced || !(rows_left || columns_left)) return result;
    if (columns_left && (result.columns >= result.rows || !rows_left)) {
      ++column_cuts;
    } else {
      ++row_cuts;
    }
  }
}

// Memory for packed operands that a thread keeps between calls: a few MiB at most, as blocks are bounded.  Panels in
// huge pages do not meet in the same sets of the L2 cache.
class Workspace {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = ceil_div(bytes, kHugePage) * kHugePage;
      memory_.reset(::operator new(bytes_, std::align_val_t(kHugePage)));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      madvise(memory_.get(), bytes_, MADV_HUGEPAGE);
#endif
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kHugePage = 2 << 20;
  struct Delete {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kHugePage)); }
  };
  std::unique_ptr<void, Delete> memory_;
  int64_t bytes_ = 0;
};

void gemm_f32(Tensor a, Tensor b, Tensor out, bool accumulate, bool coarse) {
  R1K_CHECK(a.dim() == 2 && b.dim() == 2 && out.dim() == 2, "a, b and out must be matrices, got ", a.dim(), ", ",
            b.dim(), " and ", out.dim(), " dimensions");
  R1K_CHECK(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1), "a is (", a.size(0), ", ",
            a.size(1), "), b is (", b.size(0), ", ", b.size(1), ") and out is (", out.size(0), ", ", out.size(1),
            "), expected (M, K), (K, N) and (M, N)");
  R1K_CHECK(out.scalar_type() == ScalarType::Float, "out must be float32");
  R1K_CHECK((out.stride(1) == 1 || out.size(1) <= 1) && (out.stride(0) >= out.size(1) || out.size(0) <= 1),
            "out has strides (", out.stride(0), ", ", out.stride(1),
            "), expected columns of stride 1 and rows that do not overlap");
  r1k::Gemm gemm;
  gemm.rows = a.size(0);
  gemm.columns = b.size(1);
  gemm.k = a.size(1);
  gemm.a = operand(a, "a", 0);
  gemm.b = operand(b, "b", 1);
  R1K_CHECK(gemm.a.dtype == gemm.b.dtype || gemm.a.dtype == r1k::DType::float32 || gemm.b.dtype == r1k::DType::float32,
            "a and b are bfloat16 and float16, expected one dtype, or float32 beside a 16-bit dtype");
  gemm.out = static_cast<float*>(out.data_ptr());
  gemm.out_stride = out.stride(0);
  gemm.accumulate = accumulate;
  gemm.coarse = coarse;
  if (gemm.rows == 0 || gemm.columns == 0) return;
  if (gemm.k == 0) {
    for (int64_t r = 0; r < gemm.rows && !accumulate; ++r) {
      std::memset(gemm.out + r * gemm.out_stride, 0, gemm.columns * sizeof(float));
    }
    return;
  }

  // A result that is written, not added to, is fresh memory more often than not.
  if (!accumulate) {
    prefer_huge_pages(gemm.out, ((gemm.rows - 1) * gemm.out_stride + gemm.columns) * int64_t{sizeof(float)});
  }
  const r1k::GemmKernels& kernels = *r1k::active_kernels()->gemm;
  const Cut size = cut(gemm, kernels.tile(gemm), torch::stable::get_num_threads());
  const int64_t row_blocks = ceil_div(gemm.rows, size.rows), blocks = size.blocks(gemm);
  const int64_t bytes = kernels.workspace_bytes(gemm, size.rows, size.columns);
  // Blocks go to whoever is free: a thread that was kept waiting does not keep the others.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(blocks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    static thread_local Workspace kept;
    void* const workspace = kept.at_least(bytes);
    for (int64_t block = next++; block < blocks; block = next++) {
      const int64_t row = block % row_blocks * size.rows, column = block / row_blocks * size.columns;
      kernels.block(gemm,
                    {row, std::min(row + size.rows, gemm.rows), column, std::min(column + size.columns, gemm.columns)},
                    workspace);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) { m.impl("gemm_f32", TORCH_BOX(&gemm_f32)); }
