// The tile instructions of AMX that gemm_amx.h needs: 16 rows of 64 bytes in each of 8 registers.  With
// R1K_EMULATE_TILES they are plain C++ with the arithmetic that Intel documents, so that any machine can test the
// kernel.  The numbers of registers must be literals: the compiler's intrinsics paste them into assembly.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(R1K_EMULATE_TILES)

namespace r1k {
namespace tiles {

union Tile {
  float sums[16][16];         // an accumulator
  uint16_t pairs[16][16][2];  // an operand: bfloat16
};

inline Tile& tile(int index) {
  static thread_local Tile registers[8];
  return registers[index];
}

// Denormals count as 0, as inputs and as results.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return flush(x);
}

// The products of the even and of the odd places along k are summed in one chain each, from 0; then the two sums are
// added, then the accumulator.  Each step rounds to nearest even.
inline void multiply_add(int sum, int left, int right) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      float chain[2] = {0, 0};
      for (int k = 0; k < 16; ++k) {
        for (int half = 0; half < 2; ++half) {
          chain[half] = flush(std::fma(widen(tile(left).pairs[r][k][half]), widen(tile(right).pairs[k][c][half]),
                                       chain[half]));
        }
      }
      float& total = tile(sum).sums[r][c];
      total = flush(flush(total) + flush(chain[0] + chain[1]));
    }
  }
}

inline void load(int to, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile(to).sums[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store(int from, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(from).sums[r], 64);
}

inline void zero(int index) { std::memset(&tile(index), 0, sizeof(Tile)); }

struct InUse {
  InUse() {
    for (int index = 0; index < 8; ++index) zero(index);
  }
};

}  // namespace tiles
}  // namespace r1k

#define R1K_TILE_ZERO(tile) ::r1k::tiles::zero(tile)
#define R1K_TILE_LOAD(tile, from, stride) ::r1k::tiles::load(tile, from, stride)
#define R1K_TILE_STORE(tile, to, stride) ::r1k::tiles::store(tile, to, stride)
#define R1K_TILE_MULTIPLY_ADD(sum, left, right) ::r1k::tiles::multiply_add(sum, left, right)

#else

#include <immintrin.h>

namespace r1k {
namespace tiles {

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Config) == 64);
alignas(64) inline constexpr Config kConfig;

// A thread that holds configured tiles makes every context switch save 8 KiB: it gives them up after each block.
struct InUse {
  InUse() { _tile_loadconfig(&kConfig); }
  ~InUse() { _tile_release(); }
  InUse(const InUse&) = delete;
};

}  // namespace tiles
}  // namespace r1k

#define R1K_TILE_ZERO(tile) _tile_zero(tile)
#define R1K_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define R1K_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define R1K_TILE_MULTIPLY_ADD(sum, left, right) _tile_dpbf16ps(sum, left, right)

#endif
