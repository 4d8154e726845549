// Sums of sequences that the policy loss needs before it can weigh a token: counts, log-ratios, slopes.
#pragma once

#include <cstdint>

#include "common/policy_terms.h"
#include "cuda/collective.cuh"
#include "cuda/policy_loss.h"
#include "cuda/sequences.cuh"

namespace r1k {
namespace gpu {

constexpr int kAheadOfSum = 8;     // tokens that a lane reads at once, so that their latencies overlap
constexpr int64_t kFewPieces = 8;  // of a sequence, which are added up again wherever their sum is needed

enum Plane { kCounts, kLogRatios, kSlopes, kPlanes };
enum Phase { kSums, kSumsOfPieces, kSlopeSums, kSlopeSumsOfPieces, kTokensOfTiles, kPhases };

// What the host knows of the work, and where its sums go.  Absent inputs are stood in for by others, so that no load
// waits for a branch.
struct Plan {
  Together together;
  unsigned phases;        // bits
  bool masked, has_ref, has_entropy, has_weights;
  bool sums;              // of sequences are needed
  bool slopes;            // of sequences are needed
  bool totals;            // some sequence may have more than a few pieces
  bool count_all;         // the batch's counted tokens are needed
  bool owners;            // tokens must know their sequence
  int64_t tile;           // tokens of a tile
  int64_t tiles;
  int64_t slots;
  double* partials;       // [kColumns, tiles]
  double* pieces;         // [kPlanes, slots]
  double* whole;          // [kPlanes, sequences], with `totals`
  int64_t* block_counts;  // [kTiles]
};

__device__ __forceinline__ bool counts(const PolicyLossArgs& args, const Plan& plan, int64_t t) {
  const unsigned char* mask = reinterpret_cast<const unsigned char*>(args.mask);
  return (mask[t] != 0) | !plan.masked;
}

// Without old log-probs l - l: 0, unless l is NaN or infinite, which must not pass for on-policy.
__device__ __forceinline__ float log_ratio(const PolicyLossArgs& args, int64_t t) {
  return args.logprobs[t] - args.old_logprobs[t];
}

// What weighs a token's surrogate.
__device__ __forceinline__ void weigh(const PolicyLossArgs& args, const Plan& plan, int64_t t, int64_t sequence,
                                      PolicyToken& token) {
  token.advantage = args.advantages.data[args.advantages.per_sequence ? sequence : t];
  const float importance = args.importance_weights.data[args.importance_weights.per_sequence ? sequence : t];
  token.importance = plan.has_weights ? importance : 1.0f;
}

// ---- sums of sequences -------------------------------------------------------------------------------------

// read(k, t) and add(k) of each token of a piece, by a warp: kAhead are read before the first is added.
template <int kAhead, typename Read, typename Add>
__device__ __forceinline__ void for_tokens(const Piece& piece, const Read& read, const Add& add) {
#pragma unroll 1
  for (int64_t first = piece.begin + lane_id(); first - lane_id() < piece.end; first += kAhead * kWarp) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t t = first + k * kWarp;
      read(k, t < piece.end ? t : piece.end - 1);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k * kWarp < piece.end) add(k);
    }
  }
}

// Counted tokens and log-ratios of each piece; a warp each.
__device__ __forceinline__ void sum_log_ratios(const PolicyLossArgs& args, const Plan& plan,
                                               const Sequences& sequences) {
#pragma unroll 1
  for (int64_t slot = warp_of_grid(); slot < plan.slots; slot += warps_of_grid()) {
    const Piece piece = piece_at(sequences, slot);
    bool there[kAheadOfSum];
    float delta[kAheadOfSum];
    int counted = 0;
    double total = 0;
    for_tokens<kAheadOfSum>(
        piece,
        [&](int k, int64_t t) {
          there[k] = counts(args, plan, t);
          delta[k] = log_ratio(args, t);
        },
        [&](int k) {
          counted += there[k];
          total += there[k] ? delta[k] : 0.0f;
        });
    counted = sum_lanes(counted);
    total = sum_lanes(total);
    if (lane_id() == 0 && piece.used) {
      plan.pieces[kCounts * plan.slots + slot] = counted;
      plan.pieces[kLogRatios * plan.slots + slot] = total;
    }
  }
}

// The sums of planes [first, last] of sequences from those of their pieces; a warp each.
__device__ __forceinline__ void sum_sequences(const Plan& plan, const Sequences& sequences, int first, int last) {
#pragma unroll 1
  for (int64_t s = warp_of_grid(); s < sequences.count; s += warps_of_grid()) {
    const int64_t slot = sequences.slot(s), pieces = pieces_of(sequences.size(s));
#pragma unroll 1
    for (int plane = first; plane <= last; ++plane) {
      const double* sums = plan.pieces + plane * plan.slots + slot;
      const bool few = pieces <= kFewPieces;  // in order then, as total_of does
      double total = 0;
#pragma unroll 4
      for (int64_t k = few ? 0 : lane_id(); k < pieces; k += few ? 1 : kWarp) total += sums[k];
      if (!few) total = sum_lanes(total);
      if (lane_id() == 0) plan.whole[plane * sequences.count + s] = total;
    }
  }
}

// The sum of a sequence once those of its pieces are there.
__device__ __forceinline__ double total_of(const Plan& plan, const Sequences& sequences, Plane plane, int64_t s) {
  if (plan.totals) return plan.whole[plane * sequences.count + s];
  const double* sums = plan.pieces + plane * plan.slots + sequences.slot(s);
  double total = 0;
  const int64_t pieces = pieces_of(sequences.size(s));
#pragma unroll 1
  for (int64_t k = 0; k < pieces; ++k) total += sums[k];
  return total;
}

// What the tokens of a sequence share.
struct Share {
  int64_t sequence;
  int64_t end;  // the first token that needs another
  double size;  // counted tokens, at least 1
  float mean;   // of their log-ratios, or the sum, where that is every token's
};

__device__ __forceinline__ Share share_of(const PolicyLossArgs& args, const Plan& plan, const Sequences& sequences,
                                          int64_t s) {
  Share share = {s, sequences.begin(s + 1), 1, 0};
  const double size =
      plan.sums ? total_of(plan, sequences, kCounts, s) : static_cast<double>(sequences.size(s));
  if (size > 1) share.size = size;
  if (of_sequences(args.objective.ratio)) {
    const double divisor = args.objective.ratio == Ratio::sequence_product ? 1 : share.size;
    share.mean = static_cast<float>(total_of(plan, sequences, kLogRatios, s) / divisor);
  }
  return share;
}

// The slopes of each piece with respect to the sequence's mean log-ratio; a warp each.
__device__ __forceinline__ void sum_slopes(const PolicyLossArgs& args, const Plan& plan, const Sequences& sequences) {
  constexpr int kAhead = 2;
#pragma unroll 1
  for (int64_t slot = warp_of_grid(); slot < plan.slots; slot += warps_of_grid()) {
    const Piece piece = piece_at(sequences, slot);
    if (!piece.used) continue;
    const float mean = share_of(args, plan, sequences, piece.sequence).mean;
    bool there[kAhead];
    PolicyToken token[kAhead];
    double total = 0;
    for_tokens<kAhead>(
        piece,
        [&](int k, int64_t t) {
          there[k] = counts(args, plan, t);
          weigh(args, plan, t, piece.sequence, token[k]);
          token[k].logprob = args.logprobs[t];
          token[k].ref = args.ref_logprobs[t];
          token[k].has_ref = plan.has_ref;
        },
        [&](int k) {
          token[k].log_ratio = mean;
          total += there[k] ? shared_slope_of(args.objective, token[k]) : 0.0;
        });
    total = sum_lanes(total);
    if (lane_id() == 0) plan.pieces[kSlopes * plan.slots + slot] = total;
  }
}

}  // namespace gpu
}  // namespace r1k
