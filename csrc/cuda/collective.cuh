// What threads do together: sums of a warp in a fixed order, and launches whose blocks wait for one another at the
// least cost - one block, a cluster of up to 8, or a cooperative grid.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/device.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

namespace r1k {
namespace gpu {

// ---- warps -------------------------------------------------------------------------------------------------

// All lanes of each `lanes` consecutive ones (a power of two) get the same bits.
template <typename T, typename Combine>
__device__ __forceinline__ T combine_lanes(T value, int lanes, const Combine& combine) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}
template <typename T>
__device__ __forceinline__ T sum_lanes(T value, int lanes = kWarp) {
  return combine_lanes(value, lanes, [](T a, T b) { return a + b; });
}
__device__ __forceinline__ float highest_lane(float value) {
  return combine_lanes(value, kWarp, [](float a, float b) { return std::fmax(a, b); });
}
// NaN never.
template <typename T>
__device__ __forceinline__ T lower(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__device__ __forceinline__ T higher(T a, T b) {
  return b > a ? b : a;
}

__device__ __forceinline__ int64_t warp_of_grid() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ __forceinline__ int64_t warps_of_grid() { return static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp; }
__device__ __forceinline__ int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// ---- blocks ------------------------------------------------------------------------------------------------

enum class Together : int { block, cluster, grid };

// Until all threads of the launch are here; what they wrote before is visible after.
__device__ __forceinline__ void sync_all(Together together) {
  if (together == Together::block) {
    sync_block();
  } else if (together == Together::cluster) {
    sync_cluster();
  } else {
    sync_grid();
  }
}

struct Team {
  Grid grid;
  Together together;
};

template <typename... Parameters>
Team found_team(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, const Stream& stream) {
  constexpr int kMost = 8;  // of a cluster; a barrier of the grid costs more than the work of a second block
  const int major = stream.properties.major;
  if (blocks <= 2 * kMost && kClusters && major >= 9 && major < 12) {
    Grid grid = {kMost, threads, shared};
    while (grid.blocks / 2 >= blocks) grid.blocks /= 2;
    grid.cluster = static_cast<int>(grid.blocks);
    if (concurrent_clusters(kernel, grid) > 0) return {grid, Together::cluster};
  }
  Grid grid = {blocks, threads, shared};
  grid.blocks = std::min<int64_t>(blocks, concurrent_blocks(kernel, grid, stream));
  grid.cooperative = true;
  return {grid, Together::grid};
}

// A launch of up to `blocks` blocks that can wait for one another.  Its kernel works with any number of them.  What a
// device can run at once is asked once: the runtime would work it out anew, for longer than small launches take.
template <typename... Parameters>
Team team_of(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, const Stream& stream) {
  if (blocks <= 1) return {{1, threads, shared}, Together::block};
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Parameters...), Properties, int64_t, int, size_t>, Team> known;
  const std::tuple key(kernel, stream.properties, blocks, threads, shared);
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second
                              : known.emplace(key, found_team(kernel, blocks, threads, shared, stream)).first->second;
}

}  // namespace gpu
}  // namespace r1k
