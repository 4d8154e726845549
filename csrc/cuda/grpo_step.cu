// The fused GRPO step: statistics, objective and d logits with one read and one write of the logits.
//
// A cluster of blocks takes a row and each of its blocks a part: one bulk copy brings the part into shared memory, the
// block adds it up, tells the sums to all blocks of the cluster, works out the token's loss by itself, and writes the
// gradient of its part.  A block waits for its logits and for its cluster; what hides this are the blocks of other rows
// on the same processor, so the parts are small enough for several.

#include "cuda/grpo_step.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/launch.cuh"
#include "cuda/step_part.cuh"
#include "cuda/step_token.cuh"

namespace r1k {
namespace gpu {
namespace {

struct Step {
  GrpoStepArgs args;
  Scale scale;
  int cluster, part;
  const double* weights;  // of each sequence, or of all
};

// ---- kernels ------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kStepThreads) weigh_kernel(const __grid_constant__ PolicyLossArgs args,
                                                             double* weights) {
  let_next_kernel_start();
  const double weight = weight_of(args, blockIdx.x, reinterpret_cast<int64_t*>(dynamic_shared()));
  if (threadIdx.x == 0) weights[blockIdx.x] = weight;
}

// Blocks whose registers fit into a processor.
template <typename D>
constexpr int kStepBlocks = D::kExact ? 3 : 5;

template <typename D>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks<D>) step_kernel(const __grid_constant__ Step step) {
  if (!kClusters) return;
  const GrpoStepArgs& args = step.args;
  const int64_t n = blockIdx.x / static_cast<unsigned>(step.cluster);
  const unsigned char* const row = start_of(args.logits, n);
  unsigned char* const out = start_of(args.out, n);
  const Part<D> part(row, args.logits.vocab, cluster_rank(), step.part);
  if (args.policy.mask != nullptr && !args.policy.mask[n]) {
    clear_part(part, out);
    if (cluster_rank() == 0 && threadIdx.x == 0) args.logprobs[n] = args.entropy[n] = 0;
    if (threadIdx.x == 0) wait_for_previous_kernel();  // or it might still run when this kernel has ended
    return;
  }

  StepShared& shared = *reinterpret_cast<StepShared*>(dynamic_shared());
  unsigned char* const data = dynamic_shared() + kLogitsOffset;
  const int parts = step.cluster * kStepWarps;
  if (threadIdx.x == 0) {
    barrier_init(&shared.arrived, 1);
    barrier_init(&shared.published, 1);
    fence_barrier_init();
    load_part(part, row, data, &shared.arrived);
    barrier_expect(&shared.published, parts * sizeof(shared.sums[0]) + sizeof(shared.own));
  }
  if (warp_id() == 1) load_edges(part, row, data);
  if (warp_id() == 0) {
    const TokenInputs inputs = read_token(args, n, step.weights);
    if (lane_id() == 0) shared.inputs = inputs;
  }
  arrive_cluster();  // this block has its barriers
  sync_block();

  // The token's own entry is left out of the sums.  One warp reads this vector, before and after.
  const int own_entry = part.entry_of(shared.inputs.id);
  const bool owns = own_entry >= 0 && own_entry / D::kPerVec % kStepThreads / kWarp == warp_id();
  barrier_wait(&shared.arrived, 0);
  float own = 0;
  if (owns) {
    typename D::Storage* const entry = entries_at<D>(data) + own_entry;
    own = D::load(entry);
    sync_warp();
    if (lane_id() == 0) D::store(entry, -INFINITY);
    sync_warp();
  }
  const RowSums sums = sum_part<D>(data, part.count(), step.scale);
  const int block = lane_id();
  wait_cluster();  // every block has its barriers
  if (block < step.cluster) {
    float* const place = shared.sums[cluster_rank() * kStepWarps + warp_id()];
    remote_send4(place, block, sums.top, sums.rest, sums.weighted, sums.count, &shared.published);
    if (owns) remote_send(&shared.own, block, own, &shared.published);
  }
  if (warp_id() == 0) {
    barrier_wait_cluster(&shared.published, 0);  // no block writes to this one any more: it may leave when it is done
    plan_row<D>(args, shared, n, parts);
  }
  sync_block();

  const RowPlan plan = shared.plan;
  if (plan.kind == RowKind::policy) {
    write_part<D>(part, data, out, [&](float x) { return entry_gradient<D::kExact, false>(x, plan.row); });
  } else if (plan.kind == RowKind::policy_and_entropy) {
    write_part<D>(part, data, out, [&](float x) { return entry_gradient<D::kExact, true>(x, plan.row); });
  } else {
    clear_part(part, out);
  }
  if (own_entry < 0) return;
  sync_block();  // its vector has been written
  if (threadIdx.x == 0) D::store(entries_at<D>(part.of(out)) + own_entry, plan.own);
}

// ---- how a row is cut ---------------------------------------------------------------------------------------

using StepKernel = void (*)(Step);

StepKernel kernel_for(DType dtype) {
  switch (dtype) {
    case DType::float32: return step_kernel<Float32>;
    case DType::bfloat16: return step_kernel<BFloat16>;
    case DType::float16: return step_kernel<Float16>;
  }
  return nullptr;
}

Grid grid_of(const StepTile& tile, int64_t rows) {
  Grid grid = {rows * tile.cluster, kStepThreads};
  grid.shared = tile.shared;
  grid.cluster = tile.cluster;
  return grid;
}

// The runtime works it out anew each time it is asked.  -1: it refuses.
int clusters_at_once(DType dtype, const StepTile& tile, const Stream& stream) {
  static std::mutex mutex;
  static std::map<std::tuple<Properties, DType, int, size_t>, int> known;
  const std::tuple key(stream.properties, dtype, tile.cluster, tile.shared);
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = concurrent_clusters(kernel_for(dtype), grid_of(tile, 1));
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

constexpr size_t kReserved = 1024;  // bytes of shared memory that the system takes for each block

StepTile tile_of(const RowView& logits, int cluster, const Properties& properties) {
  const int64_t spare = aligned16(logits) ? 0 : kVec - 1;  // a row may start late in its first vector
  const int64_t vectors = (logits.vocab * size_of(logits.dtype) + spare + kVec - 1) / kVec;
  StepTile tile = {};
  tile.cluster = cluster;
  const int64_t part = (vectors + cluster - 1) / cluster;
  tile.shared = kLogitsOffset + static_cast<size_t>(part) * kVec;
  if (tile.shared > properties.shared_per_block) return tile;
  tile.part = static_cast<int>(part);
  tile.blocks = static_cast<int>((properties.shared_per_block + kReserved) / (tile.shared + kReserved));
  return tile;
}

}  // namespace

StepTile step_tile(const RowView& logits, const RowView& out, int cluster, const Stream& stream) {
  const Properties& properties = stream.properties;
  StepTile best = {};
  best.unfused = properties.major < 9 || properties.major >= 12 ? Unfused::device
                 : !same_vectors(logits, out)                   ? Unfused::layout
                                                                : Unfused::none;
  if (best.unfused != Unfused::none) return best;
  const int first = cluster > 0 ? cluster : 1, last = cluster > 0 ? cluster : kMaxCluster;
  const int least = cluster > 0 ? 1 : 2;  // blocks of a processor: one alone waits for its logits with nothing to do
  for (int size = first; size <= last && best.blocks < 3; size *= 2) {
    const StepTile tile = tile_of(logits, size, properties);
    if (tile.blocks >= least && tile.blocks > best.blocks) best = tile;
  }
  if (best.blocks == 0) {
    best.unfused = Unfused::length;
    return best;
  }
  best.clusters = clusters_at_once(logits.dtype, best, stream);
  if (best.clusters <= 0) best.unfused = Unfused::refused;
  return best;
}

int64_t step_scratch(const GrpoStepArgs& args) {
  return std::max<int64_t>(args.policy.sequences, 1) + policy_loss_scratch(args.policy);
}

void launch_grpo_step(const GrpoStepArgs& args, const StepTile& tile, double* scratch, const Stream& stream) {
  const bool of_sequences = args.policy.objective.aggregate == Aggregate::sequence_mean;
  double* const weights = scratch;
  launch(weigh_kernel, {of_sequences ? args.policy.sequences : 1, kStepThreads, kStepWarps * sizeof(int64_t)}, stream,
         args.policy, weights);
  Grid grid = grid_of(tile, args.policy.tokens);
  grid.overlap = true;
  launch(kernel_for(args.logits.dtype), grid, stream,
         Step{args, scale_of(args.temperature), tile.cluster, tile.part, weights});
  PolicyLossArgs loss = args.policy;
  loss.scratch = scratch + std::max<int64_t>(args.policy.sequences, 1);
  launch_policy_loss(loss, stream);
}

}  // namespace gpu
}  // namespace r1k
