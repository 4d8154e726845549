// csrc/cuda/launch.cuh for kernels that run on a CPU: see emulator.h.
#pragma once

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/stream.h"
#include "emulator.h"

// The part of the CUDA runtime that launch_* functions may call.
enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

namespace r1k {
namespace gpu {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(what);
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;
  int cluster = 1;
  bool cooperative = false;
  bool overlap = false;
};

namespace emulator {
inline LaunchShape shape_of(const Grid& grid) {
  return {grid.blocks, grid.threads, grid.shared, grid.cluster, grid.cooperative, grid.overlap};
}
}  // namespace emulator

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Stream& stream, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...));
  emulator::run(
      emulator::shape_of(grid), stream.properties,
      [](const void* data) {
        const Call& call = *static_cast<const Call*>(data);
        std::apply(call.first, call.second);
      },
      &call, sizeof(call));
}

template <typename... Parameters>
int concurrent_clusters(void (*)(Parameters...), const Grid& grid) {
  const Properties properties = current_stream(0).properties;
  if (properties.major < 9) return 0;
  return emulator::concurrent_blocks(emulator::shape_of(grid), properties) / grid.cluster;
}

template <typename... Parameters>
int concurrent_blocks(void (*)(Parameters...), const Grid& grid, const Stream& stream) {
  return emulator::concurrent_blocks(emulator::shape_of(grid), stream.properties);
}

}  // namespace gpu
}  // namespace r1k
