// The policy loss in one launch: its value, dL/dlogprob and dL/dentropy per token, all metrics.  Nothing behind the
// mask is read into arithmetic.  Blocks wait for one another between
//
//   sums     pieces of sequences -> counted tokens and log-ratios; blocks -> counted tokens of the batch
//   slopes   pieces of sequences -> slopes with respect to the sequence's mean log-ratio
//   tokens   tiles of the batch -> gradients, and a tile's sums
//   finish   the first block: the tiles in order -> loss and metrics
//
// of which an objective of single tokens needs the last two.  Sums are float64 in an order that follows from the batch.

#include "cuda/policy_loss.h"

#include <algorithm>

#include "common/policy_terms.h"
#include "cuda/collective.cuh"
#include "cuda/policy_sums.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kTiles = 256;  // at most: two for each processor of an H200
constexpr int64_t kCountedAlone = 8192;  // tokens of which a block counts all sooner than it hears from others

// The sums of tokens as numbers of one kind, so that each is summed by a warp of its own.
enum Column {
  kLossSum, kSurrogateSum, kKlSum, kEntropySum, kRatioSum, kApproxKlSum, kLowestRatio, kHighestRatio, kTokenCount, kClipLowCount,
  kClipHighCount, kCappedCount, kActiveCount, kNonfiniteCount, kColumns
};

struct Shared {
  double columns[kColumns][kThreads];  // of a tile's threads; before, cu_seqlens if that is short
  double totals[kColumns];
  int64_t counts[kThreads / kWarp];
};
constexpr int64_t kStaged = kColumns * kThreads;

// ---- all tokens --------------------------------------------------------------------------------------------

// Of the tokens first, first + stride, ...
__device__ __forceinline__ int64_t count_tokens(const PolicyLossArgs& args, const Plan& plan, int64_t first,
                                                int64_t stride) {
  int64_t counted = 0;
#pragma unroll 1
  for (; first < args.tokens; first += kAheadOfSum * stride) {
    int there = 0;
#pragma unroll
    for (int k = 0; k < kAheadOfSum; ++k) {
      const int64_t t = first + k * stride;
      there += static_cast<int>(counts(args, plan, t < args.tokens ? t : first)) & static_cast<int>(t < args.tokens);
    }
    counted += there;
  }
  return counted;
}

// The block's sum, in all of its threads.
__device__ __forceinline__ int64_t sum_block(Shared& shared, int64_t value) {
  value = sum_lanes(value);
  if (lane_id() == 0) shared.counts[warp_id()] = value;
  sync_block();
  int64_t total = 0;
#pragma unroll 1
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += shared.counts[warp];
  return total;
}

__device__ __forceinline__ double denominator_of(const PolicyLossArgs& args, const Plan& plan, Shared& shared) {
  if (args.normalizer != nullptr) return *args.normalizer;
  if (args.objective.aggregate == Aggregate::token_mean) {
    int64_t counted = args.tokens;
    if (plan.count_all) {
      const bool alone = args.tokens <= kCountedAlone;
      counted = alone ? count_tokens(args, plan, threadIdx.x, kThreads)
                : threadIdx.x < gridDim.x ? plan.block_counts[threadIdx.x] : 0;
      counted = sum_block(shared, counted);
    }
    return static_cast<double>(counted > 1 ? counted : 1);
  }
  const double sequences = static_cast<double>(args.sequences > 1 ? args.sequences : 1);
  return args.objective.aggregate == Aggregate::constant ? sequences * args.objective.max_length : sequences;
}

// Gradients of the tokens [begin, end), which a block's threads take in turn, and the sums of this thread's.
__device__ __forceinline__ PolicySums tile_of(const PolicyLossArgs& args, const Plan& plan, const Sequences& sequences,
                                              double denominator, int64_t begin, int64_t end) {
  const double even_weight = 1 / denominator;
  PolicySums sums;
  Share share = {0, plan.owners ? 0 : args.tokens, 1, 0};
  double weight = even_weight, slope = 0;
#pragma unroll 1
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    // Read whether or not the token counts, so that nothing waits for the mask; used only if it does.
    const bool there = counts(args, plan, t);
    PolicyToken token;
    token.logprob = args.logprobs[t];
    token.log_ratio = log_ratio(args, t);
    token.ref = args.ref_logprobs[t];
    const float entropy = args.entropy[t];
    if (t >= share.end) {
      share = share_of(args, plan, sequences, sequences.owner<false>(t));
      if (args.objective.aggregate == Aggregate::sequence_mean) weight = even_weight / share.size;
      // The ratio's derivative reaches every token of the sequence alike: each gets the mean of their slopes, which is
      // its own where advantages and importance weights are the sequence's.
      if (plan.slopes) slope = total_of(plan, sequences, kSlopes, share.sequence) / share.size;
    }
    weigh(args, plan, t, share.sequence, token);
    token.has_ref = plan.has_ref;
    token.entropy = plan.has_entropy ? entropy : 0.0f;
    if (of_sequences(args.objective.ratio)) token.log_ratio = share.mean;
    token.weight = weight;
    PolicyGradient gradient = {0, 0};
    if (there) gradient = add_token(sums, args.objective, token, plan.slopes, slope);
    if (args.grad_logprobs != nullptr) args.grad_logprobs[t] = gradient.g;
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
  column[kLowestRatio * kThreads] = sums.ratio_min;
  column[kHighestRatio * kThreads] = sums.ratio_max;
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
  sums.ratio_min = static_cast<float>(column[kLowestRatio]);
  sums.ratio_max = static_cast<float>(column[kHighestRatio]);
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
    return column == kLowestRatio ? lower(a, b) : column == kHighestRatio ? higher(a, b) : a + b;
  };
  const double none = column == kLowestRatio ? INFINITY : column == kHighestRatio ? -INFINITY : 0.0;
  double total = none;
#pragma unroll 1
  for (int64_t first = lane_id(); first < count; first += kAheadOfSum * kWarp) {
    double x[kAheadOfSum];
#pragma unroll
    for (int k = 0; k < kAheadOfSum; ++k) x[k] = first + k * kWarp < count ? numbers[first + k * kWarp] : none;
#pragma unroll
    for (int k = 0; k < kAheadOfSum; ++k) total = combine(total, x[k]);
  }
  return combine_lanes(total, kWarp, combine);
}

// cu_seqlens to where bisection is cheap, if it fits.  What was in its place before is no longer read.
__device__ __forceinline__ void stage(Sequences& sequences, const PolicyLossArgs& args, Shared& shared) {
  if (args.cu_seqlens == nullptr || args.sequences >= kStaged) return;
  int64_t* staged = reinterpret_cast<int64_t*>(&shared.columns[0][0]);
#pragma unroll 4
  for (int64_t s = threadIdx.x; s <= args.sequences; s += kThreads) staged[s] = args.cu_seqlens[s];
  sequences.cu_seqlens = staged;
  sync_block();
}

// Partial sums of each tile; a block each.
__device__ __forceinline__ void sum_tiles(const PolicyLossArgs& args, const Plan& plan, Sequences& sequences,
                                          Shared& shared) {
  const double denominator = denominator_of(args, plan, shared);
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    if (tile != blockIdx.x) stage(sequences, args, shared);
    const int64_t begin = tile * plan.tile, end = begin + plan.tile;
    const PolicySums sums = tile_of(args, plan, sequences, denominator, begin, end < args.tokens ? end : args.tokens);
    sync_block();  // until none needs cu_seqlens
    write_columns(sums, shared);
    sync_block();
    if (warp_id() < kColumns) {
      const double total = sum_column(warp_id(), shared.columns[warp_id()], kThreads);
      if (lane_id() == 0) plan.partials[warp_id() * plan.tiles + tile] = total;
    }
    sync_block();
  }
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
#pragma unroll 1
  for (int64_t s = thread_of_grid(); s < args.sequences; s += threads_of_grid()) {
    R1K_DEVICE_CHECK(args.cu_seqlens[s] <= args.cu_seqlens[s + 1], "r1kernels: cu_seqlens must not descend");
  }
}

__global__ void __launch_bounds__(kThreads) policy_loss_kernel(const __grid_constant__ PolicyLossArgs args,
                                                               const __grid_constant__ Plan plan) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  check_batch(args);
  Sequences sequences = {args.tokens, args.sequences, args.length, args.cu_seqlens};
  stage(sequences, args, shared);
#pragma unroll 1
  for (int phase = 0; phase < kPhases; ++phase) {
    if ((plan.phases >> phase & 1) == 0) continue;
    switch (phase) {
      case kSums:
        if (plan.sums) sum_log_ratios(args, plan, sequences);
        if (plan.count_all && args.tokens > kCountedAlone) {
          const int64_t counted =
              sum_block(shared, count_tokens(args, plan, thread_of_grid(), threads_of_grid()));
          if (threadIdx.x == 0) plan.block_counts[blockIdx.x] = counted;
        }
        break;
      case kSumsOfPieces:
      case kSlopeSumsOfPieces:
        sum_sequences(plan, sequences, phase == kSumsOfPieces ? kCounts : kSlopes,
                      phase == kSumsOfPieces ? kLogRatios : kSlopes);
        break;
      case kSlopeSums: sum_slopes(args, plan, sequences); break;
      case kTokensOfTiles: sum_tiles(args, plan, sequences, shared); break;
    }
    sync_all(plan.together);
  }

  if (blockIdx.x != 0) return;
  if (warp_id() < kColumns) {
    const double total = sum_column(warp_id(), plan.partials + warp_id() * plan.tiles, plan.tiles);
    if (lane_id() == 0) shared.totals[warp_id()] = total;
  }
  sync_block();
  if (threadIdx.x == 0) finish(from_columns(shared.totals), args.sequences, args.loss, args.metrics);
}

Plan plan_of(const PolicyLossArgs& args) {
  const Objective& objective = args.objective;
  const bool sequence_ratio = of_sequences(objective.ratio);
  const bool has_weights = args.importance_weights.data != nullptr;
  const bool weights_of_sequences =
      args.advantages.per_sequence && (!has_weights || args.importance_weights.per_sequence);
  const bool of_tokens = !args.advantages.per_sequence && (!has_weights || !args.importance_weights.per_sequence);
  Plan plan = {};
  plan.masked = args.mask != nullptr;
  plan.has_ref = args.ref_logprobs != nullptr;
  plan.has_entropy = args.entropy != nullptr;
  plan.has_weights = has_weights;
  plan.sums = sequence_ratio || (plan.masked && objective.aggregate == Aggregate::sequence_mean);
  plan.slopes = (shares_surrogate(objective) && !weights_of_sequences) || (shares_kl(objective) && plan.has_ref);
  plan.totals = plan.sums && pieces_of(args.cu_seqlens != nullptr ? args.tokens : args.length) > kFewPieces;
  plan.count_all = plan.masked && args.normalizer == nullptr && objective.aggregate == Aggregate::token_mean;
  plan.owners = plan.sums || !of_tokens || objective.aggregate == Aggregate::sequence_mean;
  plan.slots = plan.sums ? Sequences{args.tokens, args.sequences, args.length, args.cu_seqlens}.slots() : 0;
  plan.tile = kThreads * std::max<int64_t>(1, (args.tokens + kThreads * kTiles - 1) / (kThreads * kTiles));
  plan.tiles = (args.tokens + plan.tile - 1) / plan.tile;
  const auto phase = [&plan](Phase phase, bool needed) { plan.phases |= needed ? 1u << phase : 0u; };
  if (args.tokens > 0) {
    phase(kSums, plan.sums || (plan.count_all && args.tokens > kCountedAlone));
    phase(kSumsOfPieces, plan.totals);
    phase(kSlopeSums, plan.slopes);
    phase(kSlopeSumsOfPieces, plan.slopes && plan.totals);
    phase(kTokensOfTiles, true);
  }
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
  plan.block_counts = reinterpret_cast<int64_t*>(plan.partials + kColumns * kTiles);
  plan.pieces = plan.partials + (kColumns + 1) * kTiles;
  plan.whole = plan.pieces + kPlanes * plan.slots;
  PolicyLossArgs given = args;
  if (!plan.masked) given.mask = reinterpret_cast<const bool*>(args.logprobs);
  if (args.old_logprobs == nullptr) given.old_logprobs = args.logprobs;
  if (!plan.has_ref) given.ref_logprobs = args.logprobs;
  if (!plan.has_entropy) given.entropy = args.logprobs;
  if (!plan.has_weights) given.importance_weights = {args.logprobs, false};
  constexpr int kWarps = kThreads / kWarp;
  const int64_t blocks = std::min(kTiles, std::max(plan.tiles, (plan.slots + kWarps - 1) / kWarps));
  const Team team = team_of(policy_loss_kernel, blocks, kThreads, sizeof(Shared), stream);
  plan.together = team.together;
  launch(policy_loss_kernel, team.grid, stream, given, plan);
}

}  // namespace gpu
}  // namespace r1k
