// What clusters of blocks are for, sm_90 and later: bulk copies from global to shared memory that complete on a
// barrier, and blocks that write to each other's shared memory.  Only devices that have these
// instructions run such kernels; for other targets they compile to a trap.
#pragma once

#include "cuda/device.cuh"

// sm_120 has the instructions, but neither the shared memory nor the bandwidth that would make them worth while.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define R1K_CLUSTERS 1
#define R1K_SM90(...) __VA_ARGS__
#else
#define R1K_CLUSTERS 0
#define R1K_SM90(...) __trap()
#endif

namespace r1k {
namespace gpu {

constexpr bool kClusters = R1K_CLUSTERS;

using Barrier = uint64_t;  // an mbarrier in shared memory

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers of a block -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  R1K_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                        : "memory"));
}
// Makes initialised barriers known to the other blocks of the cluster and to bulk copies.
__device__ __forceinline__ void fence_barrier_init() {
  R1K_SM90(asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory"));
}
// Arrives, and lets the phase wait for `bytes` of bulk copies as well.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
  R1K_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                        "r"(bytes)
                        : "memory"));
}
// Waits for the end of the phase of this parity (0, 1, 0, ...).
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  R1K_SM90(asm volatile("{\n"
                        ".reg .pred done;\n"
                        "again:\n"
                        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                        "@!done bra again;\n"
                        "}\n" ::"r"(shared_address(barrier)),
                        "r"(parity)
                        : "memory"));
}
// The same for arrivals from other blocks of the cluster.
__device__ __forceinline__ void barrier_wait_cluster(Barrier* barrier, int parity) {
  R1K_SM90(asm volatile("{\n"
                        ".reg .pred done;\n"
                        "again:\n"
                        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                        "@!done bra again;\n"
                        "}\n" ::"r"(shared_address(barrier)),
                        "r"(parity)
                        : "memory"));
}

// ---- bulk copies: addresses and sizes are multiples of 16 bytes ---------------------------------------------

__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  R1K_SM90(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                            shared_address(shared)),
                        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
                        : "memory"));
}

// ---- clusters ----------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
  R1K_SM90(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_blocks() {
  uint32_t blocks = 1;
  R1K_SM90(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks)));
  return static_cast<int>(blocks);
}
// All threads of all blocks of the cluster arrive, and wait later until all have.  What they wrote before is not visible
// after, but for initialised barriers.
__device__ __forceinline__ void arrive_cluster() {
  R1K_SM90(asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"));
}
__device__ __forceinline__ void wait_cluster() {
  R1K_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"));
}
// The same at once; what they wrote before is visible after.
__device__ __forceinline__ void sync_cluster() {
  R1K_SM90(asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"));
}
// Where `p` of this block's shared memory lies in that of another block of the cluster.
__device__ __forceinline__ uint32_t remote_address(const void* p, int rank) {
  uint32_t address = 0;
  R1K_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank)));
  return address;
}
// Writes to another block's shared memory, at once 4 or 16 bytes, aligned so, which complete on a barrier there as bulk
// copies do: who waits there with barrier_wait_cluster sees them, and this thread waits for nothing.
__device__ __forceinline__ void remote_send(float* p, int rank, float value, Barrier* barrier) {
  R1K_SM90(asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                            remote_address(p, rank)),
                        "f"(value), "r"(remote_address(barrier, rank))
                        : "memory"));
}
__device__ __forceinline__ void remote_send4(float* p, int rank, float a, float b, float c, float d, Barrier* barrier) {
  R1K_SM90(asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          remote_address(p, rank)),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(remote_address(barrier, rank))
      : "memory"));
}

// ---- launches that overlap: nothing where there is no such thing, and no launch asks for it ------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define R1K_OVERLAP(...) __VA_ARGS__
#else
#define R1K_OVERLAP(...)
#endif

// Until the kernels before this one in the stream have written all that they write (launched with `overlap`).
__device__ __forceinline__ void wait_for_previous_kernel() {
  R1K_OVERLAP(asm volatile("griddepcontrol.wait;" ::: "memory"));
}
// The next kernel of the stream may begin to start.
__device__ __forceinline__ void let_next_kernel_start() {
  R1K_OVERLAP(asm volatile("griddepcontrol.launch_dependents;" ::: "memory"));
}

}  // namespace gpu
}  // namespace r1k
