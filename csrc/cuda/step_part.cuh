// A block's part of a row in the fused step: how it comes into shared memory, what is left out of its sums, and how its
// gradient leaves.
#pragma once

#include "common/vocabulary.h"
#include "cuda/collective.cuh"
#include "cuda/grpo_step.h"
#include "cuda/hopper.cuh"

namespace r1k {
namespace gpu {

constexpr int kVec = 16;  // bytes
constexpr int kStepThreads = 192;
constexpr int kStepWarps = kStepThreads / kWarp;

__device__ __forceinline__ unsigned char* start_of(const RowView& rows, int64_t n) {
  int64_t offset = n * rows.strides[0];
  if (rows.leading == 2) {
    const unsigned inner = static_cast<unsigned>(rows.sizes[1]), row = static_cast<unsigned>(n);
    offset = row / inner * rows.strides[0] + row % inner * rows.strides[1];
  }
  return static_cast<unsigned char*>(const_cast<void*>(rows.data)) + offset * size_of(rows.dtype);
}

// Consecutive vectors of a row, which is cut into vectors of 16 bytes from the last multiple of 16 at or before its
// start.  The first and the last vector of a row may hold entries of other rows as well: these two are read and written
// entry by entry.
template <typename D>
class Part {
 public:
  using Entry = typename D::Storage;

  // `size` vectors, or what is left of the row: the `index`-th of such parts.
  __device__ Part(const unsigned char* row, int64_t vocab, int index, int size) {
    late_ = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVec);
    const int bytes = late_ + static_cast<int>(vocab * sizeof(Entry));
    const int vectors = (bytes + kVec - 1) / kVec;
    begin_ = smaller(index * size, vectors);
    count_ = smaller(begin_ + size, vectors) - begin_;
    before_ = begin_ == 0 ? late_ : 0;
    after_ = begin_ + count_ == vectors ? vectors * kVec - bytes : 0;
  }

  __device__ int count() const { return count_; }

  // Of the vectors that hold nothing but this row.
  __device__ int whole_begin() const { return before_ != 0 ? smaller(1, count_) : 0; }
  __device__ int whole_end() const { return larger(whole_begin(), count_ - (after_ != 0 ? 1 : 0)); }

  // The part's first vector in memory, of a row that starts as late in a vector as the one it was made for.
  __device__ unsigned char* of(const unsigned char* row) const {
    return const_cast<unsigned char*>(row) - late_ + static_cast<int64_t>(begin_) * kVec;
  }

  // Where the entry of a token lies, in entries from the part's first vector; -1: in another part.
  __device__ int entry_of(int64_t id) const {
    const int64_t entry = id + late_ / static_cast<int>(sizeof(Entry)) - static_cast<int64_t>(begin_) * D::kPerVec;
    return entry >= 0 && entry < count_ * D::kPerVec ? static_cast<int>(entry) : -1;
  }

  // f(entry, whether it is one of the row) for the entries of vectors that also hold other rows, a lane of one warp for
  // each.
  template <typename F>
  __device__ void for_each_edge(F f) const {
    const int k = lane_id() % D::kPerVec, at = k * static_cast<int>(sizeof(Entry));
    const bool first = lane_id() < D::kPerVec && whole_begin() == 1;
    const bool last = lane_id() >= kWarp - D::kPerVec && whole_end() < count_;
    if (!first && !last) return;
    const int v = first ? 0 : count_ - 1;
    const bool begins = v == 0, ends = v == count_ - 1;
    f(v * D::kPerVec + k, (!begins || at >= before_) && (!ends || at < kVec - after_));
  }

 private:
  int late_;    // bytes of the row's first vector before the row
  int begin_;   // in vectors of the row
  int count_;   // vectors
  int before_;  // bytes of the part's first vector before the row
  int after_;   // bytes of the part's last vector after the row
};

__device__ __forceinline__ Vec16& vector_at(unsigned char* data, int v) { return reinterpret_cast<Vec16*>(data)[v]; }

template <typename D>
__device__ __forceinline__ typename D::Storage* entries_at(unsigned char* data) {
  return reinterpret_cast<typename D::Storage*>(data);
}

// ---- in -----------------------------------------------------------------------------------------------------

// By one thread: asks for the vectors that hold nothing but this row.
template <typename D>
__device__ void load_part(const Part<D>& part, const unsigned char* row, unsigned char* data, Barrier* arrived) {
  const int begin = part.whole_begin() * kVec;
  const uint32_t bytes = static_cast<uint32_t>(part.whole_end() * kVec - begin);
  barrier_expect(arrived, bytes);
  if (bytes > 0) bulk_load(data + begin, part.of(row) + begin, bytes, arrived);
}

// By one warp: the row's other entries, and -inf, which adds nothing, in place of those of other rows.
template <typename D>
__device__ void load_edges(const Part<D>& part, const unsigned char* row, unsigned char* data) {
  part.for_each_edge([&](int entry, bool mine) {
    if (mine) {
      entries_at<D>(data)[entry] = entries_at<D>(part.of(row))[entry];
    } else {
      D::store(entries_at<D>(data) + entry, -INFINITY);
    }
  });
}

// ---- sums ---------------------------------------------------------------------------------------------------

constexpr int kSumVectors = 4;  // that a thread adds up at a time

template <typename D>
__device__ __forceinline__ void unpack_at(unsigned char* data, int v, float* x) {
  float part[D::kPerVec];
  D::unpack(vector_at(data, v), part);
#pragma unroll
  for (int k = 0; k < D::kPerVec; ++k) x[k] = part[k];
}

// The sums of a warp's vectors, in all of its lanes.  Thread t of the block has the vectors t, t + kStepThreads, ...
template <typename D>
__device__ __forceinline__ RowSums sum_part(unsigned char* data, int count, Scale scale) {
  RowSums sums;
  int v = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (; v + (kSumVectors - 1) * kStepThreads < count; v += kSumVectors * kStepThreads) {
    float x[kSumVectors * D::kPerVec];
#pragma unroll
    for (int u = 0; u < kSumVectors; ++u) unpack_at<D>(data, v + u * kStepThreads, x + u * D::kPerVec);
    add_entries<D::kExact>(sums, x, scale);
  }
#pragma unroll 1
  for (; v < count; v += kStepThreads) {
    float x[D::kPerVec];
    unpack_at<D>(data, v, x);
    add_entries<D::kExact>(sums, x, scale);
  }
  sums = relative_to<D::kExact>(sums, highest_lane(sums.top), scale);
  sums.rest = sum_lanes(sums.rest);
  sums.weighted = sum_lanes(sums.weighted);
  sums.count = D::kExact ? sum_lanes(sums.count) : 0;
  return sums;
}

// ---- out ----------------------------------------------------------------------------------------------------

// gradient(x) of each entry, from shared memory to the gradient's row.
template <typename D, typename Gradient>
__device__ __forceinline__ void write_part(const Part<D>& part, unsigned char* data, unsigned char* row,
                                           const Gradient& gradient) {
  unsigned char* const out = part.of(row);
  const int end = part.whole_end();
#pragma unroll 2
  for (int v = part.whole_begin() + static_cast<int>(threadIdx.x); v < end; v += kStepThreads) {
    float x[D::kPerVec];
    unpack_at<D>(data, v, x);
#pragma unroll
    for (int k = 0; k < D::kPerVec; ++k) x[k] = gradient(x[k]);
    store_streaming(out + static_cast<int64_t>(v) * kVec, D::pack(x));
  }
  if (warp_id() != 0) return;
  part.for_each_edge([&](int entry, bool mine) {
    if (mine) D::store(entries_at<D>(out) + entry, gradient(D::load(entries_at<D>(data) + entry)));
  });
}

template <typename D>
__device__ void clear_part(const Part<D>& part, unsigned char* row) {
  unsigned char* const out = part.of(row);
  const int end = part.whole_end();
#pragma unroll 4
  for (int v = part.whole_begin() + static_cast<int>(threadIdx.x); v < end; v += kStepThreads) {
    store_streaming(out + static_cast<int64_t>(v) * kVec, {{0, 0, 0, 0}});
  }
  if (warp_id() != 0) return;
  part.for_each_edge([&](int entry, bool mine) {
    if (mine) entries_at<D>(out)[entry] = 0;
  });
}

}  // namespace gpu
}  // namespace r1k
