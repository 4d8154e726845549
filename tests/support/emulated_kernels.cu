// Small kernels for test_cuda_emulator: each right as it stands, and with mistakes that the emulator must notice.

#include <stdexcept>
#include <string>

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

namespace r1k {
namespace gpu {
namespace {

// The names are those of test_cuda_emulator.MISTAKES, in order.
enum Mistake {
  kNone, kNoSyncBlock, kDivergentShuffle, kLanesThatLeave, kDifferentOperations, kPastTheEnd, kMisaligned16,
  kNoWait, kNoBarrierFence, kMisalignedCopy, kCopyPastTheEnd, kArrivesTwice, kNoExpect, kRefillsTooEarly,
  kLoadsOverStores, kNoInit, kOverwritesBarrier, kOneDoesNotArrive, kNoSyncAtStart, kLeavesEarly,
  kWaitsForItsBlockOnly, kNoSyncGrid, kLeavesGrid, kChecks, kReadsPastTheEnd, kNoWaitForKernel
};

// ---- a sum over the block, from warps through shared memory ------------------------------------------------

__global__ void __launch_bounds__(1024) sum_blocks(const float* x, float* out, int64_t count, Mistake mistake) {
  float* const parts = reinterpret_cast<float*>(dynamic_shared());
  float sum = 0;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; k < count; k += stride) sum += x[k];
  if (mistake == kLanesThatLeave && lane_id() == 7) return;
  if (mistake == kDifferentOperations && lane_id() == 7) sync_warp();
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    if (mistake != kDivergentShuffle || lane_id() < mask) sum += shuffle_xor(sum, mask);
  }
  if (lane_id() == 0) parts[warp_id()] = sum;
  if (mistake == kPastTheEnd && threadIdx.x == 0) parts[blockDim.x / kWarp] = 0;
  if (mistake == kMisaligned16 && threadIdx.x == 1) load_streaming(x + 1);
  if (mistake != kNoSyncBlock) sync_block();
  if (warp_id() == 0) {
    const int warps = static_cast<int>(blockDim.x) / kWarp + (mistake == kReadsPastTheEnd ? 1 : 0);
    sum = lane_id() < warps ? parts[lane_id()] : 0;
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_id() == 0) out[blockIdx.x] = sum;
  }
  R1K_DEVICE_CHECK(mistake != kChecks || blockIdx.x != 1, "block 1 is not welcome");
}

// ---- twice the input, through a ring of slots --------------------------------------------------------------

constexpr int kSlots = 3, kSlotFloats = 64;

struct Ring {
  alignas(128) float slot[kSlots][kSlotFloats];
  Barrier full[kSlots];
};

// chunks [begin, end) of kSlotFloats belong to a block.
__global__ void __launch_bounds__(1024) double_chunks(const float* x, float* out, int chunks, Mistake mistake) {
  Ring& ring = *reinterpret_cast<Ring*>(dynamic_shared());
  const int begin = static_cast<int>(int64_t{chunks} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{chunks} * (blockIdx.x + 1) / gridDim.x);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (thread == 0 && mistake != kNoInit) {
    for (int k = 0; k < kSlots; ++k) {
      // By mistake barrier k of block k waits for two arrivals, of which one never comes.
      barrier_init(&ring.full[k], mistake == kOneDoesNotArrive && static_cast<int>(blockIdx.x) == k ? 2 : 1);
    }
    if (mistake != kNoBarrierFence) fence_barrier_init();
    if (mistake == kOverwritesBarrier) ring.slot[kSlots][0] = 0;
  }
  sync_block();
  // Chunk k is loaded into slot k % kSlots once all threads have read chunk k - kSlots from it.
  const auto load = [&](int k) {
    if (thread != 0 || k >= end - begin) return;
    float* const slot = ring.slot[k % kSlots];
    Barrier* const full = &ring.full[k % kSlots];
    const uint32_t bytes = kSlotFloats * sizeof(float);
    if (mistake == kLoadsOverStores) slot[0] = 0;
    barrier_expect(full, mistake == kNoExpect ? 0 : bytes);
    if (mistake == kArrivesTwice) barrier_expect(full, 0);
    const int shift = mistake == kMisalignedCopy ? 2 : mistake == kCopyPastTheEnd ? 4096 : 0;
    bulk_load(slot + shift, x + int64_t{begin + k} * kSlotFloats, bytes, full);
  };
  for (int k = 0; k < kSlots; ++k) load(k);
  for (int k = 0; k < end - begin; ++k) {
    if (mistake == kLeavesEarly && k == end - begin - 1) return;
    if (mistake != kNoWait) barrier_wait(&ring.full[k % kSlots], k / kSlots % 2);
    for (int j = thread; j < kSlotFloats; j += threads) {
      out[int64_t{begin + k} * kSlotFloats + j] = 2 * ring.slot[k % kSlots][j];
    }
    if (mistake == kRefillsTooEarly) load(k + kSlots);
    sync_block();
    if (mistake != kRefillsTooEarly) load(k + kSlots);
  }
}

// ---- every block of a cluster tells every other a number ---------------------------------------------------

struct Exchange {
  Barrier arrived;
  alignas(16) float numbers[8][4];
  float single[8];
};

__global__ void __launch_bounds__(1024) exchange(const float* x, float* out, Mistake mistake) {
  Exchange& shared = *reinterpret_cast<Exchange*>(dynamic_shared());
  if (threadIdx.x == 0) {
    barrier_init(&shared.arrived, 1);
    fence_barrier_init();
  }
  if (mistake != kNoSyncAtStart) sync_cluster();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < cluster_blocks()) {
    const float number = x[blockIdx.x];
    remote_send4(shared.numbers[cluster_rank()], thread, number, number, number, 0, &shared.arrived);
    remote_send(&shared.single[cluster_rank()], thread, number, &shared.arrived);
  }
  if (thread == 0) barrier_expect(&shared.arrived, cluster_blocks() * (sizeof(shared.numbers[0]) + sizeof(float)));
  if (mistake == kLeavesEarly && cluster_rank() == 0) return;
  if (mistake == kWaitsForItsBlockOnly) {
    barrier_wait(&shared.arrived, 0);
  } else {
    barrier_wait_cluster(&shared.arrived, 0);
  }
  if (thread == 0) {
    float sum = 0;
    for (int k = 0; k < cluster_blocks(); ++k) sum += (k + 1) * (shared.numbers[k][0] + shared.single[k]);
    out[blockIdx.x] = sum;
  }
}

// ---- the sum of all blocks, in one launch ------------------------------------------------------------------

__global__ void __launch_bounds__(1024) sum_grid(const float* x, float* parts, float* out, Mistake mistake) {
  if (mistake == kLeavesGrid && blockIdx.x == 1 && threadIdx.x == 3) return;
  if (threadIdx.x == 5) parts[blockIdx.x] = x[blockIdx.x];
  if (mistake != kNoSyncGrid) sync_grid();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned k = 0; k < gridDim.x; ++k) sum += parts[k];
    out[blockIdx.x] = sum;
  }
}

// ---- a kernel that may start before the one before it has ended --------------------------------------------

__global__ void double_each(const float* x, float* out) {
  let_next_kernel_start();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 2 * x[blockIdx.x * blockDim.x + threadIdx.x];
}

__global__ void add_one(float* out, Mistake mistake) {
  if (mistake != kNoWaitForKernel) wait_for_previous_kernel();
  out[blockIdx.x * blockDim.x + threadIdx.x] += 1;
}

// ---- the order in which threads run, and what numbers become -----------------------------------------------

__global__ void order(int* count, int* places) { places[blockIdx.x * blockDim.x + threadIdx.x] = (*count)++; }

template <typename D>
__global__ void convert(const float* x, float* out, int vectors) {
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    float entries[D::kPerVec];
    typename D::Storage stored;
    for (int k = 0; k < D::kPerVec; ++k) entries[k] = x[v * D::kPerVec + k];
    D::unpack(D::pack(entries), entries);
    D::store(&stored, x[v * D::kPerVec]);
    for (int k = 0; k < D::kPerVec; ++k) out[v * D::kPerVec + k] = k == 0 ? D::load(&stored) : entries[k];
  }
}

// ---- for ctypes: the text of an error, or "" ---------------------------------------------------------------

template <typename F>
const char* message_of(F run) {
  static std::string message;
  message.clear();
  try {
    run(current_stream(0));
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT run_sum_blocks(const float* x, float* out, int64_t count, int blocks, int threads, int64_t shared, int mistake) {
  return message_of([=](const Stream& stream) {
    launch(sum_blocks, Grid{blocks, threads, static_cast<size_t>(shared)}, stream, x, out, count, Mistake(mistake));
  });
}

EXPORT run_double_chunks(const float* x, float* out, int chunks, int blocks, int threads, int mistake) {
  return message_of([=](const Stream& stream) {
    launch(double_chunks, Grid{blocks, threads, sizeof(Ring)}, stream, x, out, chunks, Mistake(mistake));
  });
}

EXPORT run_exchange(const float* x, float* out, int blocks, int cluster, int mistake) {
  return message_of([=](const Stream& stream) {
    launch(exchange, Grid{blocks, 64, sizeof(Exchange), cluster}, stream, x, out, Mistake(mistake));
  });
}

EXPORT run_sum_grid(const float* x, float* parts, float* out, int blocks, int mistake) {
  return message_of([=](const Stream& stream) {
    Grid grid{blocks, 40};
    grid.cooperative = true;
    launch(sum_grid, grid, stream, x, parts, out, Mistake(mistake));
  });
}

EXPORT run_overlap(const float* x, float* out, int blocks, int mistake) {
  return message_of([=](const Stream& stream) {
    Grid grid{blocks, 32};
    launch(double_each, grid, stream, x, out);
    grid.overlap = true;
    launch(add_one, grid, stream, out, Mistake(mistake));
  });
}

EXPORT run_order(int* count, int* places, int blocks, int threads) {
  return message_of([=](const Stream& stream) { launch(order, Grid{blocks, threads}, stream, count, places); });
}

EXPORT run_convert(const float* x, float* out, int count, int dtype) {
  return message_of([=](const Stream& stream) {
    if (dtype == 0) launch(convert<Float32>, Grid{1, 64}, stream, x, out, count / 4);
    if (dtype == 1) launch(convert<BFloat16>, Grid{1, 64}, stream, x, out, count / 8);
    if (dtype == 2) launch(convert<Float16>, Grid{1, 64}, stream, x, out, count / 8);
  });
}

extern "C" __attribute__((visibility("default"))) int clusters_at_once(int cluster, int64_t shared) {
  return concurrent_clusters(exchange, Grid{cluster, 64, static_cast<size_t>(shared), cluster});
}

}  // namespace gpu
}  // namespace r1k
