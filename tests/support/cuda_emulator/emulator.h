// Runs CUDA kernels on a CPU, for tests of their logic: what cuda/*.cuh of this folder ask of it.
//
// The folder comes before csrc in the include path, so that a kernel's `#include "cuda/device.cuh"` finds the
// definitions made for it:
//
//   g++ -std=c++17 -O2 -fPIC -fvisibility=hidden -Itests/cuda_emulator -Icsrc -c tests/cuda_emulator/*.cpp
//   g++ -x c++ -std=c++17 -O1 -ffp-contract=off -fPIC -fvisibility=hidden -Itests/cuda_emulator -Icsrc
//       -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -g1 -c csrc/cuda/<op>.cu
//
// and both are linked, without -fsanitize, into a library or a program that calls `launch`; tests/cuda_emulation.py
// does it.  One fiber runs each thread.  The next to run is chosen at random, from a seed; bulk copies take place at
// random times.  So a test over several seeds sees many of the orders that a GPU may choose.  A launch throws
// std::runtime_error, with the lines of the kernel and the seed that repeats it, for
//
//   * accesses to the same memory that nothing orders, in any order of this run (with -fsanitize=thread: see races.h);
//   * accesses past the end of shared memory (without it, stores alone), or of 16 bytes that are not aligned;
//   * a deadlock, with what everybody waits for;
//   * lanes that are missing where a whole warp is needed;
//   * a barrier that is used before its initialisation or without its fence, overwritten, arrived at too often, or
//     whose phase passes a thread that waits for it;
//   * bulk copies of a wrong alignment, over one another or over a thread's stores, or that a block does not wait for
//     before it ends;
//   * accesses to the shared memory of a block that has not begun or has ended.
//
// Wrong numbers come from everything that is read too early: fresh shared memory and the target of a copy in flight
// are all ones, NaN in every floating-point type, and copies take place as late as they may.
//
// Not emulated: the order in which a GPU's memory shows stores to threads that nothing orders (they are races here),
// time, and the bounds of global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/stream.h"

namespace r1k {
namespace gpu {
namespace emulator {

struct Index {
  unsigned x, y, z;
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared;
  int cluster;
  bool cooperative;
  bool overlap;
};

// Blocks that a processor holds at once, where shared memory and threads allow.
constexpr int kBlocksPerProcessor = 2;

// Calls body(data) once for each thread; `data` are `bytes` that it only reads.
void run(const LaunchShape& shape, const Properties& properties, void (*body)(const void*), const void* data,
         size_t bytes);
// How many blocks of this shape run at once; 0 where it cannot be launched.
int concurrent_blocks(const LaunchShape& shape, const Properties& properties);

// Ends the launch: `run` throws with this message and where it was.
[[noreturn]] void fail(const std::string& message);
// The same with the message alone, as R1K_DEVICE_CHECK has it.
[[noreturn]] void fail_check(const char* message);

// ---- what a thread asks for ----------------------------------------------------------------------------------

unsigned char* dynamic_shared();
void check_aligned(const void* address, const char* what);

void sync_block();
void sync_warp();
void sync_grid();
void sync_cluster();
void arrive_cluster();
void wait_cluster();
uint64_t shuffle_xor(uint64_t value, int mask);
uint64_t shuffle_from(uint64_t value, int lane);
unsigned ballot(bool predicate);

void barrier_init(uint64_t* barrier, int arrivals);
void fence_barrier_init();
void barrier_expect(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, int parity, bool of_cluster);

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);

int cluster_rank();
int cluster_blocks();
void remote_send(void* p, int rank, const void* value, size_t bytes, uint64_t* barrier);

void wait_for_previous_kernel();

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

extern r1k::gpu::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

// What tests may set, through ctypes or in a program; until then: seed 1, an H100 of 4 processors.
extern "C" {
void r1k_emulator_seed(uint64_t seed);
void r1k_emulator_properties(int major, int minor, int processors, size_t shared_per_block);
}
