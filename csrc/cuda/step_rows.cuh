// What the warps of the fused step know without looking at logits: which rows are theirs, and what a token weighs.
#pragma once

#include "cuda/collective.cuh"
#include "cuda/policy_loss.h"
#include "cuda/sequences.cuh"

namespace r1k {
namespace gpu {

// The counted rows of a cluster, in order: rows first, first + stride, ...  All lanes of a warp walk together, and look
// at the masks of 32 rows at a time.
class RowWalk {
 public:
  __device__ RowWalk(const bool* mask, int64_t tokens, int64_t first, int64_t stride)
      : mask_(mask), tokens_(tokens), stride_(stride), window_(first), ahead_(first), pending_(0) {}

  // -1 after the last.
  __device__ int64_t next() {
    while (pending_ == 0) {
      if (ahead_ >= tokens_) return -1;
      window_ = ahead_;
      const int64_t row = window_ + lane_id() * stride_;
      pending_ = ballot(row < tokens_ && (mask_ == nullptr || mask_[row]));
      ahead_ += kWarp * stride_;
    }
    const int64_t row = window_ + lowest_bit(pending_) * stride_;
    pending_ &= pending_ - 1;
    return row;
  }

 private:
  const bool* mask_;
  int64_t tokens_, stride_, window_, ahead_;
  unsigned pending_;
};

// Tokens of [begin, end) that count; all lanes of a warp.
__device__ inline int64_t counted_tokens(const bool* mask, int64_t begin, int64_t end) {
  if (mask == nullptr) return end - begin;
  int64_t count = 0;
  const int64_t to_vector = -reinterpret_cast<intptr_t>(mask + begin) & 15;
  const int64_t head = begin + to_vector < end ? begin + to_vector : end;
  for (int64_t t = begin + lane_id(); t < head; t += kWarp) count += mask[t];
  const int64_t body = head + (end - head) / 16 * 16;
#pragma unroll 4
  for (int64_t t = head + 16 * lane_id(); t < body; t += 16 * kWarp) {
    const Vec16 v = *reinterpret_cast<const Vec16*>(mask + t);
    for (int k = 0; k < 4; ++k) count += count_bits(v.word[k] & 0x01010101u);
  }
  for (int64_t t = body + lane_id(); t < end; t += kWarp) count += mask[t];
  return sum_lanes(count);
}

// The sequence that holds a token: the last one that begins at or before it.  All lanes of a warp.
__device__ inline int64_t sequence_of(const PolicyLossArgs& args, int64_t token) {
  if (args.cu_seqlens == nullptr) return token / args.length;
  int64_t low = 0, width = args.sequences;
  while (width > 1) {
    const int64_t step = (width + kWarp - 1) / kWarp;
    const int64_t at = lane_id() * step;
    const int before = count_bits(ballot(at < width && args.cu_seqlens[low + at] <= token));
    const int64_t skipped = (before > 0 ? before - 1 : 0) * step;
    low += skipped;
    width = step < width - skipped ? step : width - skipped;
  }
  return low;
}

// The weight of tokens in the loss; of a sequence it is worked out when the first of its tokens comes.  All lanes of
// a warp.
class TokenWeight {
 public:
  __device__ explicit TokenWeight(const PolicyLossArgs& args) : sequence_(-1) {
    const double sequences = static_cast<double>(args.sequences > 1 ? args.sequences : 1);
    if (args.normalizer != nullptr) {
      denominator_ = *args.normalizer;
    } else if (args.objective.aggregate == Aggregate::sequence_mean) {
      denominator_ = sequences;
    } else if (args.objective.aggregate == Aggregate::constant) {
      denominator_ = sequences * args.objective.max_length;
    } else {
      const int64_t counted = counted_tokens(args.mask, 0, args.tokens);
      denominator_ = static_cast<double>(counted > 1 ? counted : 1);
    }
    weight_ = 1 / denominator_;
  }

  __device__ double of(const PolicyLossArgs& args, int64_t sequence) {
    if (args.objective.aggregate == Aggregate::sequence_mean && sequence != sequence_) {
      const Sequences sequences = {args.tokens, args.sequences, args.length, args.cu_seqlens};
      const int64_t begin = sequences.begin(sequence);  // within [0, N], whatever cu_seqlens says
      const int64_t counted = counted_tokens(args.mask, begin, begin + sequences.size(sequence));
      weight_ = 1 / (denominator_ * static_cast<double>(counted > 1 ? counted : 1));
      sequence_ = sequence;
    }
    return weight_;
  }

 private:
  int64_t sequence_;
  double denominator_, weight_;
};

}  // namespace gpu
}  // namespace r1k
