// What finishes gradients on the CPU, over PyTorch's stable ABI: check, cut into parts, launch, register.

#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cpu/accumulate.h"
#include "cpu/isa.h"

namespace {

using namespace r1k::bindings;

// Entries: about a millisecond of work.  If other processes are running, waiting for a second thread can take longer
// than less work than this.
constexpr int64_t kWorthAThread = 1 << 20;

void scaled(Tensor grad, Tensor factor, Tensor out, bool accumulate) {
  R1K_CHECK(grad.is_contiguous(), "grad must be contiguous");
  R1K_CHECK(out.is_contiguous(), "out must be contiguous");
  R1K_CHECK(out.numel() == grad.numel(), "out has ", out.numel(), " elements, expected ", grad.numel(), " like grad");
  r1k::Scaled args;
  args.grad = grad.data_ptr();
  args.grad_dtype = dtype_of(grad, "grad");
  args.factor = *floats(factor, "factor", 1);
  args.out = out.data_ptr();
  args.out_dtype = dtype_of(out, "out");
  args.accumulate = accumulate;
  const int64_t count = grad.numel();
  constexpr int64_t kBeyondCaches = 32 << 20;
  args.stream = !accumulate && args.out != args.grad && count * r1k::size_of(args.out_dtype) >= kBeyondCaches;
  const auto run = r1k::active_kernels()->accumulate->scaled;
  parallel_ranges(count, kWorthAThread, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

void add_rows(Tensor out, Tensor ids, Tensor factors, Tensor rows) {
  R1K_CHECK(out.dim() == 2 && rows.dim() == 2 && out.size(1) == rows.size(1), "out and rows must be (V, H) and (N, H)");
  R1K_CHECK(out.is_contiguous() && out.scalar_type() == ScalarType::Float, "out must be contiguous float32");
  R1K_CHECK(rows.stride(1) == 1 || rows.size(1) <= 1, "rows must have adjacent columns");
  r1k::AddRows args;
  args.count = rows.size(0);
  args.out = static_cast<float*>(out.data_ptr());
  args.out_stride = out.size(1);
  args.ids = data<int64_t>(ids, "ids", ScalarType::Long, args.count);
  args.factors = floats(factors, "factors", args.count);
  args.rows = rows.data_ptr();
  args.dtype = dtype_of(rows, "rows");
  args.row_stride = rows.stride(0);
  for (int64_t t = 0; t < args.count; ++t) {
    R1K_CHECK(args.ids[t] >= 0 && args.ids[t] < out.size(0), "ids[", t, "] is ", args.ids[t], ", expected [0, ",
              out.size(0), ")");
  }
  // Threads share columns, so that rows of one id are added in order.
  const int64_t grain = std::max<int64_t>(kWorthAThread / std::max<int64_t>(args.count, 1) / 64 * 64, 64);
  const auto run = r1k::active_kernels()->accumulate->add_rows;
  parallel_ranges(out.size(1), grain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) {
  m.impl("scaled", TORCH_BOX(&scaled));
  m.impl("add_rows", TORCH_BOX(&add_rows));
}
