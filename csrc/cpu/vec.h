// The few vector operations the vocabulary kernels need, on compiler vector types: one source for every
// instruction set, as wide as that set's registers.  Included only by files compiled per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace r1k {
namespace R1K_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline VecF broadcast(float x) { return x - VecF{}; }

template <typename Vec>
inline Vec load_unaligned(const void* from) {
  Vec to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// 16-bit lanes to 32 and back.  The compiler's own conversions take four times the instructions.
#if defined(__AVX512F__)
inline VecU widen(VecH x) { return (VecU)_mm512_cvtepu16_epi32((__m256i)x); }
inline VecH narrow(VecU x) { return (VecH)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
inline VecU widen(VecH x) { return (VecU)_mm256_cvtepu16_epi32((__m128i)x); }
inline VecH narrow(VecU x) {
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // within each 128-bit half
  return (VecH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
}
#else
inline VecU widen(VecH x) { return __builtin_convertvector(x, VecU); }
inline VecH narrow(VecU x) { return __builtin_convertvector(x, VecH); }
#endif

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline VecF load(const float* from) { return load_unaligned<VecF>(from); }

inline VecF load(const BFloat16* from) {
  return bit_cast<VecF>(widen(load_unaligned<VecH>(from)) << 16);
}

inline void store(float* to, VecF x) { std::memcpy(to, &x, sizeof(x)); }

// To nearest, ties to even.  A NaN must have its low 16 bits clear, or rounding could carry it into another number:
// arithmetic on bfloat16 inputs and on canonical() scalars gives no other.  The instruction for it narrows any NaN to
// one, and subnormal numbers to 0.
inline void store(BFloat16* to, VecF x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &half, sizeof(half));
#else
  const VecU bits = bit_cast<VecU>(x);
  const VecH half = narrow((bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16);
  std::memcpy(to, &half, sizeof(half));
#endif
}

#if defined(__AVX512BF16__)
constexpr bool kNarrowsAnyNan = true;
inline void store_pair(BFloat16* to, VecF x, VecF y) {
  const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  std::memcpy(to, &pair, sizeof(pair));
}
#else
constexpr bool kNarrowsAnyNan = false;
#endif
template <typename T>
inline void store_pair(T* to, VecF x, VecF y) {
  store(to, x);
  store(to + kLanes, y);
}

#if defined(__AVX512F__)
inline VecF load(const Float16* from) {
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(Float16* to, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline VecF load(const Float16* from) {
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(Float16* to, VecF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Exponent and mantissa moved into place, then rescaled by 2^112; inf and NaN keep an all-ones exponent.
inline VecF load(const Float16* from) {
  const VecU half = widen(load_unaligned<VecH>(from));
  const VecU magnitude = (half & 0x7fffu) << 13;
  const VecF finite = bit_cast<VecF>(magnitude) * 0x1p112f;
  const VecU special = magnitude | 0x7f800000u;
  const VecU bits = (half & 0x7fffu) >= 0x7c00u ? special : bit_cast<VecU>(finite);
  return bit_cast<VecF>(bits | ((half & 0x8000u) << 16));
}
// Adding 2^k aligns the float's mantissa to the half's last place, so the hardware rounds to nearest even.
inline void store(Float16* to, VecF x) {
  const VecU bits = bit_cast<VecU>(x);
  const VecU sign = (bits >> 16) & 0x8000u;
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU subnormal = bit_cast<VecU>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  const VecU normal = (magnitude + (0xc8000fffu + ((magnitude >> 13) & 1u))) >> 13;
  VecU half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? VecU{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : half;
  const VecH packed = narrow(half | sign);
  std::memcpy(to, &packed, sizeof(packed));
}
#endif

// a * b + c, rounded once where the processor can.
#if defined(__AVX512F__)
inline VecF multiply_add(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
inline VecF multiply_add(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__FP_FAST_FMAF)
inline VecF multiply_add(VecF a, VecF b, VecF c) {
  for (int k = 0; k < kLanes; ++k) c[k] = __builtin_fmaf(a[k], b[k], c[k]);
  return c;
}
#else
inline VecF multiply_add(VecF a, VecF b, VecF c) { return a * b + c; }
#endif
inline VecF multiply_add(VecF a, VecF b, float c) { return multiply_add(a, b, broadcast(c)); }

// a > b ? a : b, so b where one of them is NaN.
#if defined(__AVX512F__)
inline VecF larger(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline VecF larger(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
inline VecF larger(VecF a, VecF b) { return (VecF)_mm_max_ps((__m128)a, (__m128)b); }
#else
inline VecF larger(VecF a, VecF b) { return a > b ? a : b; }
#endif

constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float to an integer

inline float canonical(double x) { return x == x ? static_cast<float>(x) : __builtin_nanf(""); }

template <typename T>
inline float to_float(T x) {  // one element, through the vector path so that both agree
  T lanes[kLanes] = {x};
  return load(lanes)[0];
}

template <typename T>
inline T from_float(float x) {
  T lanes[kLanes];
  store(lanes, broadcast(x));
  return lanes[0];
}

// Of lanes without NaN.
inline float horizontal_max(VecF x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof(x));
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k) lanes[k] = lanes[k] > lanes[k + half] ? lanes[k] : lanes[k + half];
  }
  return lanes[0];
}

// In double: pairs of lanes that lie half of them apart, and so on.
inline double horizontal_sum(VecF x) {
  typedef double Doubles __attribute__((vector_size(kLanes * 8)));
  const Doubles wide = __builtin_convertvector(x, Doubles);
  double lanes[kLanes];
  std::memcpy(lanes, &wide, sizeof(wide));
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

inline int64_t horizontal_sum(VecI x) {
  int64_t result = 0;
  for (int k = 0; k < kLanes; ++k) result += x[k];
  return result;
}

// log2(e) / T in two floats (the second carries what the first rounds away), and the difference below which
// 2^(d log2(e) / T) is set to 0.
struct Exp2Scale {
  explicit Exp2Scale(double temperature) {
    const double exact = 1.4426950408889634 / temperature;
    hi = broadcast(static_cast<float>(exact));
    lo = broadcast(static_cast<float>(exact - static_cast<float>(exact)));
    limit = broadcast(static_cast<float>(-126.0 / exact));
  }
  VecF hi, lo, limit;
};

// 2^x as power * (1 + fraction).
struct Exp2 {
  VecF fraction;
  VecF power;
  VecI underflow;  // lanes (all ones) where 2^x counts as 0

  VecF value() const { return underflow ? VecF{} : multiply_add(fraction, power, power); }
};

// a * b - n, with n the nearest integer to a * b, rounded once.
inline VecF product_minus(VecF a, VecF b, VecF n) {
#if defined(__FP_FAST_FMAF)
  return multiply_add(a, b, -n);
#else
  // Without one: Dekker's product, from halves whose products are exact.
  const VecF big_a = a * 4097.0f, big_b = b * 4097.0f;
  const VecF a_hi = big_a - (big_a - a), b_hi = big_b - (big_b - b);
  const VecF a_lo = a - a_hi, b_lo = b - b_hi;
  const VecF product = a * b;
  return (product - n) + (((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo);
#endif
}

// (2^r - 1) / r on [-0.5, 0.5]: minimax, 2e-9 of 2^r.
inline VecF exp2_fraction(VecF r) {
  VecF p = broadcast(1.5353362e-4f);
  p = multiply_add(p, r, 1.33988744e-3f);
  p = multiply_add(p, r, 9.61843736e-3f);
  p = multiply_add(p, r, 5.55033247e-2f);
  p = multiply_add(p, r, 2.40226479e-1f);
  return multiply_add(p, r, 6.93147203e-1f);
}

// 2^(d * scale [+ extra]), |extra| small.  The fraction is exact, and the relative error about one unit in the last
// place, for any exponent.  NaN stays NaN.
template <typename... Extra>
inline Exp2 exp2_scaled(VecF d, const Exp2Scale& scale, Extra... extra) {
  const VecI underflow = d < scale.limit;
  const VecF shifted = multiply_add(d, scale.hi, kRounds);
  const VecF rest = product_minus(d, scale.hi, shifted - kRounds);
  VecF r;
  if constexpr (sizeof...(extra) == 0) {
    r = multiply_add(d, scale.lo, rest);
  } else {
    r = rest + multiply_add(d, scale.lo, (extra + ...));
  }
  const VecF power = bit_cast<VecF>((bit_cast<VecU>(shifted) + 127u) << 23);  // unsigned, for any NaN
  return {exp2_fraction(r) * r, power, underflow};
}

// Writes bytes past the caches where that is possible; the ends that are not aligned go the normal way.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t head = -reinterpret_cast<intptr_t>(out) & 63;
  if (head < bytes) {
    std::memcpy(out, in, head);
    int64_t k = head;
#if defined(__AVX512F__)
    for (; k + 64 <= bytes; k += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + k), _mm512_loadu_si512(in + k));
#elif defined(__AVX2__)
    for (; k + 32 <= bytes; k += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + k),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + k)));
#else
    for (; k + 16 <= bytes; k += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + k)));
#endif
    std::memcpy(out + k, in + k, bytes - k);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace R1K_ISA
}  // namespace r1k
