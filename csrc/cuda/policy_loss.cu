// The policy loss in one launch: its value, dL/dlogprob and dL/dentropy per token, all metrics.  Nothing behind the mask
// is read into arithmetic.  Blocks wait for one another between
//
//   sums     pieces of sequences -> counted tokens and log-ratios; blocks -> counted tokens of the batch
//   slopes   pieces of sequences -> slopes with respect to the sequence's mean log-ratio
//   tokens   tiles of the batch -> gradients, and a tile's sums
//   finish   the first block: the tiles in order -> loss and metrics
//
// of which an objective of single tokens needs the last two.  Sums are float64 in an order that follows from the batch.

#include "cuda/policy_loss.h"

#include <algorithm>

#include "cuda/collective.cuh"
#include "cuda/policy_terms.cuh"
#include "cuda/sequences.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kTiles = 256;  // at most: one for each block of an H200
constexpr int kCountedAlone = 32 * kThreads;  // tokens of which a block counts all sooner than it hears from others

// The sums of tokens as numbers of one kind, so that each is summed by a warp of its own.
enum Column {
  kLossSum, kSurrogateSum, kKlSum, kEntropySum, kRatioSum, kApproxKlSum, kLowest, kHighest, kTokenCount, kClipLowCount,
  kClipHighCount, kCappedCount, kActiveCount, kNonfiniteCount, kColumns
};

struct Shared {
  double columns[kColumns][kThreads];  // of a tile's threads; before, cu_seqlens if that is short
  double totals[kColumns];
  int64_t counts[kThreads / kWarp];
};
constexpr int64_t kStaged = kColumns * kThreads;

enum Plane { kCounts, kLogRatios, kSlopes, kPlanes };

// What the host knows of the work, and where its sums go.
struct Plan {
  Together together;
  bool sums;       // of sequences are needed
  bool slopes;     // of sequences are needed
  bool totals;     // some sequence may have more than a few pieces
  bool count_all;  // the batch's counted tokens are needed
  bool owners;     // tokens must know their sequence
  int64_t tile;    // tokens of a tile
  int64_t tiles;
  int64_t slots;
  double* partials;  // [kColumns, kTiles]
  double* pieces;    // [kPlanes, slots]
  double* whole;     // [kPlanes, sequences], with `totals`
  int64_t* counts;   // [kTiles]: of blocks
};

__device__ __forceinline__ bool counts(const PolicyLossArgs& args, int64_t t) {
  return args.mask == nullptr || args.mask[t];
}

// Without old log-probs l - l: 0, unless l is NaN or infinite, which must not pass for on-policy.
__device__ __forceinline__ float log_ratio(const PolicyLossArgs& args, int64_t t, float logprob) {
  return logprob - (args.old_logprobs == nullptr ? logprob : args.old_logprobs[t]);
}

__device__ __forceinline__ float value_at(const Broadcast& values, int64_t t, int64_t sequence) {
  return values.data[values.per_sequence ? sequence : t];
}

// ---- sums of sequences -------------------------------------------------------------------------------------

// Of sequence s, once all pieces are there.
__device__ __forceinline__ double total_of(const Plan& plan, const Sequences& sequences, Plane plane, int64_t s) {
  if (plan.totals) return plan.whole[plane * sequences.count + s];
  return sum_few_pieces(plan.pieces + plane * plan.slots + sequences.slot(s), pieces_of(sequences.size(s)));
}

// Adds up term(t) of the tokens of each piece; a warp each.
template <typename Terms>
__device__ __forceinline__ void sum_pieces(const Plan& plan, const Sequences& sequences, const Terms& terms) {
  for (int64_t slot = warp_of_grid(); slot < plan.slots; slot += warps_of_grid()) {
    const Piece piece = piece_at(sequences, slot);
    if (piece.used) terms(slot, piece);
  }
}

__device__ __forceinline__ void sum_log_ratios(const PolicyLossArgs& args, const Plan& plan,
                                               const Sequences& sequences) {
  const bool ratios = args.objective.ratio == Ratio::sequence;
  sum_pieces(plan, sequences, [&](int64_t slot, const Piece& piece) {
    int counted = 0;
    double total = 0;
#pragma unroll 4
    for (int64_t t = piece.begin + lane_id(); t < piece.end; t += kWarp) {
      const bool there = counts(args, t);
      counted += there;
      if (there && ratios) total += log_ratio(args, t, args.logprobs[t]);
    }
    counted = sum_lanes(counted);
    total = sum_lanes(total);
    if (lane_id() == 0) {
      plan.pieces[kCounts * plan.slots + slot] = counted;
      plan.pieces[kLogRatios * plan.slots + slot] = total;
    }
  });
}

// exp(mean (l - l_old)) is every token's ratio: the mean.
__device__ __forceinline__ float mean_log_ratio(const Plan& plan, const Sequences& sequences, int64_t s, double size) {
  return static_cast<float>(total_of(plan, sequences, kLogRatios, s) / size);
}

__device__ __forceinline__ double counted_in(const Plan& plan, const Sequences& sequences, int64_t s) {
  const double counted =
      plan.sums ? total_of(plan, sequences, kCounts, s) : static_cast<double>(sequences.size(s));
  return counted < 1 ? 1 : counted;
}

// What weighs a token's surrogate.
__device__ __forceinline__ void weigh(const PolicyLossArgs& args, int64_t t, int64_t s, PolicyToken& token) {
  token.advantage = value_at(args.advantages, t, s);
  token.importance = args.importance_weights.data == nullptr ? 1.0f : value_at(args.importance_weights, t, s);
}

__device__ __forceinline__ void sum_slopes(const PolicyLossArgs& args, const Plan& plan, const Sequences& sequences) {
  sum_pieces(plan, sequences, [&](int64_t slot, const Piece& piece) {
    PolicyToken token = {};
    token.log_ratio =
        mean_log_ratio(plan, sequences, piece.sequence, counted_in(plan, sequences, piece.sequence));
    double total = 0;
    for (int64_t t = piece.begin + lane_id(); t < piece.end; t += kWarp) {
      if (!counts(args, t)) continue;
      weigh(args, t, piece.sequence, token);
      total += weighted(token.importance, surrogate_of(args.objective, token).slope);
    }
    total = sum_lanes(total);
    if (lane_id() == 0) plan.pieces[kSlopes * plan.slots + slot] = total;
  });
}

// The sums of sequences from those of their pieces; a warp each.
__device__ __forceinline__ void sum_sequences(const Plan& plan, const Sequences& sequences, Plane first, Plane last) {
  for (int64_t s = warp_of_grid(); s < sequences.count; s += warps_of_grid()) {
    const int64_t slot = sequences.slot(s), pieces = pieces_of(sequences.size(s));
    for (int plane = first; plane <= last; ++plane) {
      const double* sums = plan.pieces + plane * plan.slots + slot;
      double total = 0;
      if (pieces <= kFewPieces) {
        total = sum_few_pieces(sums, pieces);
      } else {
        for (int64_t k = lane_id(); k < pieces; k += kWarp) total += sums[k];
        total = sum_lanes(total);
      }
      if (lane_id() == 0) plan.whole[plane * sequences.count + s] = total;
    }
  }
}

// ---- all tokens --------------------------------------------------------------------------------------------

// Counted tokens among every `stride`-th from `first` on, of all threads of the block.
__device__ __forceinline__ int64_t count_block(Shared& shared, int64_t mine) {
  mine = sum_lanes(mine);
  if (lane_id() == 0) shared.counts[warp_id()] = mine;
  sync_block();
  int64_t total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += shared.counts[warp];
  sync_block();
  return total;
}

__device__ __forceinline__ int64_t count_tokens(const PolicyLossArgs& args, int64_t first, int64_t stride) {
  int64_t mine = 0;
#pragma unroll 8
  for (int64_t t = first; t < args.tokens; t += stride) mine += args.mask[t];
  return mine;
}

__device__ __forceinline__ double denominator_of(const PolicyLossArgs& args, const Plan& plan, Shared& shared) {
  if (args.normalizer != nullptr) return *args.normalizer;
  const double sequences = static_cast<double>(args.sequences > 1 ? args.sequences : 1);
  if (args.objective.aggregate == Aggregate::sequence_mean) return sequences;
  if (args.objective.aggregate == Aggregate::constant) return sequences * args.objective.max_length;
  int64_t counted = args.tokens;
  if (plan.count_all) {
    const bool alone = args.tokens <= kCountedAlone;
    const int64_t mine = alone ? count_tokens(args, threadIdx.x, kThreads)
                         : threadIdx.x < gridDim.x ? plan.counts[threadIdx.x] : 0;
    counted = count_block(shared, mine);
  }
  return static_cast<double>(counted > 1 ? counted : 1);
}

// What the tokens of a sequence share.
struct Share {
  int64_t sequence = 0;
  int64_t end = 0;  // the first token that needs another
  double weight;
  double slope;
  float mean;
};

__device__ __forceinline__ Share share_of(const PolicyLossArgs& args, const Plan& plan, const Sequences& sequences,
                                          double denominator, int64_t t) {
  Share share;
  share.end = args.tokens;
  share.weight = 1 / denominator;
  if (!plan.owners) return share;
  share.sequence = sequences.owner<false>(t);
  share.end = sequences.begin(share.sequence + 1);
  const double size = counted_in(plan, sequences, share.sequence);
  if (args.objective.aggregate == Aggregate::sequence_mean) share.weight = 1 / (denominator * size);
  if (args.objective.ratio == Ratio::sequence) share.mean = mean_log_ratio(plan, sequences, share.sequence, size);
  // The ratio's derivative reaches every token of the sequence alike: each gets the mean of their slopes, which is its
  // own where advantages and importance weights are the sequence's.
  if (plan.slopes) share.slope = total_of(plan, sequences, kSlopes, share.sequence) / size;
  return share;
}

// Gradients of the tokens [begin, end), which a block's threads take in turn, and the sums of this thread's.
__device__ __forceinline__ PolicySums tile_of(const PolicyLossArgs& args, const Plan& plan, const Sequences& sequences,
                                              double denominator, int64_t begin, int64_t end) {
  PolicySums sums;
  Share share;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    // Read whether or not the token counts, so that nothing waits for the mask; used only if it does.
    PolicyToken token;
    token.logprob = args.logprobs[t];
    token.log_ratio = log_ratio(args, t, token.logprob);
    token.has_ref = args.ref_logprobs != nullptr;
    token.ref = token.has_ref ? args.ref_logprobs[t] : 0;
    token.entropy = args.entropy != nullptr ? args.entropy[t] : 0;
    if (t >= share.end) share = share_of(args, plan, sequences, denominator, t);
    weigh(args, t, share.sequence, token);
    token.weight = share.weight;
    if (args.objective.ratio == Ratio::sequence) token.log_ratio = share.mean;
    PolicyGradient gradient = {0, 0};
    if (counts(args, t)) gradient = add_token(sums, args.objective, token, plan.slopes, share.slope);
    args.grad_logprobs[t] = gradient.g;
    if (args.grad_entropy != nullptr) args.grad_entropy[t] = gradient.eta;
  }
  return sums;
}

__device__ __forceinline__ void write_columns(const PolicySums& sums, Shared& shared) {
  double* column = &shared.columns[0][threadIdx.x];
  column[kLossSum * kThreads] = sums.loss;
  column[kSurrogateSum * kThreads] = sums.surrogate;
  column[kKlSum * kThreads] = sums.kl;
  column[kEntropySum * kThreads] = sums.entropy;
  column[kRatioSum * kThreads] = sums.ratio;
  column[kApproxKlSum * kThreads] = sums.approx_kl;
  column[kLowest * kThreads] = sums.ratio_min;
  column[kHighest * kThreads] = sums.ratio_max;
  column[kTokenCount * kThreads] = static_cast<double>(sums.tokens);
  column[kClipLowCount * kThreads] = static_cast<double>(sums.clip_low);
  column[kClipHighCount * kThreads] = static_cast<double>(sums.clip_high);
  column[kCappedCount * kThreads] = static_cast<double>(sums.capped);
  column[kActiveCount * kThreads] = static_cast<double>(sums.active);
  column[kNonfiniteCount * kThreads] = static_cast<double>(sums.nonfinite);
}

__device__ __forceinline__ PolicySums from_columns(const double (&column)[kColumns]) {
  PolicySums sums;
  sums.loss = column[kLossSum];
  sums.surrogate = column[kSurrogateSum];
  sums.kl = column[kKlSum];
  sums.entropy = column[kEntropySum];
  sums.ratio = column[kRatioSum];
  sums.approx_kl = column[kApproxKlSum];
  sums.ratio_min = static_cast<float>(column[kLowest]);
  sums.ratio_max = static_cast<float>(column[kHighest]);
  sums.tokens = static_cast<int64_t>(column[kTokenCount]);
  sums.clip_low = static_cast<int64_t>(column[kClipLowCount]);
  sums.clip_high = static_cast<int64_t>(column[kClipHighCount]);
  sums.capped = static_cast<int64_t>(column[kCappedCount]);
  sums.active = static_cast<int64_t>(column[kActiveCount]);
  sums.nonfinite = static_cast<int64_t>(column[kNonfiniteCount]);
  return sums;
}

// One column's `count` numbers, by a warp; all lanes get the result.
__device__ __forceinline__ double sum_column(int column, const double* numbers, int64_t count) {
  const auto combine = [column](double a, double b) {
    return column == kLowest ? lower(a, b) : column == kHighest ? higher(a, b) : a + b;
  };
  double total = column == kLowest ? INFINITY : column == kHighest ? -INFINITY : 0.0;
  for (int64_t k = lane_id(); k < count; k += kWarp) total = combine(total, numbers[k]);
  return combine_lanes(total, kWarp, combine);
}

// ---- the kernel --------------------------------------------------------------------------------------------

__device__ __forceinline__ void check_batch(const PolicyLossArgs& args) {
  if (args.normalizer != nullptr && threadIdx.x == 0) {
    R1K_DEVICE_CHECK(*args.normalizer > 0 && std::isfinite(*args.normalizer),
                     "r1kernels: normalizer must be a positive finite number");
  }
  if (args.cu_seqlens == nullptr) return;
  if (threadIdx.x == 0) {
    R1K_DEVICE_CHECK(args.cu_seqlens[0] == 0 && args.cu_seqlens[args.sequences] == args.tokens,
                     "r1kernels: cu_seqlens must run from 0 to N");
  }
  for (int64_t s = thread_of_grid(); s < args.sequences; s += threads_of_grid()) {
    R1K_DEVICE_CHECK(args.cu_seqlens[s] <= args.cu_seqlens[s + 1], "r1kernels: cu_seqlens must not descend");
  }
}

// The sequences, with cu_seqlens where bisection is cheap.  What was in its place before is no longer read.
__device__ __forceinline__ Sequences sequences_of(const PolicyLossArgs& args, Shared& shared) {
  Sequences sequences = {args.tokens, args.sequences, args.length, args.cu_seqlens};
  if (args.cu_seqlens != nullptr && args.sequences < kStaged) {
    int64_t* staged = reinterpret_cast<int64_t*>(&shared.columns[0][0]);
    for (int64_t s = threadIdx.x; s <= args.sequences; s += kThreads) staged[s] = args.cu_seqlens[s];
    sequences.cu_seqlens = staged;
    sync_block();
  }
  return sequences;
}

__global__ void __launch_bounds__(kThreads) policy_loss_kernel(const __grid_constant__ PolicyLossArgs args,
                                                               const __grid_constant__ Plan plan) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  check_batch(args);
  Sequences sequences = sequences_of(args, shared);
  const bool count_together = plan.count_all && args.tokens > kCountedAlone;
  if (count_together) {
    const int64_t counted = count_block(shared, count_tokens(args, thread_of_grid(), threads_of_grid()));
    if (threadIdx.x == 0) plan.counts[blockIdx.x] = counted;
  }
  if (plan.sums) sum_log_ratios(args, plan, sequences);
  if (count_together || plan.sums) sync_all(plan.together);
  if (plan.sums && plan.totals) {
    sum_sequences(plan, sequences, kCounts, kLogRatios);
    sync_all(plan.together);
  }
  if (plan.slopes) {
    sum_slopes(args, plan, sequences);
    sync_all(plan.together);
    if (plan.totals) {
      sum_sequences(plan, sequences, kSlopes, kSlopes);
      sync_all(plan.together);
    }
  }

  const double denominator = denominator_of(args, plan, shared);
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    if (tile != blockIdx.x) sequences = sequences_of(args, shared);
    const int64_t begin = tile * plan.tile, end = begin + plan.tile;
    const PolicySums sums =
        tile_of(args, plan, sequences, denominator, begin, end < args.tokens ? end : args.tokens);
    sync_block();  // until none needs cu_seqlens
    write_columns(sums, shared);
    sync_block();
    if (warp_id() < kColumns) {
      const double total = sum_column(warp_id(), shared.columns[warp_id()], kThreads);
      if (lane_id() == 0) plan.partials[warp_id() * kTiles + tile] = total;
    }
    sync_block();
  }
  sync_all(plan.together);

  if (blockIdx.x != 0) return;
  if (warp_id() < kColumns) {
    const double total = sum_column(warp_id(), plan.partials + warp_id() * kTiles, plan.tiles);
    if (lane_id() == 0) shared.totals[warp_id()] = total;
  }
  sync_block();
  if (threadIdx.x == 0) finish(from_columns(shared.totals), args.sequences, args.loss, args.metrics);
}

Plan plan_of(const PolicyLossArgs& args) {
  const Objective& objective = args.objective;
  const bool masked = args.mask != nullptr, sequence_ratio = objective.ratio == Ratio::sequence;
  const bool of_sequences =
      args.advantages.per_sequence && (args.importance_weights.data == nullptr || args.importance_weights.per_sequence);
  const bool some_per_sequence = args.advantages.per_sequence ||
                                 (args.importance_weights.data != nullptr && args.importance_weights.per_sequence);
  const int64_t longest = args.cu_seqlens != nullptr ? args.tokens : args.length;
  const Sequences sequences = {args.tokens, args.sequences, args.length, args.cu_seqlens};
  Plan plan = {};
  if (args.tokens > 0) {
    plan.sums = sequence_ratio || (masked && objective.aggregate == Aggregate::sequence_mean);
    plan.slopes = sequence_ratio && objective.surrogate != Surrogate::cispo && !of_sequences;
    plan.totals = plan.sums && pieces_of(longest) > kFewPieces;
    plan.count_all = masked && args.normalizer == nullptr && objective.aggregate == Aggregate::token_mean;
    plan.owners = plan.sums || some_per_sequence || objective.aggregate == Aggregate::sequence_mean;
    plan.slots = plan.sums ? sequences.slots() : 0;
  }
  plan.tile = kThreads * std::max<int64_t>(1, (args.tokens + kThreads * kTiles - 1) / (kThreads * kTiles));
  plan.tiles = (args.tokens + plan.tile - 1) / plan.tile;
  return plan;
}

}  // namespace

int64_t policy_loss_scratch(const PolicyLossArgs& args) {
  const Plan plan = plan_of(args);
  return (kColumns + 1) * kTiles + kPlanes * (plan.slots + (plan.totals ? args.sequences : 0));
}

void launch_policy_loss(const PolicyLossArgs& args, const Stream& stream) {
  Plan plan = plan_of(args);
  plan.partials = args.scratch;
  plan.counts = reinterpret_cast<int64_t*>(plan.partials + kColumns * kTiles);
  plan.pieces = plan.partials + (kColumns + 1) * kTiles;
  plan.whole = plan.pieces + kPlanes * plan.slots;
  constexpr int kWarps = kThreads / kWarp;
  const int64_t blocks = std::min(kTiles, std::max(plan.tiles, (plan.slots + kWarps - 1) / kWarps));
  const Team team = team_of(policy_loss_kernel, blocks, kThreads, sizeof(Shared), stream);
  plan.together = team.together;
  launch(policy_loss_kernel, team.grid, stream, args, plan);
}

}  // namespace gpu
}  // namespace r1k
