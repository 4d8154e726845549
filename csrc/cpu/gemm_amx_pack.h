// Packing for gemm_amx.h: a slice of an operand, any of the two layouts, is copied into panels of matrix tiles.  A
// panel holds 16 rows of a (or columns of b); its tiles follow each other along k.
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace r1k {
namespace R1K_ISA {
namespace amx {

constexpr int64_t kSide = 16;        // rows or columns of the result in a tile
constexpr int64_t kDepth = 32;       // elements along k in a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSquare = 2 * kSide;

// A stride that is no power of two keeps panels out of each other's cache sets.
inline int64_t panel_stride(int64_t depth, int parts) {
  return (depth + kDepth - 1) / kDepth * parts * kTileBytes + 64;
}

inline int64_t panel_count(int64_t outers) { return (outers + kSide - 1) / kSide; }

typedef uint32_t Row __attribute__((vector_size(64)));  // of a tile: 16 pairs of bfloat16 that are neighbours along k
typedef uint16_t Halves __attribute__((vector_size(32)));

// Transposes the 16 x 16 pairs of a tile, in four rounds of interleaving rows that lie 8 apart.
inline void transpose(char* tile) {
  constexpr Row kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Row kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Row x[16], y[16];
  std::memcpy(x, tile, sizeof(x));
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      y[2 * k] = __builtin_shuffle(x[k], x[k + 8], kLow);
      y[2 * k + 1] = __builtin_shuffle(x[k], x[k + 8], kHigh);
    }
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) x[k] = y[k];
  }
  std::memcpy(tile, x, sizeof(x));
}

// An operand that is bfloat16 already: one tile for 32 elements along k.
struct Whole {
  using Element = uint16_t;
  static constexpr int kParts = 1;

  // 32 elements along k become one row of a tile.
  static void along(const uint16_t* from, char* to) { std::memcpy(to, from, 64); }

  // Rows k and k + 1 of the operand, contiguous across k, become one row of a tile.
  static void across(const uint16_t* even, const uint16_t* odd, char* to) {
    Halves x, y;
    std::memcpy(&x, even, sizeof(x));
    std::memcpy(&y, odd, sizeof(y));
    const Row mixed = __builtin_convertvector(x, Row) | __builtin_convertvector(y, Row) << 16;
    std::memcpy(to, &mixed, sizeof(mixed));
  }
};

// A float32 operand as the sum of bfloat16 parts, in tiles that follow each other.  Each part is what is left, cut off
// after 8 bits: so three parts keep the 24 bits of a float32, no part overflows, and all have its sign.  Of inf and NaN
// the first part is inf or NaN and the others are 0.  Tiles take denormal parts as 0: of an element below 2^-102 some
// last bits are lost, which are below 2^-126.  Two parts are rounded to nearest: what they leave out has either sign, so
// that a sum of many terms does not drift.
template <int kCount>
struct Split {
  using Element = float;
  static constexpr int kParts = kCount;

  static void along(const float* from, char* to) {
    typedef uint16_t Words __attribute__((vector_size(64)));
    constexpr Words kHighHalves = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    Row first[kCount], second[kCount];
    split(from, first);
    split(from + 16, second);
#pragma GCC unroll 3
    for (int part = 0; part < kCount; ++part) {
      const Words halves = __builtin_shuffle((Words)first[part], (Words)second[part], kHighHalves);
      std::memcpy(to + part * kTileBytes, &halves, sizeof(halves));
    }
  }

  static void across(const float* even, const float* odd, char* to) {
    Row low[kCount], high[kCount];
    split(even, low);
    split(odd, high);
#pragma GCC unroll 3
    for (int part = 0; part < kCount; ++part) {
      const Row mixed = low[part] >> 16 | high[part];
      std::memcpy(to + part * kTileBytes, &mixed, sizeof(mixed));
    }
  }

 private:
  // 16 elements: each part in the upper halves of its lanes, whose lower halves are 0.
  static void split(const float* from, Row (&parts)[kCount]) {
    typedef float Floats __attribute__((vector_size(64)));
    Row x;
    std::memcpy(&x, from, sizeof(x));
    const Row magnitude = x & 0x7fffffffu;
    const Row finite = (Row)(magnitude < 0x7f800000u);
    parts[0] = (x & 0xffff0000u) | ((Row)(magnitude > 0x7f800000u) & 0x00400000u);  // a NaN may not become inf
    if constexpr (kCount == 2) {
      const Row nearest = (Row)(magnitude < 0x7f7f8000u);  // above, it would be inf
      parts[0] = (nearest & (x + 0x8000u) & 0xffff0000u) | (~nearest & parts[0]);
    }
    x = (Row)((Floats)x - (Floats)parts[0]) & finite;  // exact, as the next difference
    if constexpr (kCount == 2) {
      parts[1] = (x + 0x8000u) & 0xffff0000u;
    } else {
      parts[1] = x & 0xffff0000u;
      parts[2] = (Row)((Floats)x - (Floats)parts[1]) & 0xffff0000u;
    }
  }
};

// Elements that are contiguous along k: each row of the operand is a row of tiles.
template <typename Parts>
void pack_rows(const typename Parts::Element* from, int64_t outer_stride, int64_t count, int64_t depth,
               bool transposed, char* to) {
  using T = typename Parts::Element;
  for (int64_t begin = 0; begin < count; begin += kSide, to += panel_stride(depth, Parts::kParts)) {
    const int64_t outers = count - begin < kSide ? count - begin : kSide;
    char* tile = to;
    for (int64_t k = 0; k < depth; k += kDepth, tile += Parts::kParts * kTileBytes) {
      const T* row = from + begin * outer_stride + k;
      if (outers == kSide && k + kDepth <= depth) {
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) Parts::along(row + r * outer_stride, tile + r * 64);
      } else {
        const int64_t bytes = (depth - k < kDepth ? depth - k : kDepth) * static_cast<int64_t>(sizeof(T));
        std::memset(tile, 0, Parts::kParts * kTileBytes);
        for (int64_t r = 0; r < outers; ++r) {
          T edge[kDepth] = {};
          std::memcpy(edge, row + r * outer_stride, bytes);
          Parts::along(edge, tile + r * 64);
        }
      }
      if (!transposed) continue;
      for (int part = 0; part < Parts::kParts; ++part) transpose(tile + part * kTileBytes);
    }
  }
}

// Elements that are contiguous across k.  All panels are filled side by side, so that memory is read in long runs.
template <typename Parts>
void pack_pairs(const typename Parts::Element* from, int64_t k_stride, int64_t count, int64_t depth, bool transposed,
                char* to) {
  using T = typename Parts::Element;
  const int64_t stride = panel_stride(depth, Parts::kParts), whole = count / kSide, rest = count % kSide;
  for (int64_t begin = 0; begin < depth; begin += kDepth, to += Parts::kParts * kTileBytes) {
    for (int64_t k = begin; k < begin + kDepth; k += 2) {
      const T* even = from + k * k_stride;
      char* row = to + (k - begin) * 32;
      const bool both = k + 2 <= depth;
      if (both) {
        for (int64_t panel = 0; panel < whole; ++panel, even += kSide, row += stride) {
          // Runs are too short for the processor to foresee the next rows: these are fetched four pairs before.
          __builtin_prefetch(even + 8 * k_stride);
          __builtin_prefetch(even + 9 * k_stride);
          Parts::across(even, even + k_stride, row);
        }
        if (rest == 0) continue;
      }
      for (int64_t panel = both ? whole : 0; panel * kSide < count; ++panel, even += kSide, row += stride) {
        const int64_t outers = panel < whole ? kSide : rest;
        T edge[2][kSide] = {};
        for (int64_t d = 0; d < 2 && k + d < depth; ++d) std::memcpy(edge[d], even + d * k_stride, outers * sizeof(T));
        Parts::across(edge[0], edge[1], row);
      }
    }
    if (!transposed) continue;
    for (int64_t panel = 0; panel * kSide < count; ++panel) {
      for (int part = 0; part < Parts::kParts; ++part) transpose(to + panel * stride + part * kTileBytes);
    }
  }
}

// `depth` elements along k of the rows (columns) from `begin` to `end` as tiles, panel after panel.  What is missing in
// the last tiles is 0 along k; across k it is never stored.
template <typename Parts>
void pack(const GemmOperand& operand, int64_t k, int64_t depth, int64_t begin, int64_t end, bool is_left, char* to) {
  const auto* from = static_cast<const typename Parts::Element*>(operand.data) + k * operand.k_stride +
                     begin * operand.outer_stride;
  if (operand.k_stride == 1) {
    pack_rows<Parts>(from, operand.outer_stride, end - begin, depth, !is_left, to);
  } else {
    pack_pairs<Parts>(from, operand.k_stride, end - begin, depth, is_left, to);
  }
}

constexpr uint32_t kInfinity = 0x7f80;  // of bfloat16, without its sign

// Whether bfloat16 panels hold an infinity.  The bytes between them may seem to.
inline bool has_infinity(const char* panels, int64_t bytes) {
  Halves found = {};
  for (int64_t at = 0; at < bytes; at += sizeof(Halves)) {
    Halves x;
    std::memcpy(&x, panels + at, sizeof(x));
    found |= (Halves)((x & 0x7fff) == kInfinity);
  }
  bool any = false;
  for (size_t lane = 0; lane < sizeof(Halves) / 2; ++lane) any |= found[lane] != 0;
  return any;
}

// A copy of bfloat16 panels with 0 in the place of infinities.
inline void copy_finite(const char* panels, int64_t bytes, char* to) {
  for (int64_t at = 0; at < bytes; at += sizeof(Halves)) {
    Halves x;
    std::memcpy(&x, panels + at, sizeof(x));
    x &= ~(Halves)((x & 0x7fff) == kInfinity);
    std::memcpy(to + at, &x, sizeof(x));
  }
}

}  // namespace amx
}  // namespace R1K_ISA
}  // namespace r1k
