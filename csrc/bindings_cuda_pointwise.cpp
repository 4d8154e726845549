// CUDA operators that go through tensors element by element: check, allocate, launch, register.

#include "bindings_cuda.h"

namespace {

using namespace r1k::bindings;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels_cuda, R1K_CUDA_KEY, m) { (void)m; }
