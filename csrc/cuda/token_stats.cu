// Token statistics from logits, in one read.  A block reduces one segment of a row to four float32 numbers; a second
// kernel merges the segments of each row in float64, in order, and starts while the first one ends.  Bits depend on
// the row alone: not on N, nor on how the row lies in memory.  The token's own logit is left out of the sums and joins
// in the second kernel, so that a log-prob near 0 keeps its relative accuracy.

#include "cuda/token_stats.h"

#include "common/vocabulary.h"
#include "cuda/collective.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLoads = 4;  // of 16 bytes, all in flight before the first is needed
constexpr int kMergeThreads = 128;

// What a product of 16-bit operands is: sums over H round more than a power does.
struct Product32 : Float32 {
  static constexpr bool kExact = false;
};

// ---- entries of a row --------------------------------------------------------------------------------------

// A tile is kLoads vectors of 16 bytes for each thread, next to those of its neighbours.  Where vectors cannot be read
// a thread reads the same entries one by one: its neighbours' lie in the same lines, and bits stay the same.
template <typename T>
struct Tile {
  static constexpr int kEntries = kLoads * T::kPerVec;  // of a thread
  static constexpr int kSize = kThreads * kEntries;

  // Where entry j of a thread stands, seen from its first one.
  static __device__ __forceinline__ int offset(int j) {
    return j / T::kPerVec * (kThreads * T::kPerVec) + j % T::kPerVec;
  }
};

template <typename T>
__device__ __forceinline__ void unpack_into(float* x, Vec16 raw) {
  float part[T::kPerVec];
  T::unpack(raw, part);
#pragma unroll
  for (int k = 0; k < T::kPerVec; ++k) x[k] = part[k];
}

// From the thread's first entry.
template <typename T, bool kVector>
__device__ __forceinline__ void load_tile(float (&x)[Tile<T>::kEntries], const typename T::Storage* first,
                                          int64_t stride) {
  if (kVector) {
    Vec16 raw[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) raw[u] = load_streaming(first + Tile<T>::offset(u * T::kPerVec));
#pragma unroll
    for (int u = 0; u < kLoads; ++u) unpack_into<T>(x + u * T::kPerVec, raw[u]);
  } else {
#pragma unroll
    for (int j = 0; j < Tile<T>::kEntries; ++j) x[j] = T::load(first + Tile<T>::offset(j) * stride);
  }
}

// Those at offsets below `left`; -inf, which adds nothing to any sum, stands for the others.
template <typename T, bool kVector>
__device__ __forceinline__ void load_rest(float (&x)[Tile<T>::kEntries], const typename T::Storage* first,
                                          int64_t stride, int left) {
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const int at = Tile<T>::offset(u * T::kPerVec);
    if (kVector && at + T::kPerVec <= left) {
      unpack_into<T>(x + u * T::kPerVec, load_streaming(first + at));
    } else {
#pragma unroll
      for (int k = 0; k < T::kPerVec; ++k) {
        x[u * T::kPerVec + k] = at + k < left ? T::load(first + (at + k) * stride) : -INFINITY;
      }
    }
  }
}

// ---- one segment of a row ----------------------------------------------------------------------------------

struct WarpSums {
  float top[kWarps], count[kWarps];
  double rest[kWarps], weighted[kWarps];
};

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) segment_kernel(const __grid_constant__ TokenStats args,
                                                            Scale common) {
  let_next_kernel_start();
  const unsigned segments = static_cast<unsigned>(segments_of(args.logits.vocab));
  const int64_t n = blockIdx.x / segments, segment = blockIdx.x % segments;
  if (args.mask != nullptr && !args.mask[n]) return;

  const int64_t begin = segment * kSegment, stride = kVector ? 1 : args.logits.vocab_stride;
  const int64_t length = args.logits.vocab - begin < kSegment ? args.logits.vocab - begin : kSegment;
  const int64_t target = args.token_ids[n] - begin;
  const int size = static_cast<int>(length), own = target >= 0 && target < length ? static_cast<int>(target) : -1;
  const int lane = static_cast<int>(threadIdx.x) * T::kPerVec;  // the thread's first entry in each tile
  const Scale scale = args.temperature.factors != nullptr ? scale_of(args.temperature.of(n)) : common;
  const typename T::Storage* row = static_cast<const typename T::Storage*>(args.logits.data) + args.logits.offset(n);
  const typename T::Storage* first = row + (begin + lane) * stride;

  RowSums sums;
  for (int at = 0; at < size; at += Tile<T>::kSize, first += Tile<T>::kSize * stride) {
    float x[Tile<T>::kEntries];
    if (size - at >= Tile<T>::kSize) {
      load_tile<T, kVector>(x, first, stride);
    } else {
      load_rest<T, kVector>(x, first, stride, size - at - lane);
    }
    if (static_cast<unsigned>(own - at) < static_cast<unsigned>(Tile<T>::kSize)) {  // the token is in this tile
#pragma unroll
      for (int j = 0; j < Tile<T>::kEntries; ++j) {
        if (Tile<T>::offset(j) == own - at - lane) x[j] = -INFINITY;
      }
    }
    add_entries<T::kExact>(sums, x, scale);
  }

  WarpSums& shared = *reinterpret_cast<WarpSums*>(dynamic_shared());
  const float warp_top = highest_lane(sums.top);
  if (lane_id() == 0) shared.top[warp_id()] = warp_top;
  sync_block();
  float top = shared.top[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) top = std::fmax(top, shared.top[w]);
  sums = relative_to<T::kExact>(sums, top, scale);
  const double rest = sum_lanes(static_cast<double>(sums.rest));
  const double weighted = sum_lanes(static_cast<double>(sums.weighted));
  const float count = T::kExact ? sum_lanes(sums.count) : 0;
  if (lane_id() == 0) {
    shared.rest[warp_id()] = rest;
    shared.weighted[warp_id()] = weighted;
    shared.count[warp_id()] = count;
  }
  sync_block();
  if (threadIdx.x != 0) return;
  double all_rest = 0, all_weighted = 0;
  float all_count = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    all_rest += shared.rest[w];
    all_weighted += shared.weighted[w];
    all_count += shared.count[w];
  }
  args.partials[blockIdx.x] = {top, static_cast<float>(all_rest), static_cast<float>(all_weighted), all_count};
}

// ---- the row as a whole ------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ RowStatistics merge_segments(const TokenStats& args, int64_t n, int64_t target) {
  const double temperature = args.temperature.of(n);
  const double c = scale_of_sums<T::kExact>(temperature);
  const double x = T::load(static_cast<const typename T::Storage*>(args.logits.data) + args.logits.offset(n) +
                           target * args.logits.vocab_stride);
  const int64_t segments = segments_of(args.logits.vocab);
  const SegmentSums* parts = args.partials + n * segments;
  float top = kLowest;
  for (int64_t s = 0; s < segments; ++s) top = std::fmax(top, parts[s].top);
  RowTotals totals = row_totals<T::kExact>(top, x, c);
#pragma unroll 1  // more would spill; the numbers are near by now
  for (int64_t s = 0; s < segments; ++s) {
    const SegmentSums part = parts[s];
    add_part<T::kExact>(totals, part.top, static_cast<double>(part.rest) + part.count, part.weighted, c);
  }
  return row_statistics<T::kExact>(totals, x, temperature, c);
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ TokenStats args) {
  wait_for_previous_kernel();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (n >= args.count) return;
  const bool counts = args.mask == nullptr || args.mask[n];
  const int64_t target = counts ? args.token_ids[n] : 0;
  const bool known = target >= 0 && target < args.logits.vocab;
  RowStatistics row = {0, 0, 0};
  if (counts && known) row = merge_segments<T>(args, n, target);
  args.logprobs[n] = static_cast<float>(row.logprob);
  args.lse[n] = row.lse;
  args.entropy[n] = row.entropy;
  R1K_DEVICE_CHECK(known, "r1kernels: token_ids holds an id outside [0, V)");
}

template <typename T>
void launch_for(const TokenStats& args, const Stream& stream) {
  const Grid segments = {args.count * segments_of(args.logits.vocab), kThreads, sizeof(WarpSums)};
  launch(aligned16(args.logits) ? segment_kernel<T, true> : segment_kernel<T, false>, segments, stream, args,
         scale_of(args.temperature.common));
  Grid rows = {(args.count + kMergeThreads - 1) / kMergeThreads, kMergeThreads};
  rows.overlap = stream.properties.major >= 9;
  launch(merge_kernel<T>, rows, stream, args);
}

}  // namespace

void launch_token_stats(const TokenStats& args, const Stream& stream) {
  switch (args.logits.dtype) {
    case DType::float32: return args.exact ? launch_for<Float32>(args, stream) : launch_for<Product32>(args, stream);
    case DType::bfloat16: return launch_for<BFloat16>(args, stream);
    case DType::float16: return launch_for<Float16>(args, stream);
  }
}

}  // namespace gpu
}  // namespace r1k
