// The matrix product over PyTorch's stable ABI: check, cut into blocks, launch, register.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __unix__
#include <pthread.h>
#endif
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
  return {dtype_of(matrix, name), matrix.data_ptr(), outer_stride, k_stride};
}

// Elements along k whose products are summed apart where a sum is long, as one over the vocabulary is.  Threads share
// the groups, and their sums are added in order: the bits of the result depend on k alone.
constexpr int64_t kGroup = 4096, kLong = 16384;

// How the result is cut into blocks.  The cut changes no bits.
struct Cut {
  int64_t rows, columns;  // of a block

  int64_t blocks(const r1k::Gemm& gemm) const { return ceil_div(gemm.rows, rows) * ceil_div(gemm.columns, columns); }
};

// The cut that ends first.  A block costs its multiplications and the packing of both operands, which is repeated in
// every block of a row or column; and threads that are done wait for the last block.  `groups` are computed at a time.
Cut cut(const r1k::Gemm& gemm, const r1k::GemmTile& tile, int64_t groups, int64_t threads) {
  constexpr int64_t kMaxRows = 2048;         // 4 to 8 MiB of result
  constexpr double kWorthAThread = 1 << 20;  // multiplications: some 10 microseconds
  // Of the last block, the share that threads wait for: they rarely start together, and one may be kept waiting.
  constexpr double kWaiting = 0.25;
  const double work = static_cast<double>(gemm.rows) * gemm.columns * gemm.k;
  const int64_t useful = std::max<int64_t>(1, std::min<double>(threads, work / kWorthAThread));
  const int64_t row_cuts = ceil_div(gemm.rows, kMaxRows), column_cuts = ceil_div(gemm.columns, tile.max_block_columns);
  Cut best = {};
  double best_cost = 0;
  for (int64_t r : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
    for (int64_t c : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
      const Cut result = {ceil_div(ceil_div(gemm.rows, row_cuts * r), tile.rows) * tile.rows,
                          ceil_div(ceil_div(gemm.columns, column_cuts * c), tile.columns) * tile.columns};
      const double block = static_cast<double>(result.rows) * result.columns +
                           static_cast<double>(tile.pack_cost) * (result.rows + result.columns);
      const double rounds = static_cast<double>(ceil_div(result.blocks(gemm) * groups, useful));
      const double cost = block * (rounds + (useful > 1 ? kWaiting : 0));
      if (best.rows == 0 || cost < best_cost) {
        best = result;
        best_cost = cost;
      }
    }
  }
  return best;
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

  // The smallest that is large enough.  If all are too small, the largest of them makes room for a new one.
  Workspace take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = std::find_if(free_.begin(), free_.end(), [&](const Workspace& w) { return w.bytes() >= bytes; });
    const bool fits = found != free_.end();
    if (!fits && free_.empty()) return Workspace(bytes);
    if (!fits) --found;
    Workspace taken = std::move(*found);
    free_.erase(found);
    return fits ? std::move(taken) : Workspace(bytes);
  }

  void give_back(Workspace workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = std::find_if(free_.begin(), free_.end(),
                                    [&](const Workspace& w) { return w.bytes() >= workspace.bytes(); });
    free_.insert(place, std::move(workspace));
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.clear();
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  std::vector<Workspace> free_;  // the smallest first
};

Workspaces& workspaces();

// A process that forks while another of its threads takes a workspace would leave the child a lock that nobody releases.
Workspaces* new_workspaces() {
#ifdef __unix__
  pthread_atfork([] { workspaces().lock(); }, [] { workspaces().unlock(); }, [] { workspaces().unlock(); });
#endif
  return new Workspaces;
}

Workspaces& workspaces() {
  static Workspaces* const all = new_workspaces();  // never destroyed: threads may outlive static objects
  return *all;
}

// Products of one shape at the same time, block by block.  finished(block) is called when a block of all of them is done.
// The last blocks are cut into parts, so that no thread waits long for another.
template <typename Finished>
void multiply(const std::vector<r1k::Gemm>& gemms, const Finished& finished) {
  constexpr int64_t kParts = 4;
  const r1k::Gemm& first = gemms.front();
  const r1k::GemmKernels& kernels = *r1k::active_kernels()->gemm;
  const r1k::GemmTile tile = kernels.tile(first);
  const int64_t threads = torch::stable::get_num_threads(), groups = static_cast<int64_t>(gemms.size());
  const Cut size = cut(first, tile, groups, threads);
  const int64_t row_blocks = ceil_div(first.rows, size.rows), blocks = size.blocks(first), all = blocks * groups;
  const int64_t part_rows = ceil_div(ceil_div(size.rows, kParts), tile.rows) * tile.rows;
  const int64_t in_parts = threads > 1 ? std::min(all, threads) : 0, whole = all - in_parts;
  const int64_t bytes = kernels.workspace_bytes(first, size.rows, size.columns);
  std::vector<std::atomic<int64_t>> left(blocks);
  for (std::atomic<int64_t>& rows : left) rows = groups * size.rows;
  parallel_parts(whole + in_parts * kParts, [&](const auto& next) {
    Workspaces::Workspace workspace = workspaces().take(bytes);
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t index = task < whole ? task : whole + (task - whole) / kParts;
      const int64_t block = index % blocks;
      const int64_t row = block % row_blocks * size.rows, column = block / row_blocks * size.columns;
      r1k::GemmBlock place = {row, std::min(row + size.rows, first.rows), column,
                              std::min(column + size.columns, first.columns)};
      int64_t done = size.rows;
      if (task >= whole) {
        const int64_t begin = std::min((task - whole) % kParts * part_rows, size.rows);
        const int64_t end = std::min(begin + part_rows, size.rows);
        done = end - begin;
        place.row_begin = std::min(row + begin, place.row_end);
        place.row_end = std::min(row + end, place.row_end);
      }
      if (place.row_begin < place.row_end) kernels.block(gemms[index / blocks], place, workspace.get());
      if (left[block].fetch_sub(done, std::memory_order_acq_rel) == done && done > 0) {
        finished(r1k::GemmBlock{row, std::min(row + size.rows, first.rows), column,
                                std::min(column + size.columns, first.columns)});
      }
    }
    workspaces().give_back(std::move(workspace));
  });
}

// Without the elements along k before `begin`.
r1k::GemmOperand from_k(const r1k::GemmOperand& operand, int64_t begin) {
  r1k::GemmOperand part = operand;
  part.data = static_cast<const char*>(operand.data) + begin * operand.k_stride * r1k::size_of(operand.dtype);
  return part;
}

// A long sum, in groups along k.  As many groups as memory allows are computed at the same time, each in a separate
// buffer; then they are added in order.
void multiply_in_groups(const r1k::Gemm& gemm, int64_t groups) {
  constexpr int64_t kMemory = 64 << 20;
  const int64_t size = gemm.rows * gemm.columns;
  const int64_t together =
      std::clamp<int64_t>(kMemory / (size * static_cast<int64_t>(sizeof(float))), 1, groups);
  Workspaces::Workspace memory = workspaces().take(together * size * static_cast<int64_t>(sizeof(float)));
  float* const sums = static_cast<float*>(memory.get());
  for (int64_t first = 0; first < groups; first += together) {
    const int64_t count = std::min(together, groups - first);
    std::vector<r1k::Gemm> parts;
    for (int64_t g = 0; g < count; ++g) {
      const int64_t begin = (first + g) * kGroup;
      r1k::Gemm part = gemm;
      part.a = from_k(gemm.a, begin);
      part.b = from_k(gemm.b, begin);
      part.k = std::min(kGroup, gemm.k - begin);
      part.out = sums + g * size;
      part.out_stride = gemm.columns;
      part.accumulate = false;
      parts.push_back(part);
    }
    const bool add = gemm.accumulate || first > 0;
    multiply(parts, [&](const r1k::GemmBlock& block) {
      const int64_t columns = block.column_end - block.column_begin;
      for (int64_t r = block.row_begin; r < block.row_end; ++r) {
        float* const out = gemm.out + r * gemm.out_stride + block.column_begin;
        for (int64_t g = 0; g < count; ++g) {
          const float* const sum = sums + g * size + r * gemm.columns + block.column_begin;
          if (g == 0 && !add) {
            std::memcpy(out, sum, columns * sizeof(float));
          } else {
            for (int64_t c = 0; c < columns; ++c) out[c] += sum[c];
          }
        }
      }
    });
  }
  workspaces().give_back(std::move(memory));
}

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

  const int64_t groups = gemm.k > kLong ? ceil_div(gemm.k, kGroup) : 1;
  if (groups == 1) {
    multiply({gemm}, [](const r1k::GemmBlock&) {});
  } else {
    multiply_in_groups(gemm, groups);
  }
}

}  // namespace

void r1k::bindings::release_gemm_workspaces() { workspaces().release(); }

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) { m.impl("gemm_f32", TORCH_BOX(&gemm_f32)); }
