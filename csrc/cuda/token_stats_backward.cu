// The gradient of token statistics with respect to the logits: one read and one write of a row.
//
//   dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T,    g = dL/dlogprob,  eta = dL/dentropy
//
// A block takes one segment of a row, or all of it where narrower entries land on logits before them.  Rows without a
// gradient are written without being read.

#include "cuda/token_stats_backward.h"

#include "common/vocabulary.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/token_stats.h"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;    // that share a processor's registers
constexpr int kLoads = 4;     // of 16 bytes, all in flight before the first is needed
constexpr int kSingles = 16;  // the same for entries read one by one

// ---- a tile of a row ---------------------------------------------------------------------------------------

// What a block walks over: a part of a row and where its gradient goes, from the first entry of a tile.
template <typename In, typename Out>
struct Part {
  const typename In::Storage* logits;
  typename Out::Storage* out;
  int64_t stride;  // between logits
  int left;        // entries from here on
  bool read_first;  // a tile may be overwritten only when all of it has been read
};

// In whole vectors, a thread's next to those of its neighbours; the last few entries one by one.  With kFull the whole
// tile lies in the row.
template <typename In, typename Out, bool kFull, typename Gradient>
__device__ __forceinline__ void vector_tile(const Part<In, Out>& part, const Gradient& gradient) {
  constexpr int kChunk = Out::kPerVec, kVecs = kChunk / In::kPerVec, kChunks = kLoads / kVecs;
  const int lane = static_cast<int>(threadIdx.x) * kChunk;
  const int left = kFull ? kThreads * kLoads * In::kPerVec : part.left;
  Vec16 raw[kLoads];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int at = c * kThreads * kChunk + lane;
    if (kFull || at + kChunk <= left) {
#pragma unroll
      for (int v = 0; v < kVecs; ++v) raw[c * kVecs + v] = load_streaming(part.logits + at + v * In::kPerVec);
    }
  }
  const int single = left / kChunk * kChunk + static_cast<int>(threadIdx.x);
  const float x_single = !kFull && single < left ? In::load(part.logits + single) : 0;
  if (part.read_first) sync_block();
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int at = c * kThreads * kChunk + lane;
    if (kFull || at + kChunk <= left) {
      float y[kChunk];
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        float x[In::kPerVec];
        In::unpack(raw[c * kVecs + v], x);
#pragma unroll
        for (int k = 0; k < In::kPerVec; ++k) y[v * In::kPerVec + k] = gradient(x[k]);
      }
      store_streaming(part.out + at, Out::pack(y));
    }
  }
  if (!kFull && single < left) Out::store(part.out + single, gradient(x_single));
}

// One by one, each next to those of the thread's neighbours.
template <typename In, typename Out, bool kFull, typename Gradient>
__device__ __forceinline__ void entry_tile(const Part<In, Out>& part, const Gradient& gradient) {
  float x[kSingles];
#pragma unroll
  for (int j = 0; j < kSingles; ++j) {
    const int at = j * kThreads + static_cast<int>(threadIdx.x);
    x[j] = kFull || at < part.left ? In::load(part.logits + at * part.stride) : 0;
  }
  if (part.read_first) sync_block();
#pragma unroll
  for (int j = 0; j < kSingles; ++j) {
    const int at = j * kThreads + static_cast<int>(threadIdx.x);
    if (kFull || at < part.left) Out::store(part.out + at, gradient(x[j]));
  }
}

template <typename In, typename Out, bool kVector, typename Gradient>
__device__ __forceinline__ void walk(Part<In, Out> part, const Gradient& gradient) {
  constexpr int kSize = kThreads * (kVector ? kLoads * In::kPerVec : kSingles);
#pragma unroll 1
  for (; part.left >= kSize; part.left -= kSize, part.logits += kSize * part.stride, part.out += kSize) {
    if (kVector) {
      vector_tile<In, Out, true>(part, gradient);
    } else {
      entry_tile<In, Out, true>(part, gradient);
    }
  }
  if (part.left == 0) return;
  if (kVector) {
    vector_tile<In, Out, false>(part, gradient);
  } else {
    entry_tile<In, Out, false>(part, gradient);
  }
}

template <typename Out, bool kVector>
__device__ __forceinline__ void write_zeros(typename Out::Storage* out, int64_t left) {
  int64_t begin = 0;
  if (kVector) {
    begin = left / Out::kPerVec * Out::kPerVec;
    const Vec16 zeros = {{0, 0, 0, 0}};
    for (int64_t at = static_cast<int64_t>(threadIdx.x) * Out::kPerVec; at < begin; at += kThreads * Out::kPerVec) {
      store_streaming(out + at, zeros);
    }
  }
  for (int64_t at = begin + threadIdx.x; at < left; at += kThreads) Out::store(out + at, 0);
}

// ---- the gradient of an entry ------------------------------------------------------------------------------

// dv/du of v = c tanh(u / c)
__device__ __forceinline__ float softcap_slope(float x, float inv_softcap) {
  const float tanh = std::fmax(x, kLowest) * inv_softcap;  // -inf * 0 is NaN
  return (1 - tanh) * (1 + tanh);
}

template <bool kExact, bool kEntropy, bool kSoftcap>
struct EntryGradient {
  RowGradient row;
  float inv_softcap;

  __device__ __forceinline__ float operator()(float x) const {
    const float gradient = entry_gradient<kExact, kEntropy>(x, row);
    return kSoftcap ? gradient * softcap_slope(x, inv_softcap) : gradient;
  }
};

template <typename In, typename Out, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(const __grid_constant__ TokenStatsBackward args, int64_t segments) {
  constexpr bool kExact = Out::kExact;
  const int64_t r = blockIdx.x / static_cast<unsigned>(segments);
  const int64_t n = args.rows != nullptr ? args.rows[r] : r;
  R1K_DEVICE_CHECK(n >= 0 && n < args.tokens, "r1kernels: rows holds an index outside [0, N)");
  const int64_t vocab = args.logits.vocab, stride = kVector ? 1 : args.logits.vocab_stride;
  const int64_t begin = blockIdx.x % static_cast<unsigned>(segments) * kSegment;
  const int64_t left = segments > 1 && vocab - begin > kSegment ? kSegment : vocab - begin;
  const auto* row = static_cast<const typename In::Storage*>(args.logits.data) + args.logits.offset(n);
  auto* out = const_cast<typename Out::Storage*>(static_cast<const typename Out::Storage*>(args.out.data)) +
              args.out.offset(r);

  const float g = args.grad_logprobs != nullptr ? args.grad_logprobs[n] : 0;
  const float eta = args.grad_entropy != nullptr ? args.grad_entropy[n] : 0;
  if (g == 0 && eta == 0) {  // masked or clipped: the row is not read, so nothing in it can matter
    write_zeros<Out, kVector>(out + begin, left);
    return;
  }
  const int64_t target = args.token_ids[n];
  R1K_DEVICE_CHECK(target >= 0 && target < vocab, "r1kernels: token_ids holds an id outside [0, V)");
  const bool has_target = target >= begin && target < begin + left;
  const double lse = args.lse[n], entropy = args.entropy[n], temperature = args.temperature.of(n);
  float& own = *reinterpret_cast<float*>(dynamic_shared());
  if (has_target) {
    if (threadIdx.x == 0) {
      const float x = In::load(row + target * stride);
      own = own_gradient<kExact>(x, lse, entropy, temperature, g, eta) * softcap_slope(x, args.inv_softcap);
    }
    sync_block();  // the token's logit has been read
  }

  const Part<In, Out> part = {row + begin * stride, out + begin, stride, static_cast<int>(left),
                              args.narrower_in_place};
  const RowGradient numbers = row_gradient<kExact>(lse, entropy, temperature, g, eta);
  if (args.inv_softcap > 0) {
    walk<In, Out, kVector>(part, EntryGradient<kExact, true, true>{numbers, args.inv_softcap});
  } else if (eta != 0) {
    walk<In, Out, kVector>(part, EntryGradient<kExact, true, false>{numbers, 0});
  } else {
    walk<In, Out, kVector>(part, EntryGradient<kExact, false, false>{numbers, 0});
  }
  if (has_target) {
    sync_block();  // its entry has been written as one of the others
    if (threadIdx.x == 0) Out::store(out + target, own);
  }
}

template <typename In, typename Out>
void launch_for(const TokenStatsBackward& args, const Stream& stream) {
  const int64_t segments = args.narrower_in_place ? 1 : segments_of(args.logits.vocab);
  const Grid grid = {args.count * segments, kThreads, sizeof(float)};
  const bool vector = aligned16(args.logits) && aligned16(args.out);
  launch(vector ? gradient_kernel<In, Out, true> : gradient_kernel<In, Out, false>, grid, stream, args, segments);
}

}  // namespace

void launch_token_stats_backward(const TokenStatsBackward& args, const Stream& stream) {
  switch (args.logits.dtype) {
    case DType::bfloat16: return launch_for<BFloat16, BFloat16>(args, stream);
    case DType::float16: return launch_for<Float16, Float16>(args, stream);
    case DType::float32: break;
  }
  switch (args.out.dtype) {
    case DType::float32: return launch_for<Float32, Float32>(args, stream);
    case DType::bfloat16: return launch_for<Float32, BFloat16>(args, stream);
    case DType::float16: return launch_for<Float32, Float16>(args, stream);
  }
}

}  // namespace gpu
}  // namespace r1k
