// Packing for gemm.cpp: a slice of an operand, any of the two layouts, is copied into panels that its inner loop
// reads front to back.  A panel holds kWidth rows of a (or columns of b); for each step along k one 32-bit lane of
// each: a float, or a pair of bfloat16 that are neighbours along k.
#pragma once

#include <cstring>

#include "isa.h"
#include "vec.h"

namespace r1k {
namespace R1K_ISA {

struct FloatProduct {
  static VecF multiply_add(VecU a, VecU b, VecF sum) {
    return R1K_ISA::multiply_add(bit_cast<VecF>(a), bit_cast<VecF>(b), sum);
  }
};

// Elements of any type, one per lane, as float.
template <typename T>
struct FloatLanes {
  using Element = T;
  using Product = FloatProduct;
  static constexpr int kDepth = 1;        // elements along k in a lane
  static constexpr int64_t kSteps = 256;  // lanes along k in a slice

  static VecU load_along_k(const T* from) { return bit_cast<VecU>(load(from)); }
  static VecU load_across(const T* from, int64_t) { return bit_cast<VecU>(load(from)); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps adds two products to each lane of an fp32 sum.  It takes denormal inputs, and denormal results, as 0.
struct BFloat16Pairs {
  using Element = BFloat16;
  using Product = BFloat16Pairs;
  static constexpr int kDepth = 2;
  static constexpr int64_t kSteps = 512;  // at twice the speed, half the visits to the result

  static VecU load_along_k(const BFloat16* from) { return load_unaligned<VecU>(from); }
  static VecU load_across(const BFloat16* from, int64_t k_stride) {
    return widen(load_unaligned<VecH>(from)) | widen(load_unaligned<VecH>(from + k_stride)) << 16;
  }
  static VecF multiply_add(VecU a, VecU b, VecF sum) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// 16 bytes beyond each panel absorb the last store of a panel that is narrower than a vector, and a stride that is
// no power of two keeps panels out of each other's cache sets.
constexpr int64_t kPanelPadding = 16;

template <int kWidth>
constexpr int64_t panel_stride(int64_t steps) {
  return (steps * kWidth + 15) / 16 * 16 + kPanelPadding;
}

// Transposes a square of lanes: log2(kLanes) rounds, each interleaving vectors that lie half of them apart.
inline void transpose(VecU (&x)[kLanes]) {
  VecU low, high;
  for (int k = 0; k < kLanes; ++k) {
    low[k] = k / 2 + (k % 2) * kLanes;
    high[k] = k / 2 + (k % 2) * kLanes + kLanes / 2;
  }
  VecU y[kLanes];
#pragma GCC unroll 8
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < kLanes / 2; ++k) {
      y[2 * k] = __builtin_shuffle(x[k], x[k + kLanes / 2], low);
      y[2 * k + 1] = __builtin_shuffle(x[k], x[k + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kLanes; ++k) x[k] = y[k];
  }
}

// One group of up to kLanes lanes of a panel whose elements are contiguous along k.  Narrow panels are written with
// overlapping stores, in rising order.
template <typename Lanes, int kWidth>
void pack_group_along_k(const typename Lanes::Element* from, int64_t outer_stride, int64_t valid, int64_t depth,
                        uint32_t* to) {
  using T = typename Lanes::Element;
  constexpr int kSpan = kLanes * Lanes::kDepth;
  const T* rows[kLanes];
  // Lanes beyond the edge repeat the last one: their results are never stored.
  for (int r = 0; r < kLanes; ++r) rows[r] = from + (r < valid ? r : valid - 1) * outer_stride;
  VecU x[kLanes];
  int64_t k = 0;
  for (; k + kSpan <= depth; k += kSpan) {
    for (int r = 0; r < kLanes; ++r) x[r] = Lanes::load_along_k(rows[r] + k);
    transpose(x);
    for (int r = 0; r < kLanes; ++r, to += kWidth) std::memcpy(to, &x[r], sizeof(VecU));
  }
  if (k < depth) {
    T tail[kSpan];
    std::memset(tail, 0, sizeof(tail));
    for (int r = 0; r < kLanes; ++r) {
      std::memcpy(tail, rows[r] + k, (depth - k) * sizeof(T));
      x[r] = Lanes::load_along_k(tail);
    }
    transpose(x);
    for (int r = 0; k < depth; ++r, k += Lanes::kDepth, to += kWidth) std::memcpy(to, &x[r], sizeof(VecU));
  }
}

// Packs `count` rows (columns) and `depth` elements along k.  `available` of them, at least `count`, may be read.
template <typename Lanes, int kWidth>
void pack(const typename Lanes::Element* from, int64_t outer_stride, int64_t k_stride, int64_t count,
          int64_t available, int64_t depth, uint32_t* to) {
  using T = typename Lanes::Element;
  const int64_t stride = panel_stride<kWidth>((depth + Lanes::kDepth - 1) / Lanes::kDepth);
  if (k_stride == 1) {
    for (int64_t begin = 0; begin < count; begin += kWidth, to += stride) {
      for (int64_t group = 0; group < kWidth && begin + group < count; group += kLanes) {
        const int64_t first = begin + group;
        pack_group_along_k<Lanes, kWidth>(from + first * outer_stride, outer_stride, available - first, depth,
                                          to + group);
      }
    }
    return;
  }
  for (int64_t k = 0; k < depth; k += Lanes::kDepth, from += Lanes::kDepth * k_stride, to += kWidth) {
    uint32_t* panel = to;
    const bool whole_step = k + Lanes::kDepth <= depth;
    for (int64_t begin = 0; begin < count; begin += kWidth, panel += stride) {
      for (int64_t group = 0; group < kWidth && begin + group < count; group += kLanes) {
        const int64_t first = begin + group;
        VecU x;
        if (whole_step && first + kLanes <= available) {
          x = Lanes::load_across(from + first, k_stride);
        } else {
          T edge[Lanes::kDepth][kLanes];
          std::memset(edge, 0, sizeof(edge));
          const int64_t valid = available - first < kLanes ? available - first : kLanes;
          for (int d = 0; d < Lanes::kDepth && k + d < depth; ++d) {
            std::memcpy(edge[d], from + d * k_stride + first, valid * sizeof(T));
          }
          x = Lanes::load_across(edge[0], kLanes);
        }
        std::memcpy(panel + group, &x, sizeof(x));
      }
    }
  }
}

}  // namespace R1K_ISA
}  // namespace r1k
