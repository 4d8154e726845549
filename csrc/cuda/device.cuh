// What kernels ask of a device, one name each: lanes and warps, shared memory, 16-byte accesses past the caches,
// conversions.  The tests run the same kernels on a CPU over other definitions of these
// names, so kernels use no intrinsic of their own.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cmath>
#include <cstdint>

namespace r1k {
namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// The block's shared memory: all of it is asked for at launch and laid out by a struct of the kernel.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char storage[];
  return storage;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// All blocks of a cooperative launch.
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle_from(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
__device__ __forceinline__ unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }
__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

// Ends the launch with the text of a failed condition, as torch's own indexing does.
#define R1K_DEVICE_CHECK(condition, message) assert((condition) && message)

// ---- 16 bytes at a time ------------------------------------------------------------------------------------

struct alignas(16) Vec16 {
  uint32_t word[4];
};

// Read once, written once: such data should not push others out of the caches.
__device__ __forceinline__ Vec16 load_streaming(const void* address) {
  const uint4 v = __ldcs(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store_streaming(void* address, Vec16 v) {
  __stcs(static_cast<uint4*>(address), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

// ---- the dtypes of logits ----------------------------------------------------------------------------------

struct Float32 {
  using Storage = float;
  static constexpr bool kExact = true;  // results are as fine as fp32 itself: keep what rounding loses
  static constexpr int kPerVec = 4;
  static __device__ __forceinline__ float load(const float* p) { return *p; }
  static __device__ __forceinline__ void store(float* p, float x) { *p = x; }
  static __device__ __forceinline__ void unpack(Vec16 v, float (&x)[4]) {
    for (int k = 0; k < 4; ++k) x[k] = __uint_as_float(v.word[k]);
  }
  static __device__ __forceinline__ Vec16 pack(const float (&x)[4]) {
    Vec16 v;
    for (int k = 0; k < 4; ++k) v.word[k] = __float_as_uint(x[k]);
    return v;
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr bool kExact = false;
  static constexpr int kPerVec = 8;
  static __device__ __forceinline__ float load(const uint16_t* p) {
    return __uint_as_float(static_cast<uint32_t>(*p) << 16);
  }
  static __device__ __forceinline__ void store(uint16_t* p, float x) {
    *p = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  static __device__ __forceinline__ void unpack(Vec16 v, float (&x)[8]) {
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = __uint_as_float(v.word[k] << 16);
      x[2 * k + 1] = __uint_as_float(v.word[k] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint32_t pack2(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ Vec16 pack(const float (&x)[8]) {
    Vec16 v;
    for (int k = 0; k < 4; ++k) v.word[k] = pack2(x[2 * k], x[2 * k + 1]);
    return v;
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr bool kExact = false;
  static constexpr int kPerVec = 8;
  static __device__ __forceinline__ float load(const uint16_t* p) { return __half2float(__ushort_as_half(*p)); }
  static __device__ __forceinline__ void store(uint16_t* p, float x) { *p = __half_as_ushort(__float2half_rn(x)); }
  static __device__ __forceinline__ void unpack(Vec16 v, float (&x)[8]) {
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = __half2float(__ushort_as_half(static_cast<uint16_t>(v.word[k])));
      x[2 * k + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(v.word[k] >> 16)));
    }
  }
  static __device__ __forceinline__ uint32_t pack2(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ Vec16 pack(const float (&x)[8]) {
    Vec16 v;
    for (int k = 0; k < 4; ++k) v.word[k] = pack2(x[2 * k], x[2 * k + 1]);
    return v;
  }
};

}  // namespace gpu
}  // namespace r1k
