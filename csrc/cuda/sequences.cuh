// Sequences of a batch, (B, T) or packed, and the pieces in which warps sum them.
//
// A sequence of L tokens is summed in at most kPieces pieces, of kSpan tokens or more from its own beginning on: its
// sums follow from the sequence alone, and one sequence of a million tokens fills a device as many short ones do. The
// pieces of packed sequence s lie from slot `begin / kSpan + s` on, which leaves room for all, whatever the lengths.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace r1k {
namespace gpu {

constexpr int kSpanBits = 9;
constexpr int64_t kSpan = int64_t{1} << kSpanBits;
constexpr int64_t kPieces = 2048;

// Of a sequence of `size` tokens: a power of two, so that nothing is divided.
R1K_HOST_DEVICE int piece_bits(int64_t size) {
  int bits = kSpanBits;
  while (size >> bits >= kPieces) ++bits;
  return bits;
}
// At least one, which may be empty.
R1K_HOST_DEVICE int64_t pieces_of(int64_t size) {
  const int bits = piece_bits(size);
  const int64_t pieces = (size + (int64_t{1} << bits) - 1) >> bits;
  return pieces > 1 ? pieces : 1;
}

struct Sequences {
  int64_t tokens;
  int64_t count;
  int64_t length;             // T of a (B, T) batch
  const int64_t* cu_seqlens;  // [S + 1], or null

  // First token of sequence s; within [0, N] even where cu_seqlens is wrong.
  __device__ __forceinline__ int64_t begin(int64_t s) const {
    if (cu_seqlens == nullptr) return s * length;
    const int64_t at = cu_seqlens[s];
    return at < 0 ? 0 : at > tokens ? tokens : at;
  }
  // Tokens of sequence s, masked ones included.
  __device__ __forceinline__ int64_t size(int64_t s) const {
    const int64_t size = begin(s + 1) - begin(s);
    return size < 0 ? 0 : size;
  }

  // The last sequence that begins at or before token x, or with kSlots at or before slot x.
  template <bool kSlots>
  __device__ __forceinline__ int64_t owner(int64_t x) const {
    if (cu_seqlens == nullptr) return x / (kSlots ? pieces_of(length) : length);
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      const int64_t key = kSlots ? (begin(middle) >> kSpanBits) + middle : begin(middle);
      if (key <= x) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Where the sums of sequence s begin.
  __device__ __forceinline__ int64_t slot(int64_t s) const {
    return cu_seqlens == nullptr ? s * pieces_of(length) : (begin(s) >> kSpanBits) + s;
  }
  R1K_HOST_DEVICE int64_t slots() const {
    return cu_seqlens == nullptr ? count * pieces_of(length) : (tokens >> kSpanBits) + count;
  }
};

struct Piece {
  int64_t sequence, begin, end;
  bool used;  // some slots belong to no piece
};

__device__ __forceinline__ Piece piece_at(const Sequences& sequences, int64_t slot) {
  const int64_t s = sequences.owner<true>(slot);
  const int64_t size = sequences.size(s), begin = sequences.begin(s), index = slot - sequences.slot(s);
  const int bits = piece_bits(size);
  const int64_t from = index << bits, to = (index + 1) << bits;
  return {s, begin + (from < size ? from : size), begin + (to < size ? to : size), index < pieces_of(size)};
}

}  // namespace gpu
}  // namespace r1k
