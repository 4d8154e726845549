// How kernels are launched, and what is known of the device they are launched on.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

namespace r1k {
namespace gpu {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;         // bytes for each block
  int cluster = 1;           // blocks that run together
  bool cooperative = false;  // all blocks run at once
  bool overlap = false;      // may start before the kernel before it has ended: see wait_for_previous_kernel
};

// Allows a kernel more shared memory than the 48 KiB that need no leave; where it must.
template <typename... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "cudaFuncSetAttribute");
  }
}

struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[3];

  // The runtime refuses to count clusters of a launch that does not say their size, even if that is 1.  Devices before
  // sm_90 know no such attribute, so a launch of single blocks leaves it out.
  LaunchConfig(const Grid& grid, void* stream, bool say_cluster = false) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (grid.cluster > 1 || say_cluster) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (grid.cooperative) {
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (grid.overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;  // `config` points into it
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Stream& stream, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  allow_shared(kernel, grid.shared);
  const LaunchConfig launch(grid, stream.handle);
  check(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

// How many clusters of this launch the device runs at once; 0 where it has none, -1 where it cannot say.
template <typename... Parameters>
int concurrent_clusters(void (*kernel)(Parameters...), const Grid& grid) {
  allow_shared(kernel, grid.shared);
  const LaunchConfig launch(grid, nullptr, true);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &launch.config) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  return clusters;
}

// How many blocks of this launch the device runs at once.
template <typename... Parameters>
int concurrent_blocks(void (*kernel)(Parameters...), const Grid& grid, const Stream& stream) {
  allow_shared(kernel, grid.shared);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), grid.threads,
                                                      grid.shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks * stream.properties.processors;
}

}  // namespace gpu
}  // namespace r1k
