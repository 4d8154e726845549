// A stand-in for the CUDA runtime, below the project's own launch code and the toolkit's own headers.  It refuses what
// the headers' text forbids, and prints each launch and the result of each call that it is asked for.  Linked with the
// objects of the kernels, it also shows which of them the fused step launches.
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "cuda/grpo_step.h"
#include "cuda/launch.cuh"

namespace {

constexpr size_t kSharedOfBlock = 227 * 1024;  // of an H200

std::string refused;
std::map<const void*, size_t> allowed_shared;
std::map<const void*, std::string> names;  // of kernels

cudaError_t refuse(const char* why) {
  refused = why;
  return cudaErrorInvalidConfiguration;
}

// What driver_types.h and the programming guide ask of a launch.
cudaError_t checked(const cudaLaunchConfig_t* config, const void* kernel, bool counts_clusters, std::string& said) {
  std::set<int> seen;
  const cudaLaunchAttribute* cluster = nullptr;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    const cudaLaunchAttribute& attribute = config->attrs[k];
    if (!seen.insert(attribute.id).second) return refuse("an attribute is given twice");
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = &attribute;
  }
  said = std::to_string(config->gridDim.x) + " blocks of " + std::to_string(config->blockDim.x) + " threads" +
         (cluster != nullptr ? ", clusters of " + std::to_string(cluster->val.clusterDim.x) : "") +
         (seen.count(cudaLaunchAttributeCooperative) > 0 ? ", cooperative" : "") +
         (seen.count(cudaLaunchAttributeProgrammaticStreamSerialization) > 0 ? ", overlap" : "");
  const unsigned threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  if (threads == 0 || threads > 1024) return refuse("threads of a block");
  if (config->gridDim.x == 0 || config->gridDim.x > 0x7fffffffu) return refuse("blocks of a grid");
  if (config->dynamicSmemBytes > kSharedOfBlock) return refuse("more shared memory than a block can have");
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
  std::string said;
  const cudaError_t status = checked(config, func, true, said);
  *clusters = status == cudaSuccess ? 16 : 0;
  return status;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* func, void**) {
  std::string said;
  const cudaError_t status = checked(config, func, false, said);
  if (status == cudaSuccess) std::printf("launched %s: %s\n", names[func].c_str(), said.c_str());
  return status;
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

// ---- what nvcc's objects call when they are loaded, and the stubs of their kernels --------------------------------

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  int status = 0;
  char* const readable = abi::__cxa_demangle(device, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : device;
  std::free(readable);
  for (const char* prefix : {"void ", "(anonymous namespace)::", "r1k::gpu::"}) {
    for (size_t at; (at = name.find(prefix)) != std::string::npos;) name.erase(at, std::string(prefix).size());
  }
  names[host] = name.substr(0, name.find('('));
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }
}

namespace {

using namespace r1k::gpu;

void count_clusters() {
  for (int cluster : {1, 2, 8}) {
    for (size_t shared : {size_t{1024}, size_t{200 * 1024}}) {
      const Grid grid = {cluster * 4, 256, shared, cluster};
      std::printf("clusters of %d blocks with %zu bytes: %d %s\n", cluster, shared, concurrent_clusters(kernel, grid),
                  refused.c_str());
    }
  }
}

void launch_all() {
  const Stream stream = {};
  names[reinterpret_cast<const void*>(kernel)] = "kernel";
  for (const Grid& grid : {Grid{7, 128}, Grid{16, 128, 0, 8}, Grid{16, 128, 100 * 1024, 4, false, true},
                           Grid{7, 128, 0, 1, true}}) {
    launch(kernel, grid, stream, 1);
  }
}

// The launches of a step of 64 x 128 tokens on an H200.
void launch_step(int64_t vocab, r1k::DType dtype, r1k::Aggregate aggregate) {
  const Stream stream = {nullptr, 0, {9, 0, 132, kSharedOfBlock}};
  GrpoStepArgs args = {};
  args.logits = {reinterpret_cast<const void*>(uintptr_t{1} << 20), dtype, vocab, 1, 1, {64 * 128}, {vocab}};
  args.out = args.logits;
  args.temperature = 1;
  args.policy.objective.aggregate = aggregate;
  args.policy.tokens = 64 * 128;
  args.policy.sequences = 64;
  args.policy.length = 128;
  const StepTile tile = step_tile(args.logits, args.out, 0, stream);
  std::printf("step V %ld %s: clusters of %d, %d blocks a processor, unfused %d\n", static_cast<long>(vocab),
              dtype == r1k::DType::float32 ? "float32" : "bfloat16", tile.cluster, tile.blocks,
              static_cast<int>(tile.unfused));
  if (tile.unfused == Unfused::none) launch_grpo_step(args, tile, nullptr, stream);
}

}  // namespace

int main() {
  try {
    count_clusters();
    launch_all();
    for (int64_t vocab : {4096, 32'000, 50'257, 128'256, 151'936, 262'144}) {
      launch_step(vocab, r1k::DType::bfloat16, r1k::Aggregate::token_mean);
    }
    launch_step(32'000, r1k::DType::float32, r1k::Aggregate::sequence_mean);
    launch_step(262'144, r1k::DType::float32, r1k::Aggregate::token_mean);
  } catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
  }
}
