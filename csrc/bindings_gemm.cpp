// The matrix product over PyTorch's stable ABI: check, cut into blocks, launch, register.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
  return {matrix.data_ptr(), outer_stride, k_stride};
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

// Memory for packed operands, a few MiB for each thread of a product at most, as blocks are bounded.  It is kept for the
// next product.  Panels in huge pages do not meet in the same sets of the L2 cache.
class Workspaces {
 public:
  class Workspace {
   public:
    explicit Workspace(int64_t bytes) : bytes_(ceil_div(bytes, kHugePage) * kHugePage) {
      memory_.reset(::operator new(bytes_, std::align_val_t(kHugePage)));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      madvise(memory_.get(), bytes_, MADV_HUGEPAGE);
#endif
    }
    void* get() const { return memory_.get(); }
    int64_t bytes() const { return bytes_; }

   private:
    static constexpr int64_t kHugePage = 2 << 20;
    struct Delete {
      void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kHugePage)); }
    };
    int64_t bytes_;
    std::unique_ptr<void, Delete> memory_;
  };

  Workspace take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!free_.empty()) {
      Workspace last = std::move(free_.back());
      free_.pop_back();
      if (last.bytes() >= bytes) return last;  // one that is too small makes room for a larger one
    }
    return Workspace(bytes);
  }

  void give_back(Workspace workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace));
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.clear();
  }

 private:
  std::mutex mutex_;
  std::vector<Workspace> free_;
};

Workspaces& workspaces() {
  static Workspaces* const all = new Workspaces;  // never destroyed: threads may outlive static objects
  return *all;
}

void gemm_f32(Tensor a, Tensor b, Tensor out, bool accumulate) {
  R1K_CHECK(a.dim() == 2 && b.dim() == 2 && out.dim() == 2, "a, b and out must be matrices, got ", a.dim(), ", ",
            b.dim(), " and ", out.dim(), " dimensions");
  R1K_CHECK(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1), "a is (", a.size(0), ", ",
            a.size(1), "), b is (", b.size(0), ", ", b.size(1), ") and out is (", out.size(0), ", ", out.size(1),
            "), expected (M, K), (K, N) and (M, N)");
  R1K_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have the same dtype");
  R1K_CHECK(out.scalar_type() == ScalarType::Float, "out must be float32");
  R1K_CHECK((out.stride(1) == 1 || out.size(1) <= 1) && (out.stride(0) >= out.size(1) || out.size(0) <= 1),
            "out has strides (", out.stride(0), ", ", out.stride(1),
            "), expected columns of stride 1 and rows that do not overlap");
  r1k::Gemm gemm;
  switch (a.scalar_type()) {
    case ScalarType::Float: gemm.dtype = r1k::DType::float32; break;
    case ScalarType::BFloat16: gemm.dtype = r1k::DType::bfloat16; break;
    case ScalarType::Half: gemm.dtype = r1k::DType::float16; break;
    default: R1K_CHECK(false, "a and b must be float32, bfloat16 or float16");
  }
  gemm.rows = a.size(0);
  gemm.columns = b.size(1);
  gemm.k = a.size(1);
  gemm.a = operand(a, "a", 0);
  gemm.b = operand(b, "b", 1);
  gemm.out = static_cast<float*>(out.data_ptr());
  gemm.out_stride = out.stride(0);
  gemm.accumulate = accumulate;
  if (gemm.rows == 0 || gemm.columns == 0) return;
  if (gemm.k == 0) {
    for (int64_t r = 0; r < gemm.rows && !accumulate; ++r) {
      std::memset(gemm.out + r * gemm.out_stride, 0, gemm.columns * sizeof(float));
    }
    return;
  }

  const r1k::GemmKernels& kernels = *r1k::active_kernels()->gemm;
  const Cut size = cut(gemm, kernels.tile(gemm.dtype), torch::stable::get_num_threads());
  const int64_t row_blocks = ceil_div(gemm.rows, size.rows), blocks = size.blocks(gemm);
  const int64_t bytes = kernels.workspace_bytes(gemm, size.rows, size.columns);
  parallel_parts(blocks, [&](const auto& next) {
    Workspaces::Workspace workspace = workspaces().take(bytes);
    for (int64_t block = next(); block >= 0; block = next()) {
      const int64_t row = block % row_blocks * size.rows, column = block / row_blocks * size.columns;
      kernels.block(gemm,
                    {row, std::min(row + size.rows, gemm.rows), column, std::min(column + size.columns, gemm.columns)},
                    workspace.get());
    }
    workspaces().give_back(std::move(workspace));
  });
}

}  // namespace

void r1k::bindings::release_gemm_workspaces() { workspaces().release(); }

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) { m.impl("gemm_f32", TORCH_BOX(&gemm_f32)); }
