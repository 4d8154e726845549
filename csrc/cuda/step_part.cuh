// A warp's part of rows in the fused step: chunks that come, are added up, turn into the gradient, and go.
#pragma once

#include "common/vocabulary.h"
#include "cuda/step_rows.cuh"
#include "cuda/step_shared.cuh"

namespace r1k {
namespace gpu {

// A row is cut into vectors of 16 bytes from the last multiple of 16 at or before its start.
__device__ __forceinline__ unsigned char* start_of(const RowView& rows, int64_t n) {
  int64_t offset = n * rows.strides[0];
  if (rows.leading == 2) {
    const unsigned inner = static_cast<unsigned>(rows.sizes[1]), row = static_cast<unsigned>(n);
    offset = row / inner * rows.strides[0] + row % inner * rows.strides[1];
  }
  return static_cast<unsigned char*>(const_cast<void*>(rows.data)) + offset * size_of(rows.dtype);
}
__device__ __forceinline__ int late(const unsigned char* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVec);
}

// Consecutive vectors of rows that start so many bytes late in a vector.  The first and the last vector of a row may
// hold entries of other rows as well.
struct Part {
  int late;
  int begin;   // in vectors of the row
  int count;   // vectors
  int before;  // bytes of the first vector before the row
  int after;   // bytes of the last vector after the row
};

__device__ __forceinline__ Part part_of(int late, const RowView& rows, int index, const StepTile& tile) {
  const int bytes = late + static_cast<int>(rows.vocab * size_of(rows.dtype));
  const int vectors = (bytes + kVec - 1) / kVec;
  const int begin = smaller(index * tile.part, vectors), end = smaller(begin + tile.part, vectors);
  return {late, begin, end - begin, begin == 0 ? late : 0, end == vectors ? vectors * kVec - bytes : 0};
}

// Vectors [begin, begin + count) of a part; bulk copies move [whole_begin, whole_end) of those.
struct Chunk {
  int begin, count, whole_begin, whole_end;

  __device__ bool whole() const { return whole_end - whole_begin == count; }
  __device__ uint32_t bytes() const { return static_cast<uint32_t>(whole_end - whole_begin) * kVec; }
};

// The chunk without the vectors that hold entries of other rows.
__device__ __forceinline__ Chunk whole_of(const Part& part, Chunk chunk) {
  if (part.before + part.after == 0) return chunk;
  if (chunk.begin == 0 && part.before != 0) chunk.whole_begin = smaller(1, chunk.count);
  if (chunk.begin + chunk.count == part.count && part.after != 0) chunk.whole_end = chunk.count - 1;
  chunk.whole_end = larger(chunk.whole_begin, chunk.whole_end);
  return chunk;
}

__device__ __forceinline__ Chunk chunk_of(const Part& part, int j, const StepTile& tile) {
  const int begin = j * tile.chunk;
  const int count = larger(smaller(tile.chunk, part.count - begin), 0);
  return whole_of(part, {begin, count, 0, count});
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
        walk_(step.args.policy.mask, step.args.policy.tokens, cluster, clusters),
        part_(part_of(0, step.args.logits, index_, step.tile)) {
    next_row();
  }

  // Asks for the next chunk; its slot is free.
  __device__ void load_next() {
    if (coming_ == nullptr) return;
    if (lane_id() == 0) {
      const Part part = part_at(late(coming_));
      const Chunk chunk = chunk_of(part, coming_chunk_, tile_);
      barrier_expect(full_ + coming_slot_, chunk.bytes());
      if (chunk.bytes() > 0) {
        const unsigned char* const from = data_of(coming_, part) + (chunk.begin + chunk.whole_begin) * kVec;
        bulk_load(slot(coming_slot_) + chunk.whole_begin * kVec, from, chunk.bytes(), full_ + coming_slot_);
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
      const unsigned char* const row = start_of(args_.out, n);
      const Part part = part_at(late(row));
      unsigned char* const data = data_of(row, part);
      const Chunk all = whole_of(part, {0, part.count, 0, part.count});
      for (int v = all.whole_begin + lane_id(); v < all.whole_end; v += kWarp) {
        store_streaming(data + static_cast<int64_t>(v) * kVec, {{0, 0, 0, 0}});
      }
      for_each_end(part, all, [&](int v, int k) { entries(data, v)[k] = 0; });
    }
  }

  // The sums of this part of row n, the q-th that counts, to all blocks of the cluster.  id: the row's token.
  __device__ void publish_sums(int64_t n, int64_t id, int64_t q) {
    const unsigned char* const row = start_of(args_.logits, n);
    const Part part = part_at(late(row));
    const int own_entry = entry_of(part, id);
    const int own_vector = own_entry < 0 ? -1 : own_entry / D::kPerVec;
    float own = 0;
    RowSums sums;
#pragma unroll 1
    for (int j = 0; j < tile_.chunks; ++j) {
      const Chunk chunk = chunk_of(part, j, tile_);
      unsigned char* const data = slot(take_slot_);
      barrier_wait(full_ + take_slot_, take_parity_);
      if (j == 0) settle();  // the last chunk of the gradient before has left by now
      if (++take_slot_ == tile_.slots) {
        take_slot_ = 0;
        take_parity_ ^= 1;
      }
      if (!chunk.whole()) complete(part, chunk, data, data_of(row, part));
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
    const float top = highest_lane(sums.top);
    sums = relative_to<D::kExact>(sums, top, scale_);
    const float rest = sum_lanes(sums.rest), weighted = sum_lanes(sums.weighted), count = sum_lanes(sums.count);
    const int block = lane_id(), depth = static_cast<int>(q % kDepth);
    if (block < tile_.cluster) {
      Barrier* const published = &shared_.published[depth];
      remote_send4(shared_.sums[depth][index_], block, top, rest, weighted, count, published);
      if (own_entry >= 0) remote_send(&shared_.own[depth], block, own, published);
    }
  }

  // The gradient of this part of row n, the q-th that counts, over the logits in the ring, and out; slots that it has
  // left are filled again.
  __device__ void write_gradient(int64_t n, int64_t q) {
    const unsigned char* const row = start_of(args_.out, n);
    const Part part = part_at(late(row));
    unsigned char* const out = data_of(row, part);
    const int depth = static_cast<int>(q % kDepth);
    barrier_wait(&shared_.planned[depth], static_cast<int>(q / kDepth % 2));
    const RowPlan plan = shared_.plan[depth];
    const int own_entry = entry_of(part, plan.id);
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
        for_each_end(part, chunk, [&](int v, int k) { entries(out, chunk.begin + v)[k] = entries(data, v)[k]; });
        sync_warp();  // before the slot is filled again
      }
      if (lane_id() == 0) {
        if (chunk.bytes() > 0) {
          bulk_store(out + (chunk.begin + chunk.whole_begin) * kVec, data + chunk.whole_begin * kVec, chunk.bytes());
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
    coming_ = n >= 0 ? start_of(args_.logits, n) : nullptr;
    coming_chunk_ = 0;
  }

  // Of rows that start so late: mostly all do.
  __device__ __forceinline__ Part part_at(int late) {
    if (late != part_.late) part_ = part_of(late, args_.logits, index_, tile_);
    return part_;
  }
  // The first vector of this part of a row.
  static __device__ __forceinline__ unsigned char* data_of(const unsigned char* row, const Part& part) {
    return const_cast<unsigned char*>(row) - part.late + static_cast<int64_t>(part.begin) * kVec;
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

  // Where the entry of a token lies, in entries from a part's first vector; -1: in another part.
  __device__ __forceinline__ static int entry_of(const Part& part, int64_t id) {
    const int64_t entry = id + part.late / static_cast<int>(sizeof(Entry)) - part.begin * D::kPerVec;
    return entry >= 0 && entry < part.count * D::kPerVec ? static_cast<int>(entry) : -1;
  }

  // Calls f(vector, entry) for the row's entries in the vectors of a chunk that bulk copies leave out, a lane for each.
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
  __device__ void complete(const Part& part, const Chunk& chunk, unsigned char* data, unsigned char* row) const {
    if (lane_id() < 2 * D::kPerVec) {
      const int k = lane_id() % D::kPerVec;
      if (lane_id() < D::kPerVec && chunk.whole_begin == 1) D::store(entries(data, 0) + k, -INFINITY);
      if (lane_id() >= D::kPerVec && chunk.whole_end < chunk.count) {
        D::store(entries(data, chunk.count - 1) + k, -INFINITY);
      }
    }
    sync_warp();
    for_each_end(part, chunk, [&](int v, int k) { entries(data, v)[k] = entries(row, chunk.begin + v)[k]; });
    sync_warp();
  }

  const GrpoStepArgs& args_;
  const StepTile& tile_;
  StepShared& shared_;
  const int index_;  // of the part, in the row
  const Scale scale_;
  Barrier* const full_;
  unsigned char* const ring_;
  RowWalk walk_;  // of what is loaded
  Part part_;
  const unsigned char* coming_;  // the row that is loaded, or null
  int coming_chunk_ = 0, coming_slot_ = 0;
  int take_slot_ = 0, take_parity_ = 0;  // of the next chunk to add up
  int give_slot_ = 0;                    // of the next chunk of a gradient
  bool leaving_ = false;                 // the chunk before that one may still be leaving
};

}  // namespace gpu
}  // namespace r1k
