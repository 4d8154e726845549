// The fused GRPO step: statistics, objective and d logits with one read and one write of the logits.  A row lies in the
// shared memory of a cluster of blocks from the moment it arrives until its gradient has left: bulk copies bring it in
// chunks, each warp adds up its part, every block merges all parts of the row and works out the token's loss by itself,
// and the warps turn their parts into the gradient where they lie.
//
// Each warp has a ring of chunks of its own, so warps never wait for each other but once a row, for the merged sums; while
// these are worked out, by a warp of their own, the others add up the next row.

#include "cuda/grpo_step.h"

#include <algorithm>
#include <climits>
#include <map>
#include <mutex>
#include <tuple>

#include "common/vocabulary.h"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/policy_terms.cuh"
#include "cuda/step_rows.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kVec = 16;          // bytes
constexpr int kMaxWarps = 15;     // that hold logits: with the one that plans, four for each scheduler
constexpr int kMaxCluster = 8;    // more is not portable
constexpr int kMaxParts = kMaxWarps * kMaxCluster;
constexpr int kUnroll = 2;        // vectors a lane holds at a time
constexpr int kGroup = kUnroll * kWarp;  // vectors a warp holds at a time
// Rows of which a block may hold sums or plans.  A warp publishes the sums of row q once its block has a plan for row
// q - 2, for which every block published row q - 2, after reading its plan for row q - 4: that slot is free everywhere.
constexpr int kDepth = 4;

enum class RowKind : int { zero, policy, policy_and_entropy };

// What becomes of a row, once its token's loss is known.
struct RowPlan {
  RowGradient row;
  float own;   // the gradient of the token's own entry
  RowKind kind;
  int64_t id;  // the token
};

struct StepShared {
  float sums[kDepth][kMaxParts][4];  // top, rest, weighted, count of each part of a row
  float own[kDepth];                 // the token's own logit
  RowPlan plan[kDepth];
  Barrier published[kDepth];         // by all warps of the cluster
  Barrier planned[kDepth];
};

struct Step {
  GrpoStepArgs args;
  StepTile tile;
};

__host__ __device__ constexpr size_t align_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

__host__ __device__ inline size_t rings_offset(const StepTile& tile) {
  return align_up(sizeof(StepShared) + sizeof(Barrier) * tile.warps * tile.slots, 128);
}

// ---- a warp's part of rows ---------------------------------------------------------------------------------

// A row is cut into vectors of 16 bytes from the last multiple of 16 at or before its start.
__device__ __forceinline__ unsigned char* start_of(const RowView& rows, int64_t n) {
  int64_t offset = n * rows.strides[0];
  if (rows.leading == 2) {
    const unsigned inner = static_cast<unsigned>(rows.sizes[1]), row = static_cast<unsigned>(n);
    offset = row / inner * rows.strides[0] + row % inner * rows.strides[1];
  }
  return static_cast<unsigned char*>(const_cast<void*>(rows.data)) + offset * size_of(rows.dtype);
}

// Consecutive vectors of a row.  The first and the last of the row may hold entries of other rows as well.
struct Part {
  unsigned char* data;  // a multiple of 16
  int count;            // vectors
  int before;           // bytes of the first vector before the row
  int after;            // bytes of the last vector after the row
};

__device__ __forceinline__ Part part_of(const RowView& rows, int64_t n, int index, const StepTile& tile) {
  unsigned char* const start = start_of(rows, n);
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(start) % kVec);
  const int bytes = shift + static_cast<int>(rows.vocab * size_of(rows.dtype));
  const int vectors = (bytes + kVec - 1) / kVec;
  const int begin = smaller(index * tile.part, vectors), end = smaller(begin + tile.part, vectors);
  return {start - shift + static_cast<int64_t>(begin) * kVec, end - begin, begin == 0 ? shift : 0,
          end == vectors ? vectors * kVec - bytes : 0};
}

// Vectors [begin, begin + count) of a part; bulk copies move [whole_begin, whole_end) of those.
struct Chunk {
  int begin, count, whole_begin, whole_end;

  __device__ bool whole() const { return whole_end - whole_begin == count; }
  __device__ uint32_t bytes() const { return static_cast<uint32_t>(whole_end - whole_begin) * kVec; }
};

__device__ __forceinline__ Chunk chunk_of(const Part& part, int j, const StepTile& tile) {
  const int begin = j * tile.chunk;
  const int count = larger(smaller(tile.chunk, part.count - begin), 0);
  const int whole_begin = smaller(begin == 0 && part.before != 0 ? 1 : 0, count);
  const int whole_end = begin + count == part.count && part.after != 0 ? count - 1 : count;
  return {begin, count, whole_begin, larger(whole_begin, whole_end)};
}

// One warp's view of the step: its ring, and the chunks under way to it.
template <typename D>
class PartWarp {
 public:
  using Entry = typename D::Storage;

  __device__ PartWarp(const Step& step, StepShared& shared, int64_t cluster, int64_t clusters)
      : args_(step.args),
        tile_(step.tile),
        shared_(shared),
        index_(cluster_rank() * step.tile.warps + warp_id()),
        scale_(scale_of(step.args.temperature)),
        full_(reinterpret_cast<Barrier*>(&shared + 1) + warp_id() * step.tile.slots),
        ring_(reinterpret_cast<unsigned char*>(&shared) + rings_offset(step.tile) +
              static_cast<size_t>(warp_id()) * step.tile.slots * step.tile.chunk * kVec),
        walk_(step.args.policy.mask, step.args.policy.tokens, cluster, clusters) {
    next_row();
  }

  // Asks for the next chunk; its slot is free.
  __device__ void load_next() {
    if (!coming_) return;
    if (lane_id() == 0) {
      const Chunk chunk = chunk_of(coming_part_, coming_chunk_, tile_);
      barrier_expect(full_ + coming_slot_, chunk.bytes());
      if (chunk.bytes() > 0) {
        bulk_load(slot(coming_slot_) + chunk.whole_begin * kVec,
                  coming_part_.data + (chunk.begin + chunk.whole_begin) * kVec, chunk.bytes(), full_ + coming_slot_);
      }
    }
    coming_slot_ = coming_slot_ + 1 < tile_.slots ? coming_slot_ + 1 : 0;
    if (++coming_chunk_ == tile_.chunks) next_row();
  }

  __device__ void fill() {
#pragma unroll 1
    for (int k = 0; k < tile_.slots; ++k) load_next();
  }

  // Zeros for the rows that do not count.
  __device__ void clear_masked(int64_t cluster, int64_t clusters) {
    if (args_.policy.mask == nullptr) return;
    for (int64_t n = cluster; n < args_.policy.tokens; n += clusters) {
      if (args_.policy.mask[n]) continue;
      const Part part = part_of(args_.out, n, index_, tile_);
      const Chunk all = {0, part.count, smaller(part.before != 0 ? 1 : 0, part.count),
                         part.after != 0 ? part.count - 1 : part.count};
      for (int v = all.whole_begin + lane_id(); v < all.whole_end; v += kWarp) {
        store_streaming(part.data + static_cast<int64_t>(v) * kVec, {{0, 0, 0, 0}});
      }
      for_each_end(part, all, [&](int v, int k) { entries(part.data, v)[k] = 0; });
    }
  }

  // The sums of this part of row n, the q-th that counts, to all blocks of the cluster.  id: the row's token.
  __device__ void publish_sums(int64_t n, int64_t id, int64_t q) {
    const Part part = part_of(args_.logits, n, index_, tile_);
    const int own_entry = entry_of(part, start_of(args_.logits, n), id);
    const int own_vector = own_entry < 0 ? -1 : own_entry / D::kPerVec;
    float own = 0;
    RowSums sums;
#pragma unroll 1
    for (int j = 0; j < tile_.chunks; ++j) {
      const Chunk chunk = chunk_of(part, j, tile_);
      unsigned char* const data = slot(take_slot_);
      barrier_wait(full_ + take_slot_, take_parity_);
      if (++take_slot_ == tile_.slots) {
        take_slot_ = 0;
        take_parity_ ^= 1;
      }
      if (!chunk.whole()) complete(part, chunk, data);
      if (own_vector >= chunk.begin && own_vector < chunk.begin + chunk.count) {  // to be left out of the sums
        Entry* const entry = entries(data, 0) + (own_entry - chunk.begin * D::kPerVec);
        own = D::load(entry);
        sync_warp();
        if (lane_id() == 0) D::store(entry, -INFINITY);
        sync_warp();
      }
      int v = lane_id();
#pragma unroll 1
      for (; v + kWarp < chunk.count; v += kGroup) {
        float x[kUnroll * D::kPerVec];
        for (int u = 0; u < kUnroll; ++u) unpack(data, v + u * kWarp, x, u);
        add_entries<D::kExact>(sums, x, scale_);
      }
      if (v < chunk.count) {
        float x[D::kPerVec];
        unpack(data, v, x, 0);
        add_entries<D::kExact>(sums, x, scale_);
      }
    }
    const float top = warp_max(sums.top);
    sums = relative_to<D::kExact>(sums, top, scale_);
    const float rest = warp_sum(sums.rest), weighted = warp_sum(sums.weighted), count = warp_sum(sums.count);
    const int block = lane_id(), depth = static_cast<int>(q % kDepth);
    if (block < tile_.cluster) {
      remote_store4(shared_.sums[depth][index_], block, top, rest, weighted, count);
      if (own_entry >= 0) remote_store(&shared_.own[depth], block, own);
      remote_arrive(&shared_.published[depth], block);
    }
  }

  // The gradient of this part of row n, the q-th that counts, over the logits in the ring, and out; slots that it has left
  // are filled again.
  __device__ void write_gradient(int64_t n, int64_t q) {
    const Part part = part_of(args_.out, n, index_, tile_);
    const int depth = static_cast<int>(q % kDepth);
    barrier_wait(&shared_.planned[depth], static_cast<int>(q / kDepth % 2));
    const RowPlan plan = shared_.plan[depth];
    const int own_entry = entry_of(part, start_of(args_.out, n), plan.id);
    const int own_vector = own_entry < 0 ? -1 : own_entry / D::kPerVec;
#pragma unroll 1
    for (int j = 0; j < tile_.chunks; ++j) {
      const Chunk chunk = chunk_of(part, j, tile_);
      unsigned char* const data = slot(give_slot_);
      give_slot_ = give_slot_ + 1 < tile_.slots ? give_slot_ + 1 : 0;
      if (plan.kind == RowKind::policy) {
#pragma unroll 2
        for (int v = lane_id(); v < chunk.count; v += kWarp) turn<false>(data, v, plan.row);
      } else if (plan.kind == RowKind::policy_and_entropy) {
#pragma unroll 2
        for (int v = lane_id(); v < chunk.count; v += kWarp) turn<true>(data, v, plan.row);
      } else {
#pragma unroll 1
        for (int v = lane_id(); v < chunk.count; v += kWarp) vector(data, v) = {{0, 0, 0, 0}};
      }
      sync_warp();
      if (lane_id() == 0 && own_vector >= chunk.begin && own_vector < chunk.begin + chunk.count) {
        D::store(entries(data, 0) + (own_entry - chunk.begin * D::kPerVec), plan.own);
      }
      fence_for_bulk();
      sync_warp();
      if (!chunk.whole()) {
        for_each_end(part, chunk, [&](int v, int k) { entries(part.data, chunk.begin + v)[k] = entries(data, v)[k]; });
        sync_warp();  // before the slot is filled again
      }
      if (lane_id() == 0) {
        if (chunk.bytes() > 0) {
          bulk_store(part.data + (chunk.begin + chunk.whole_begin) * kVec, data + chunk.whole_begin * kVec,
                     chunk.bytes());
        }
        commit_stores();
        wait_stores_read<1>();  // the chunk before this one has left its slot
      }
      if (leaving_) load_next();
      leaving_ = true;
    }
    if (tile_.slots < (1 + tile_.lookahead) * tile_.chunks + 1) settle();  // the next row needs every slot
  }

  // Every slot that a gradient has left is filled again.
  __device__ void settle() {
    if (lane_id() == 0) wait_stores_read<0>();
    if (leaving_) load_next();
    leaving_ = false;
  }

 private:
  __device__ void next_row() {
    const int64_t n = walk_.next();
    coming_ = n >= 0;
    if (coming_) coming_part_ = part_of(args_.logits, n, index_, tile_);
    coming_chunk_ = 0;
  }

  __device__ unsigned char* slot(int k) const { return ring_ + k * tile_.chunk * kVec; }
  static __device__ __forceinline__ Vec16& vector(unsigned char* data, int v) {
    return reinterpret_cast<Vec16*>(data)[v];
  }
  static __device__ __forceinline__ Entry* entries(unsigned char* data, int v) {
    return reinterpret_cast<Entry*>(data + static_cast<int64_t>(v) * kVec);
  }
  template <int kCount>
  static __device__ __forceinline__ void unpack(unsigned char* data, int v, float (&x)[kCount], int u) {
    float part[D::kPerVec];
    D::unpack(vector(data, v), part);
    for (int k = 0; k < D::kPerVec; ++k) x[u * D::kPerVec + k] = part[k];
  }
  template <bool kEntropy>
  static __device__ __forceinline__ void turn(unsigned char* data, int v, const RowGradient& row) {
    float x[D::kPerVec];
    D::unpack(vector(data, v), x);
    for (int k = 0; k < D::kPerVec; ++k) x[k] = entry_gradient<D::kExact, kEntropy>(x[k], row);
    vector(data, v) = D::pack(x);
  }

  // Where the entry of a token lies, in entries from a part's data; -1: in none or another part.
  __device__ int entry_of(const Part& part, const unsigned char* row, int64_t id) const {
    const int64_t bytes = row + id * static_cast<int64_t>(sizeof(Entry)) - part.data;
    const bool known = id >= 0 && id < args_.logits.vocab;  // the warp that plans says so
    return known && bytes >= 0 && bytes < static_cast<int64_t>(part.count) * kVec
               ? static_cast<int>(bytes / static_cast<int>(sizeof(Entry)))
               : -1;
  }

  // Calls f(vector, entry) for the row's entries in the vectors of a chunk that bulk copies leave out; one lane for each.
  template <typename F>
  static __device__ __forceinline__ void for_each_end(const Part& part, const Chunk& chunk, F f) {
    const int k = lane_id() % D::kPerVec, at = k * static_cast<int>(sizeof(Entry));
    const bool first = lane_id() < D::kPerVec && chunk.whole_begin == 1;
    const bool last = lane_id() >= kWarp - D::kPerVec && chunk.whole_end < chunk.count;
    const int v = first ? 0 : chunk.count - 1;
    if (!first && !last) return;
    const bool begins = chunk.begin + v == 0, ends = chunk.begin + v == part.count - 1;
    if ((!begins || at >= part.before) && (!ends || at < kVec - part.after)) f(v, k);
  }

  // Fills such vectors: -inf, which adds nothing, beside the row's entries.
  __device__ void complete(const Part& part, const Chunk& chunk, unsigned char* data) const {
    if (lane_id() < 2 * D::kPerVec) {
      const int k = lane_id() % D::kPerVec;
      if (lane_id() < D::kPerVec && chunk.whole_begin == 1) D::store(entries(data, 0) + k, -INFINITY);
      if (lane_id() >= D::kPerVec && chunk.whole_end < chunk.count) {
        D::store(entries(data, chunk.count - 1) + k, -INFINITY);
      }
    }
    sync_warp();
    for_each_end(part, chunk, [&](int v, int k) { entries(data, v)[k] = entries(part.data, chunk.begin + v)[k]; });
    sync_warp();
  }

  const GrpoStepArgs& args_;
  const StepTile& tile_;
  StepShared& shared_;
  const int index_;  // of the part, in the row
  const Scale scale_;
  Barrier* const full_;
  unsigned char* const ring_;
  RowWalk walk_;       // of what is loaded
  bool coming_;        // there is a row to load
  Part coming_part_ = {};
  int coming_chunk_ = 0, coming_slot_ = 0;
  int take_slot_ = 0, take_parity_ = 0;  // of the next chunk to add up
  int give_slot_ = 0;                    // of the next chunk of a gradient
  bool leaving_ = false;                 // the chunk before that one may still be leaving
};

// ---- the warp that plans -----------------------------------------------------------------------------------

// Merges the parts of a row, works out its token's loss and tells the block's warps what becomes of the row.
template <typename D>
__device__ RowStatistics merged_statistics(const GrpoStepArgs& args, const StepShared& shared, int depth, int parts) {
  const double c = scale_of_sums<D::kExact>(args.temperature);
  const double own = shared.own[depth];
  RowTotals totals = {own};
  float top = shared.own[depth];
  for (int k = lane_id(); k < parts; k += kWarp) top = std::fmax(top, shared.sums[depth][k][0]);
  totals.top = warp_max(top);
  for (int k = lane_id(); k < parts; k += kWarp) {
    const float* const sums = shared.sums[depth][k];
    const double part = static_cast<double>(sums[1]) + static_cast<double>(sums[3]);
    if (part != 0) add_part<D::kExact>(totals, sums[0], part, sums[2], c);
  }
  totals.total = warp_sum(totals.total);
  totals.weighted = warp_sum(totals.weighted);
  return row_statistics<D::kExact>(totals, own, args.temperature, c);
}

// What is known of a token before its log-prob.
struct TokenInputs {
  PolicyToken token;
  float old;
  int64_t id;
};

__device__ __forceinline__ TokenInputs read_token(const GrpoStepArgs& args, int64_t n, TokenWeight& weight) {
  TokenInputs inputs = {};
  if (n < 0) return inputs;
  const int64_t sequence = sequence_of(args.policy, n);
  const Broadcast &advantages = args.policy.advantages, &importance = args.policy.importance_weights;
  inputs.id = args.token_ids[n];
  inputs.old = args.policy.old_logprobs != nullptr ? args.policy.old_logprobs[n] : 0;
  inputs.token.has_ref = args.policy.ref_logprobs != nullptr;
  inputs.token.ref = inputs.token.has_ref ? args.policy.ref_logprobs[n] : 0;
  inputs.token.advantage = advantages.data[advantages.per_sequence ? sequence : n];
  inputs.token.importance = importance.data == nullptr ? 1 : importance.data[importance.per_sequence ? sequence : n];
  inputs.token.weight = weight.of(args.policy, sequence);
  return inputs;
}

template <typename D>
__device__ void plan_rows(const Step& step, StepShared& shared, int64_t cluster, int64_t clusters,
                          PolicySums* partials) {
  const GrpoStepArgs& args = step.args;
  const bool writes = cluster_rank() == 0 && lane_id() == 0;
  if (cluster_rank() == 0 && args.policy.mask != nullptr) {
    for (int64_t n = cluster + lane_id() * clusters; n < args.policy.tokens; n += kWarp * clusters) {
      if (!args.policy.mask[n]) args.logprobs[n] = args.entropy[n] = 0;
    }
  }
  PolicySums total;
  RowWalk walk(args.policy.mask, args.policy.tokens, cluster, clusters);
  TokenWeight weight(args.policy);
  int64_t n = walk.next();
  TokenInputs inputs = read_token(args, n, weight);
  for (int64_t q = 0; n >= 0; ++q) {
    const int depth = static_cast<int>(q % kDepth);
    const int64_t next = walk.next();
    const TokenInputs next_inputs = read_token(args, next, weight);  // under way while this row is waited for
    R1K_DEVICE_CHECK(inputs.id >= 0 && inputs.id < args.logits.vocab, "r1kernels: token_ids holds an id outside [0, V)");

    barrier_wait_cluster(&shared.published[depth], static_cast<int>(q / kDepth % 2));
    const RowStatistics row = merged_statistics<D>(args, shared, depth, step.tile.cluster * step.tile.warps);
    PolicyToken token = inputs.token;
    token.logprob = static_cast<float>(row.logprob);
    token.entropy = static_cast<float>(row.entropy);
    token.log_ratio = token.logprob - (args.policy.old_logprobs != nullptr ? inputs.old : token.logprob);
    const PolicyGradient gradient = add_token(total, args.policy.objective, token);
    if (lane_id() == 0) {
      RowPlan& plan = shared.plan[depth];
      plan.row = row_gradient(row.lse, row.entropy, args.temperature, gradient.g, gradient.eta);
      plan.own = own_gradient<D::kExact>(shared.own[depth], row.lse, row.entropy, args.temperature, gradient.g,
                                         gradient.eta);
      plan.id = inputs.id;
      plan.kind = gradient.eta != 0 ? RowKind::policy_and_entropy : gradient.g != 0 ? RowKind::policy : RowKind::zero;
      barrier_arrive(&shared.planned[depth]);
    }
    sync_warp();
    if (writes) {
      args.logprobs[n] = token.logprob;
      args.entropy[n] = token.entropy;
    }
    n = next;
    inputs = next_inputs;
  }
  if (writes) partials[cluster] = total;
}

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
      barrier_init(&shared.published[k], tile.cluster * tile.warps);
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

// The sums of all clusters, in order -> loss and metrics; and what no single row can see is looked at.
__global__ void __launch_bounds__(kWarp) finish_kernel(const __grid_constant__ GrpoStepArgs args,
                                                       const PolicySums* partials, int64_t count) {
  wait_for_previous_kernel();
  if (args.policy.normalizer != nullptr) {
    R1K_DEVICE_CHECK(*args.policy.normalizer > 0 && *args.policy.normalizer < INFINITY,
                     "r1kernels: normalizer must be a positive finite number");
  }
  if (args.policy.cu_seqlens != nullptr) {
    R1K_DEVICE_CHECK(args.policy.cu_seqlens[0] == 0 && args.policy.cu_seqlens[args.policy.sequences] == args.policy.tokens,
                     "r1kernels: cu_seqlens must run from 0 to N");
    for (int64_t s = lane_id(); s < args.policy.sequences; s += kWarp) {
      R1K_DEVICE_CHECK(args.policy.cu_seqlens[s] <= args.policy.cu_seqlens[s + 1], "r1kernels: cu_seqlens must not descend");
    }
  }
  PolicySums total;
  for (int64_t k = lane_id(); k < count; k += kWarp) total.merge(partials[k]);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    PolicySums other;
    other.loss = shuffle_xor(total.loss, mask);
    other.surrogate = shuffle_xor(total.surrogate, mask);
    other.kl = shuffle_xor(total.kl, mask);
    other.entropy = shuffle_xor(total.entropy, mask);
    other.ratio = shuffle_xor(total.ratio, mask);
    other.approx_kl = shuffle_xor(total.approx_kl, mask);
    other.ratio_min = shuffle_xor(total.ratio_min, mask);
    other.ratio_max = shuffle_xor(total.ratio_max, mask);
    other.tokens = shuffle_xor(total.tokens, mask);
    other.clip_low = shuffle_xor(total.clip_low, mask);
    other.clip_high = shuffle_xor(total.clip_high, mask);
    other.capped = shuffle_xor(total.capped, mask);
    other.active = shuffle_xor(total.active, mask);
    other.nonfinite = shuffle_xor(total.nonfinite, mask);
    total.merge(other);
  }
  if (lane_id() == 0) finish(total, args.policy.sequences, args.policy.loss, args.policy.metrics);
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
  static std::map<std::tuple<int, DType, int, int, size_t>, int> known;
  const std::tuple key(stream.device, dtype, tile.cluster, tile.warps, tile.shared);
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

// Vectors of a chunk: rounds of a warp, as many as leave the fewest of a ring's places empty, and at most 2.5 KiB.
int best_chunk(int part) {
  int best = 5 * kWarp, least = INT_MAX;
  for (int chunk = 5 * kWarp; chunk >= 2 * kWarp; chunk -= kWarp) {
    const int places = (part + chunk - 1) / chunk * chunk;
    if (places < least) {
      least = places;
      best = chunk;
    }
  }
  return best;
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
    if (chunk == 0) chunk = best_chunk(tile.part);
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
  // The fewest blocks that hold two rows and some of a third, else the most there can be.
  StepTile best = {};
  const int warps = std::clamp(vectors / kGroup, 1, kMaxWarps);
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    if (!fit(cluster, warps, 0)) continue;
    tile.clusters = clusters_at_once(args.logits.dtype, tile, stream);
    if (tile.clusters > 0) best = tile;
    if (tile.slots > 2 * tile.chunks) break;
  }
  return best;
}

size_t step_scratch(const StepTile& tile) { return sizeof(PolicySums) * tile.clusters; }

void launch_grpo_step(const GrpoStepArgs& args, const StepTile& tile, void* scratch, const Stream& stream) {
  auto* const partials = static_cast<PolicySums*>(scratch);
  const int64_t clusters = std::min<int64_t>(tile.clusters, args.policy.tokens);
  launch(kernel_for(args.logits.dtype), grid_of(tile, clusters), stream, Step{args, tile}, partials);
  Grid last = {1, kWarp};
  last.overlap = true;
  launch(finish_kernel, last, stream, args, partials, clusters);
}

}  // namespace gpu
}  // namespace r1k
