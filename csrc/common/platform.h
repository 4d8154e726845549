// One macro so that the arithmetic of csrc/common compiles unchanged for the host and for CUDA devices.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define R1K_HOST_DEVICE __host__ __device__ __forceinline__
#define R1K_RARE R1K_HOST_DEVICE
#else
#define R1K_HOST_DEVICE inline
// What few calls need: outside their loops, so that the compiler still inlines the rest.
#define R1K_RARE [[gnu::noinline]] inline
#endif
