// A stand-in for the CUDA runtime, below the project's own launch code (cuda/launch.cuh) and the toolkit's own headers.
// It refuses what the headers' text forbids, and prints the result of each call that it is asked for.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <string>

#include "cuda/launch.cuh"

namespace {

std::string refused;
std::map<const void*, size_t> allowed_shared;
const cudaLaunchAttribute* last_cluster = nullptr;
size_t attributes_of_last = 0;

cudaError_t refuse(const char* why) {
  refused = why;
  return cudaErrorInvalidConfiguration;
}

// What driver_types.h and the programming guide ask of a launch.
cudaError_t checked(const cudaLaunchConfig_t* config, const void* kernel, bool counts_clusters) {
  std::set<int> seen;
  const cudaLaunchAttribute* cluster = nullptr;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    if (!seen.insert(config->attrs[k].id).second) return refuse("an attribute is given twice");
    if (config->attrs[k].id == cudaLaunchAttributeClusterDimension) cluster = &config->attrs[k];
  }
  last_cluster = cluster;
  attributes_of_last = config->numAttrs;
  const unsigned threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  if (threads == 0 || threads > 1024) return refuse("threads of a block");
  if (config->gridDim.x == 0 || config->gridDim.x > 0x7fffffffu) return refuse("blocks of a grid");
  if (config->dynamicSmemBytes > 48 * 1024 && allowed_shared[kernel] < config->dynamicSmemBytes) {
    return refuse("more than 48 KiB of shared memory without cudaFuncSetAttribute");
  }
  if (counts_clusters && cluster == nullptr) return refuse("clusters of a launch without a cluster size");
  if (cluster != nullptr) {
    const auto& size = cluster->val.clusterDim;
    if (size.x == 0 || size.y != 1 || size.z != 1 || size.x > 8) return refuse("size of a cluster");
    if (config->gridDim.x % size.x != 0) return refuse("the grid is no multiple of the cluster");
  }
  return cudaSuccess;
}

void kernel(int) {}

}  // namespace

extern "C" {
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* func, const cudaLaunchConfig_t* config) {
  const cudaError_t status = checked(config, func, true);
  *clusters = status == cudaSuccess ? 16 : 0;
  return status;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* func, void**) {
  return checked(config, func, false);
}
cudaError_t cudaFuncSetAttribute(const void* func, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) allowed_shared[func] = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return refused.c_str(); }
}

int main() {
  using namespace r1k::gpu;
  for (int cluster : {1, 2, 8}) {
    for (size_t shared : {size_t{1024}, size_t{200 * 1024}}) {
      const Grid grid = {cluster * 4, 256, shared, cluster};
      std::printf("clusters of %d blocks with %zu bytes: %d %s\n", cluster, shared, concurrent_clusters(kernel, grid),
                  refused.c_str());
    }
  }
  Stream stream = {};
  for (const Grid& grid : {Grid{7, 128}, Grid{16, 128, 0, 8}, Grid{16, 128, 100 * 1024, 4, false, true},
                           Grid{7, 128, 0, 1, true}}) {
    try {
      launch(kernel, grid, stream, 1);
      std::printf("launched %s a cluster, %zu attributes\n", last_cluster ? "with" : "without", attributes_of_last);
    } catch (const std::exception& error) {
      std::printf("refused: %s\n", error.what());
    }
  }
}
