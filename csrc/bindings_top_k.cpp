// The choice of the largest entries of rows, over PyTorch's stable ABI: check, allocate, launch, register.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/top_k.h"

namespace {

using namespace r1k::bindings;

Tensor top_k_ids(Tensor logits, int64_t k) {
  r1k::TopK args;
  args.rows = row_view(logits);
  const int64_t vocab = args.rows.vocab;
  R1K_CHECK(k >= 1 && k <= vocab && vocab < int64_t{1} << 32, "k is ", k, ", expected a number from 1 to V = ", vocab,
            ", and V below 2^32");
  std::vector<int64_t> sizes = leading_sizes(logits);
  sizes.push_back(k);
  Tensor ids = empty(logits, sizes, ScalarType::Long);
  args.k = k;
  args.ids = static_cast<int64_t*>(ids.data_ptr());
  const auto run = r1k::active_kernels()->top_k->top_k;
  parallel_ranges(ids.numel() / k, row_grain(vocab), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return ids;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) { m.impl("top_k_ids", TORCH_BOX(&top_k_ids)); }
