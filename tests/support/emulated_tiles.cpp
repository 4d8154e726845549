// The product on matrix tiles (csrc/cpu/gemm_amx.h) on emulated tile instructions, for processors without them.

#define R1K_EMULATE_TILES
#define R1K_ISA emulated

#include <pybind11/pybind11.h>

#include <memory>
#include <new>

#include "cpu/gemm_amx.h"

namespace {

struct Aligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

r1k::DType dtype(bool wide) { return wide ? r1k::DType::float32 : r1k::DType::bfloat16; }

// out (rows, columns) = or += a b; matrices as (whether float32, address, stride of the outer dimension, stride of k).
void multiply(int64_t rows, int64_t columns, int64_t k, bool a_wide, uintptr_t a, int64_t a_outer, int64_t a_k,
              bool b_wide, uintptr_t b, int64_t b_outer, int64_t b_k, uintptr_t out, int64_t out_stride,
              bool accumulate) {
  r1k::Gemm gemm = {};
  gemm.rows = rows;
  gemm.columns = columns;
  gemm.k = k;
  gemm.a = {dtype(a_wide), pointer(a), a_outer, a_k};
  gemm.b = {dtype(b_wide), pointer(b), b_outer, b_k};
  gemm.out = reinterpret_cast<float*>(out);
  gemm.out_stride = out_stride;
  gemm.accumulate = accumulate;
  namespace amx = r1k::emulated::amx;
  const int64_t most = amx::tile_size(gemm).max_block_columns;
  for (int64_t c = 0; c < columns; c += most) {
    const int64_t column_end = amx::min(c + most, columns);
    const std::unique_ptr<void, Aligned> workspace(
        ::operator new(amx::workspace_bytes(gemm, rows, column_end - c), std::align_val_t(64)));
    amx::block(gemm, {0, rows, c, column_end}, workspace.get());
  }
}

}  // namespace

PYBIND11_MODULE(R1K_MODULE, m) { m.def("multiply", &multiply); }
