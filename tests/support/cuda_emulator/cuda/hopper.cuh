// csrc/cuda/hopper.cuh for kernels that run on a CPU: see emulator.h.
#pragma once

#include "cuda/device.cuh"

namespace r1k {
namespace gpu {

constexpr bool kClusters = true;

using Barrier = uint64_t;

// ---- barriers of a block -----------------------------------------------------------------------------------

inline void barrier_init(Barrier* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() { emulator::fence_barrier_init(); }
inline void barrier_expect(Barrier* barrier, uint32_t bytes) { emulator::barrier_expect(barrier, bytes); }
inline void barrier_wait(Barrier* barrier, int parity) { emulator::barrier_wait(barrier, parity, false); }
inline void barrier_wait_cluster(Barrier* barrier, int parity) { emulator::barrier_wait(barrier, parity, true); }

// ---- bulk copies -------------------------------------------------------------------------------------------

inline void bulk_load(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  emulator::bulk_load(shared, global, bytes, barrier);
}

// ---- clusters ----------------------------------------------------------------------------------------------

inline int cluster_rank() { return emulator::cluster_rank(); }
inline int cluster_blocks() { return emulator::cluster_blocks(); }
inline void sync_cluster() { emulator::sync_cluster(); }
inline void arrive_cluster() { emulator::arrive_cluster(); }
inline void wait_cluster() { emulator::wait_cluster(); }
inline void remote_send(float* p, int rank, float value, Barrier* barrier) {
  emulator::remote_send(p, rank, &value, sizeof(value), barrier);
}
inline void remote_send4(float* p, int rank, float a, float b, float c, float d, Barrier* barrier) {
  const float values[4] = {a, b, c, d};
  emulator::remote_send(p, rank, values, sizeof(values), barrier);
}

// ---- launches that overlap: here each ends before the next begins, and accesses are watched as if not ------

inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
inline void let_next_kernel_start() {}

}  // namespace gpu
}  // namespace r1k
