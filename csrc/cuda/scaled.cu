// A gradient times a factor that only the device knows, in the dtype wanted: one read and one write, or none where the
// gradient stays what it is: backward passes mostly start from a factor of 1.  A factor of inf or NaN must not bring
// masked tokens to life, so what is 0 stays 0.

#include "cuda/scaled.h"

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;
constexpr int kLoads = 4;  // of 16 bytes, all in flight before the first is needed

template <typename In, typename Out>
constexpr int kChunk = In::kPerVec > Out::kPerVec ? In::kPerVec : Out::kPerVec;  // entries in whole vectors of both

__device__ __forceinline__ float times(float x, float factor) { return x == 0 ? x : x * factor; }

template <typename T, int kCount>
__device__ __forceinline__ void unpack_all(const Vec16 (&raw)[kCount / T::kPerVec], float (&x)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount / T::kPerVec; ++v) {
    float part[T::kPerVec];
    T::unpack(raw[v], part);
#pragma unroll
    for (int k = 0; k < T::kPerVec; ++k) x[v * T::kPerVec + k] = part[k];
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void load_all(Vec16 (&raw)[kCount / T::kPerVec], const typename T::Storage* p) {
#pragma unroll
  for (int v = 0; v < kCount / T::kPerVec; ++v) raw[v] = load_streaming(p + v * T::kPerVec);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_all(typename T::Storage* p, const float (&x)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount / T::kPerVec; ++v) {
    float part[T::kPerVec];
#pragma unroll
    for (int k = 0; k < T::kPerVec; ++k) part[k] = x[v * T::kPerVec + k];
    store_streaming(p + v * T::kPerVec, T::pack(part));
  }
}

// kChunks chunks of a thread, kThreads chunks apart.
template <typename In, typename Out, int kChunks>
__device__ __forceinline__ void scale_chunks(const typename In::Storage* grad, typename Out::Storage* out, float factor,
                                             bool accumulate) {
  constexpr int kCount = kChunk<In, Out>;
  Vec16 raw[kChunks][kCount / In::kPerVec];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) load_all<In, kCount>(raw[c], grad + c * kThreads * kCount);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float x[kCount];
    unpack_all<In, kCount>(raw[c], x);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = times(x[k], factor);
    if (accumulate) {
      Vec16 raw_before[kCount / Out::kPerVec];
      float before[kCount];
      load_all<Out, kCount>(raw_before, out + c * kThreads * kCount);
      unpack_all<Out, kCount>(raw_before, before);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] += before[k];
    }
    store_all<Out, kCount>(out + c * kThreads * kCount, x);
  }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) scaled_kernel(const __grid_constant__ Scaled args) {
  const float factor = *args.factor;
  if (factor == 1 && args.out == args.grad && !args.accumulate) return;
  constexpr int kCount = kChunk<In, Out>, kChunks = kLoads * In::kPerVec / kCount;
  constexpr int kTile = kThreads * kChunks * kCount;
  const auto* grad = static_cast<const typename In::Storage*>(args.grad);
  auto* out = static_cast<typename Out::Storage*>(args.out);
  const int lane = static_cast<int>(threadIdx.x) * kCount;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTile;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kTile;
  for (; at + kTile <= args.count; at += step) {
    scale_chunks<In, Out, kChunks>(grad + at + lane, out + at + lane, factor, args.accumulate);
  }
  if (at >= args.count) return;
  // The last tile has room: one block comes here.
  for (; at + lane + kCount <= args.count; at += kThreads * kCount) {
    scale_chunks<In, Out, 1>(grad + at + lane, out + at + lane, factor, args.accumulate);
  }
  for (int64_t n = at + lane; n < args.count; ++n) {
    const float x = times(In::load(grad + n), factor);
    Out::store(out + n, args.accumulate ? x + Out::load(out + n) : x);
  }
}

template <typename In, typename Out>
void launch_for(const Scaled& args, const Stream& stream) {
  constexpr int64_t kTile = kThreads * kLoads * In::kPerVec;
  // Few blocks that take many tiles: where there is nothing to do, a launch of one for each would cost time.
  const int64_t most = static_cast<int64_t>(stream.properties.processors) * kBlocksPerProcessor;
  launch(scaled_kernel<In, Out>, {std::min((args.count + kTile - 1) / kTile, most), kThreads}, stream, args);
}

}  // namespace

void launch_scaled(const Scaled& args, const Stream& stream) {
  const bool wide = args.out_dtype == DType::float32;
  switch (args.grad_dtype) {
    case DType::bfloat16:
      return wide ? launch_for<BFloat16, Float32>(args, stream) : launch_for<BFloat16, BFloat16>(args, stream);
    case DType::float16:
      return wide ? launch_for<Float16, Float32>(args, stream) : launch_for<Float16, Float16>(args, stream);
    case DType::float32: break;
  }
  switch (args.out_dtype) {
    case DType::float32: return launch_for<Float32, Float32>(args, stream);
    case DType::bfloat16: return launch_for<Float32, BFloat16>(args, stream);
    case DType::float16: return launch_for<Float32, Float16>(args, stream);
  }
}

}  // namespace gpu
}  // namespace r1k
