// csrc/cuda/device.cuh for kernels that run on a CPU: see emulator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// Known everywhere to nvcc.
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace r1k {
namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

inline unsigned char* dynamic_shared() { return emulator::dynamic_shared(); }

inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() { emulator::sync_warp(); }
inline void sync_grid() { emulator::sync_grid(); }

namespace emulator {
template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles exchange 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulator

template <typename T>
T shuffle_xor(T value, int mask) {
  return emulator::from_bits<T>(emulator::shuffle_xor(emulator::to_bits(value), mask));
}
template <typename T>
T shuffle_from(T value, int lane) {
  return emulator::from_bits<T>(emulator::shuffle_from(emulator::to_bits(value), lane));
}
inline unsigned ballot(bool predicate) { return emulator::ballot(predicate); }
inline int lowest_bit(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

#define R1K_DEVICE_CHECK(condition, message)                            \
  do {                                                                  \
    if (!(condition)) r1k::gpu::emulator::fail_check(message);          \
  } while (false)

// ---- 16 bytes at a time ------------------------------------------------------------------------------------

struct alignas(16) Vec16 {
  uint32_t word[4];
};

inline Vec16 load_streaming(const void* address) {
  emulator::check_aligned(address, "load_streaming");
  Vec16 v;
  std::memcpy(&v, address, sizeof(v));
  return v;
}
inline void store_streaming(void* address, Vec16 v) {
  emulator::check_aligned(address, "store_streaming");
  std::memcpy(address, &v, sizeof(v));
}

// ---- the dtypes of logits ----------------------------------------------------------------------------------

namespace emulator {
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float half_to_float(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, sizeof(h));
  return static_cast<float>(h);
}
// Both round to the nearest, ties to even, and give the NaN that a GPU gives.
inline uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &h, sizeof(bits));
  return bits;
}
inline uint16_t float_to_bfloat(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
}  // namespace emulator

struct Float32 {
  using Storage = float;
  static constexpr bool kExact = true;
  static constexpr int kPerVec = 4;
  static float load(const float* p) { return *p; }
  static void store(float* p, float x) { *p = x; }
  static void unpack(Vec16 v, float (&x)[4]) {
    for (int k = 0; k < 4; ++k) x[k] = emulator::float_of(v.word[k]);
  }
  static Vec16 pack(const float (&x)[4]) {
    Vec16 v;
    for (int k = 0; k < 4; ++k) v.word[k] = emulator::bits_of(x[k]);
    return v;
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr bool kExact = false;
  static constexpr int kPerVec = 8;
  static float load(const uint16_t* p) { return emulator::float_of(static_cast<uint32_t>(*p) << 16); }
  static void store(uint16_t* p, float x) { *p = emulator::float_to_bfloat(x); }
  static void unpack(Vec16 v, float (&x)[8]) {
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = emulator::float_of(v.word[k] << 16);
      x[2 * k + 1] = emulator::float_of(v.word[k] & 0xffff0000u);
    }
  }
  static uint32_t pack2(float low, float high) {
    return emulator::float_to_bfloat(low) | static_cast<uint32_t>(emulator::float_to_bfloat(high)) << 16;
  }
  static Vec16 pack(const float (&x)[8]) {
    Vec16 v;
    for (int k = 0; k < 4; ++k) v.word[k] = pack2(x[2 * k], x[2 * k + 1]);
    return v;
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr bool kExact = false;
  static constexpr int kPerVec = 8;
  static float load(const uint16_t* p) { return emulator::half_to_float(*p); }
  static void store(uint16_t* p, float x) { *p = emulator::float_to_half(x); }
  static void unpack(Vec16 v, float (&x)[8]) {
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = emulator::half_to_float(static_cast<uint16_t>(v.word[k]));
      x[2 * k + 1] = emulator::half_to_float(static_cast<uint16_t>(v.word[k] >> 16));
    }
  }
  static uint32_t pack2(float low, float high) {
    return emulator::float_to_half(low) | static_cast<uint32_t>(emulator::float_to_half(high)) << 16;
  }
  static Vec16 pack(const float (&x)[8]) {
    Vec16 v;
    for (int k = 0; k < 4; ++k) v.word[k] = pack2(x[2 * k], x[2 * k + 1]);
    return v;
  }
};

}  // namespace gpu
}  // namespace r1k
