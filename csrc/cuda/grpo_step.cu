// The fused GRPO step: statistics, objective and d logits with one read and one write of the logits.  A row lies in
// the shared memory of a cluster of blocks from the moment it arrives until its gradient has left: bulk copies bring it
// in chunks, each warp adds up its part, every block merges all parts of the row and works out the token's loss by
// itself, and the warps turn their parts into the gradient where they lie.
//
// Each warp has a ring of chunks of its own, so warps wait for each other only once a row, for the merged sums; while
// these are worked out, by a warp of their own, the others add up the next row.

#include "cuda/grpo_step.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/launch.cuh"
#include "cuda/step_part.cuh"
#include "cuda/step_plan.cuh"

namespace r1k {
namespace gpu {
namespace {

// ---- kernels -----------------------------------------------------------------------------------------------

template <typename D>
__global__ void __launch_bounds__((kMaxWarps + 1) * kWarp, 1)
    step_kernel(const __grid_constant__ Step step, PolicySums* partials) {
  if (!kClusters) return;
  const StepTile& tile = step.tile;
  StepShared& shared = *reinterpret_cast<StepShared*>(dynamic_shared());
  const int64_t cluster = blockIdx.x / tile.cluster, clusters = gridDim.x / tile.cluster;
  if (threadIdx.x == 0) {
    for (int k = 0; k < kDepth; ++k) {
      barrier_init(&shared.published[k], 1);
      barrier_init(&shared.planned[k], 1);
    }
    Barrier* const full = reinterpret_cast<Barrier*>(&shared + 1);
    for (int k = 0; k < tile.warps * tile.slots; ++k) barrier_init(full + k, 1);
    fence_barrier_init();
  }
  sync_cluster();
  let_next_kernel_start();

  if (warp_id() == tile.warps) {
    plan_rows<D>(step, shared, cluster, clusters, partials);
  } else {
    PartWarp<D> warp(step, shared, cluster, clusters);
    warp.fill();
    warp.clear_masked(cluster, clusters);
    const int64_t* const ids = step.args.token_ids;
    RowWalk ahead(step.args.policy.mask, step.args.policy.tokens, cluster, clusters), walk = ahead;
    int64_t row = ahead.next(), id = row >= 0 ? ids[row] : 0, summed = 0, q = 0;
    for (int64_t n = walk.next(); n >= 0; n = walk.next(), ++q) {
      while (row >= 0 && summed <= q + tile.lookahead) {
        const int64_t next = ahead.next(), next_id = next >= 0 ? ids[next] : 0;  // asked for long before it is needed
        warp.publish_sums(row, id, summed++);
        row = next;
        id = next_id;
      }
      warp.write_gradient(n, q);
    }
    warp.settle();
  }
  sync_cluster();  // no block leaves while others may write to it
}

__device__ __forceinline__ PolicySums shuffled(const PolicySums& sums, int mask) {
  PolicySums other;
  other.loss = shuffle_xor(sums.loss, mask);
  other.surrogate = shuffle_xor(sums.surrogate, mask);
  other.kl = shuffle_xor(sums.kl, mask);
  other.entropy = shuffle_xor(sums.entropy, mask);
  other.ratio = shuffle_xor(sums.ratio, mask);
  other.approx_kl = shuffle_xor(sums.approx_kl, mask);
  other.ratio_min = shuffle_xor(sums.ratio_min, mask);
  other.ratio_max = shuffle_xor(sums.ratio_max, mask);
  other.tokens = shuffle_xor(sums.tokens, mask);
  other.clip_low = shuffle_xor(sums.clip_low, mask);
  other.clip_high = shuffle_xor(sums.clip_high, mask);
  other.capped = shuffle_xor(sums.capped, mask);
  other.active = shuffle_xor(sums.active, mask);
  other.nonfinite = shuffle_xor(sums.nonfinite, mask);
  return other;
}

// The sums of all blocks, in order -> loss and metrics; and what no single row can see is looked at.
__global__ void __launch_bounds__(kWarp) finish_kernel(const __grid_constant__ PolicyLossArgs args,
                                                       const PolicySums* partials, int64_t count) {
  wait_for_previous_kernel();
  if (args.normalizer != nullptr) {
    R1K_DEVICE_CHECK(*args.normalizer > 0 && *args.normalizer < INFINITY,
                     "r1kernels: normalizer must be a positive finite number");
  }
  if (args.cu_seqlens != nullptr) {
    R1K_DEVICE_CHECK(args.cu_seqlens[0] == 0 && args.cu_seqlens[args.sequences] == args.tokens,
                     "r1kernels: cu_seqlens must run from 0 to N");
    for (int64_t s = lane_id(); s < args.sequences; s += kWarp) {
      R1K_DEVICE_CHECK(args.cu_seqlens[s] <= args.cu_seqlens[s + 1], "r1kernels: cu_seqlens must not descend");
    }
  }
  PolicySums total;
  for (int64_t k = lane_id(); k < count; k += kWarp) total.merge(partials[k]);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) total.merge(shuffled(total, mask));
  if (lane_id() == 0) finish(total, args.sequences, args.loss, args.metrics);
}

using StepKernel = void (*)(Step, PolicySums*);

StepKernel kernel_for(DType dtype) {
  switch (dtype) {
    case DType::float32: return step_kernel<Float32>;
    case DType::bfloat16: return step_kernel<BFloat16>;
    case DType::float16: return step_kernel<Float16>;
  }
  return nullptr;
}

Grid grid_of(const StepTile& tile, int64_t clusters) {
  Grid grid = {clusters * tile.cluster, (tile.warps + 1) * kWarp};
  grid.shared = tile.shared;
  grid.cluster = tile.cluster;
  return grid;
}

// The runtime works it out anew each time it is asked.
int clusters_at_once(DType dtype, const StepTile& tile, const Stream& stream) {
  static std::mutex mutex;
  static std::map<std::tuple<Properties, DType, int, int, size_t>, int> known;
  const std::tuple key(stream.properties, dtype, tile.cluster, tile.warps, tile.shared);
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const int clusters = concurrent_clusters(kernel_for(dtype), grid_of(tile, 1));
  return clusters < 0 ? 0 : known[key] = clusters;  // an error may be gone the next time
}

// Whether gradients can leave the way logits came: adjacent entries, rows that start alike within 16 bytes.
bool same_vectors(const RowView& a, const RowView& b) {
  if (a.vocab_stride != 1 || b.vocab_stride != 1 || a.leading > 2 || b.leading > 2) return false;
  const auto offset = [](const RowView& rows) { return reinterpret_cast<uintptr_t>(rows.data) % kVec; };
  if (offset(a) != offset(b)) return false;
  if (aligned16(a) && aligned16(b)) return true;
  if (a.leading != b.leading) return false;
  for (int k = 0; k < a.leading; ++k) {
    const int64_t size = size_of(a.dtype);
    if (a.sizes[k] != b.sizes[k] || (a.strides[k] - b.strides[k]) * size % kVec != 0) return false;
  }
  return true;
}

}  // namespace

StepTile step_tile(const GrpoStepArgs& args, const std::vector<int64_t>& wanted, const Stream& stream) {
  StepTile tile = {};
  const bool has_clusters = stream.properties.major >= 9 && stream.properties.major < 12;
  const int64_t row_bytes = args.logits.vocab * size_of(args.logits.dtype);
  if (!has_clusters || row_bytes > (int64_t{1} << 30) || !same_vectors(args.logits, args.out)) return tile;
  const int64_t spare = aligned16(args.logits) ? 0 : kVec - 1;  // a row may start late in its first vector
  const int vectors = static_cast<int>((row_bytes + spare + kVec - 1) / kVec);
  const auto fit = [&](int cluster, int warps, int chunk) {
    tile.cluster = cluster;
    tile.warps = warps;
    const int parts = cluster * warps;
    tile.part = (vectors + parts - 1) / parts;
    tile.chunk = chunk;
    tile.chunks = (tile.part + chunk - 1) / chunk;
    const size_t taken = sizeof(StepShared) + 128;
    const size_t free = stream.properties.shared_per_block > taken ? stream.properties.shared_per_block - taken : 0;
    const int64_t most = 4 * static_cast<int64_t>(tile.chunks);  // more rows than that in a ring serve nothing
    tile.slots = static_cast<int>(
        std::min<int64_t>(most, free / (warps * (static_cast<size_t>(chunk) * kVec + sizeof(Barrier)))));
    tile.lookahead = tile.slots >= 2 * tile.chunks ? 1 : 0;
    tile.shared = rings_offset(tile) + static_cast<size_t>(warps) * tile.slots * chunk * kVec;
    return tile.slots >= tile.chunks;
  };
  if (!wanted.empty()) {
    if (fit(static_cast<int>(wanted[0]), static_cast<int>(wanted[1]), static_cast<int>(wanted[2]))) {
      tile.clusters = clusters_at_once(args.logits.dtype, tile, stream);
    }
    return tile;
  }
  // The fewest blocks that hold two rows and some of a third, in chunks that leave little of the rings unused; else the
  // most there can be.
  StepTile best = {};
  const int warps = std::clamp(vectors / kGroup, 1, kMaxWarps);
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    StepTile roomiest = {};
    for (int chunk = 6 * kWarp; chunk >= 2 * kWarp; chunk -= kWarp) {
      if (!fit(cluster, warps, chunk)) continue;
      const auto rows = [](const StepTile& t) { return t.chunks > 0 ? static_cast<double>(t.slots) / t.chunks : 0.0; };
      if (rows(tile) > rows(roomiest)) roomiest = tile;
    }
    if (roomiest.chunks == 0) continue;
    roomiest.clusters = clusters_at_once(args.logits.dtype, roomiest, stream);
    if (roomiest.clusters > 0) best = roomiest;
    if (roomiest.slots > 2 * roomiest.chunks) break;
  }
  return best;
}

size_t step_scratch(const StepTile& tile) { return sizeof(PolicySums) * tile.clusters * tile.cluster; }

void launch_grpo_step(const GrpoStepArgs& args, const StepTile& tile, void* scratch, const Stream& stream) {
  auto* const partials = static_cast<PolicySums*>(scratch);
  const int64_t clusters = std::min<int64_t>(tile.clusters, args.policy.tokens);
  launch(kernel_for(args.logits.dtype), grid_of(tile, clusters), stream, Step{args, tile}, partials);
  Grid last = {1, kWarp};
  last.overlap = true;
  launch(finish_kernel, last, stream, args.policy, partials, clusters * tile.cluster);
}

}  // namespace gpu
}  // namespace r1k
