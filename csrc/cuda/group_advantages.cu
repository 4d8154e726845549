// A = (r - mean) / (std + eps) per group, in float64 and in two passes.  A group whose rewards are all equal gives
// exactly 0: that is decided by max == min, because the rounded mean of equal numbers need not equal them.
//
// Consecutive groups of moderate size take a few lanes each.  All others, and the std of the batch, are summed in
// pieces, at most kPieces of a group and multiples of kSpan rewards from its own beginning; blocks wait for one
// another, and each reward then merges the moments of its group in order.  Ids come sorted; bisection finds a group.

#include "cuda/group_advantages.h"

#include <algorithm>

#include "common/platform.h"
#include "cuda/collective.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kOfLanes = 1024;  // rewards of a group that a warp takes at most
constexpr int64_t kSpan = 64;
constexpr int64_t kPieces = 64;
constexpr int64_t kWholePieces = 256;  // of the batch

// Of scorable rewards.
struct Moments {
  double number = 0;
  double total = 0;
  double squares = 0;  // about the mean
  float low = INFINITY, high = -INFINITY;
};

struct MeanAndStd {
  double mean, std;
};

__device__ __forceinline__ double mean_of(double total, double number) { return total / (number > 1 ? number : 1); }

__device__ __forceinline__ MeanAndStd mean_and_std(const Moments& m, int64_t ddof) {
  if (m.low == m.high) return {m.low, 0};
  const double left = m.number - static_cast<double>(ddof);
  return {mean_of(m.total, m.number), left > 0 ? std::sqrt(m.squares / left) : 0};
}

// Squares about the common mean of two parts: S + S' + (m - m')^2 n n' / (n + n').
__device__ __forceinline__ void merge(Moments& m, const Moments& more) {
  const double d = mean_of(more.total, more.number) - mean_of(m.total, m.number);
  const double number = m.number + more.number;
  m.squares += more.squares + d * d * mean_of(m.number * more.number, number);
  m.number = number;
  m.total += more.total;
  m.low = lower(m.low, more.low);
  m.high = higher(m.high, more.high);
}

__device__ __forceinline__ float advantage_of(float reward, double mean, double factor) {
  const double centred = reward - mean;
  // 0 in a group of equal rewards, whose factor is inf where eps = 0; NaN of an unscorable one.
  return centred < 0 || centred > 0 ? static_cast<float>(centred * factor) : 0.0f;
}

// The moments of reward_at(k), k = 0 ... size - 1, by `lanes` consecutive lanes; all of them get the result.  The other
// lanes of the warp do the same with theirs.
template <typename RewardAt>
__device__ __forceinline__ Moments moments_of(int64_t size, int lanes, const RewardAt& reward_at) {
  const int lane = lane_id() & (lanes - 1);
  Moments m;
#pragma unroll 4
  for (int64_t k = lane; k < size; k += lanes) {
    const float r = reward_at(k);
    const bool scorable = !std::isnan(r);
    m.number += scorable ? 1 : 0;
    m.total += scorable ? r : 0.0f;
    m.low = lower(m.low, r);
    m.high = higher(m.high, r);
  }
  R1K_DEVICE_CHECK(m.low != -INFINITY && m.high != INFINITY,
                   "r1kernels: rewards must be finite numbers, or NaN for unscorable");
  m.number = sum_lanes(m.number, lanes);
  m.total = sum_lanes(m.total, lanes);
  m.low = combine_lanes(m.low, lanes, lower<float>);
  m.high = combine_lanes(m.high, lanes, higher<float>);
  const double mean = mean_of(m.total, m.number);
#pragma unroll 4
  for (int64_t k = lane; k < size; k += lanes) {
    const double d = reward_at(k) - mean;
    if (!std::isnan(d)) m.squares += d * d;
  }
  m.squares = sum_lanes(m.squares, lanes);
  return m;
}

// ---- consecutive groups of moderate size -------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    group_kernel(const __grid_constant__ GroupAdvantagesArgs args, int lane_bits) {
  const int lanes = 1 << lane_bits;
  const int64_t group = (thread_of_grid() >> lane_bits) * args.group_size;
  const int64_t size = group < args.count ? args.group_size : 0;
  const float* rewards = args.rewards + group;
  const Moments m = moments_of(size, lanes, [rewards](int64_t k) { return rewards[k]; });
  const MeanAndStd of_group = mean_and_std(m, args.ddof);
  const double factor = args.scale == AdvantageScale::group_std ? 1 / (of_group.std + args.eps) : 1;
  for (int64_t k = lane_id() & (lanes - 1); k < size; k += lanes) {
    args.advantages[group + k] = advantage_of(rewards[k], of_group.mean, factor);
  }
}

// ---- groups of any size ------------------------------------------------------------------------------------

R1K_HOST_DEVICE int64_t piece_length(int64_t size, int64_t most) {
  const int64_t spans = (size + kSpan * most - 1) / (kSpan * most);
  return kSpan * (spans > 1 ? spans : 1);
}

// How many sorted ids are less than `value`, or with kAfter not greater.
template <bool kAfter>
__device__ __forceinline__ int64_t position_of(int64_t value, const int64_t* ids, int64_t count) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (kAfter ? ids[middle] <= value : ids[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Group {
  int64_t begin, end;
};

__device__ __forceinline__ Group group_around(const GroupAdvantagesArgs& args, int64_t position) {
  if (args.sorted_ids == nullptr) {
    const int64_t begin = position / args.group_size * args.group_size;
    return {begin, begin + args.group_size};
  }
  const int64_t id = args.sorted_ids[position];
  return {position_of<false>(id, args.sorted_ids, args.count), position_of<true>(id, args.sorted_ids, args.count)};
}

// The moments of the rewards at positions [begin, end), by a warp.
__device__ __forceinline__ Moments sum_piece(const GroupAdvantagesArgs& args, const int64_t* order, int64_t begin,
                                             int64_t end) {
  return moments_of(end - begin, kWarp,
                    [&](int64_t k) { return args.rewards[order == nullptr ? begin + k : order[begin + k]]; });
}

// The moments of the batch's pieces, then of the piece of a group that begins at each position, if any.
struct Sums {
  Moments* whole;   // [whole_pieces]
  Moments* groups;  // [count]
};

__device__ __forceinline__ void sum_pieces(const GroupAdvantagesArgs& args, const Sums& sums, int64_t whole_pieces) {
  const int64_t whole_piece = piece_length(args.count, kWholePieces);
#pragma unroll 1
  for (int64_t piece = warp_of_grid(); piece < whole_pieces; piece += warps_of_grid()) {
    const int64_t begin = piece * whole_piece, end = begin + whole_piece;
    const Moments m = sum_piece(args, nullptr, begin, end < args.count ? end : args.count);
    if (lane_id() == 0) sums.whole[piece] = m;
  }
#pragma unroll 1
  for (int64_t first = warp_of_grid() * kWarp; first < args.count; first += warps_of_grid() * kWarp) {
    const int64_t mine = first + lane_id();
    const bool there = mine < args.count;
    const Group group = group_around(args, there ? mine : args.count - 1);
    const int64_t piece = piece_length(group.end - group.begin, kPieces);
    const int64_t end = mine + piece < group.end ? mine + piece : group.end;
#pragma unroll 1
    for (unsigned begins = ballot(there && (mine - group.begin) % piece == 0); begins != 0; begins &= begins - 1) {
      const int lane = lowest_bit(begins);
      const Moments m = sum_piece(args, args.order, first + lane, shuffle_from(end, lane));
      if (lane_id() == 0) sums.groups[first + lane] = m;
    }
  }
}

// By a warp, each lane some of the pieces; all lanes get the same.
__device__ __forceinline__ double batch_std(const Sums& sums, int64_t whole_pieces, int64_t ddof) {
  Moments m;
  for (int64_t k = lane_id(); k < whole_pieces; k += kWarp) {
    const Moments piece = sums.whole[k];
    m.number += piece.number;
    m.total += piece.total;
    m.low = lower(m.low, piece.low);
    m.high = higher(m.high, piece.high);
  }
  m.number = sum_lanes(m.number);
  m.total = sum_lanes(m.total);
  m.low = combine_lanes(m.low, kWarp, lower<float>);
  m.high = combine_lanes(m.high, kWarp, higher<float>);
  const double mean = mean_of(m.total, m.number);
  for (int64_t k = lane_id(); k < whole_pieces; k += kWarp) {
    const Moments piece = sums.whole[k];
    const double d = mean_of(piece.total, piece.number) - mean;
    m.squares += piece.squares + piece.number * d * d;
  }
  m.squares = sum_lanes(m.squares);
  return mean_and_std(m, ddof).std;
}

__global__ void __launch_bounds__(kThreads)
    pieces_kernel(const __grid_constant__ GroupAdvantagesArgs args, const __grid_constant__ Sums sums,
                  int64_t whole_pieces, Together together) {
  sum_pieces(args, sums, whole_pieces);
  sync_all(together);
  const double of_batch = whole_pieces > 0 ? batch_std(sums, whole_pieces, args.ddof) : 0;
#pragma unroll 1
  for (int64_t position = thread_of_grid(); position < args.count; position += threads_of_grid()) {
    const Group group = group_around(args, position);
    const int64_t piece = piece_length(group.end - group.begin, kPieces);
    Moments m = sums.groups[group.begin];
#pragma unroll 1
    for (int64_t at = group.begin + piece; at < group.end; at += piece) merge(m, sums.groups[at]);
    const MeanAndStd of_group = mean_and_std(m, args.ddof);
    double factor = 1;
    if (args.scale == AdvantageScale::group_std) factor = 1 / (of_group.std + args.eps);
    if (args.scale == AdvantageScale::batch_std) factor = 1 / (of_batch + args.eps);
    const int64_t n = args.order == nullptr ? position : args.order[position];
    args.advantages[n] = advantage_of(args.rewards[n], of_group.mean, factor);
  }
}

// ---- launches ----------------------------------------------------------------------------------------------

bool in_lanes(const GroupAdvantagesArgs& args) {
  return args.sorted_ids == nullptr && args.group_size <= kOfLanes && args.scale != AdvantageScale::batch_std;
}

int64_t whole_pieces_of(const GroupAdvantagesArgs& args) {
  if (args.scale != AdvantageScale::batch_std) return 0;
  const int64_t piece = piece_length(args.count, kWholePieces);
  return (args.count + piece - 1) / piece;
}

}  // namespace

int64_t group_advantages_scratch(const GroupAdvantagesArgs& args) {
  return in_lanes(args) ? 0 : sizeof(Moments) / sizeof(double) * (whole_pieces_of(args) + args.count);
}

void launch_group_advantages(const GroupAdvantagesArgs& args, const Stream& stream) {
  if (in_lanes(args)) {
    int bits = 0;
    while ((1 << bits) < kWarp && (1 << bits) < args.group_size) ++bits;
    const int64_t threads = args.count / args.group_size << bits;
    launch(group_kernel, Grid{(threads + kThreads - 1) / kThreads, kThreads}, stream, args, bits);
    return;
  }
  if (args.count == 0) return;
  const int64_t whole_pieces = whole_pieces_of(args);
  const Sums sums = {reinterpret_cast<Moments*>(args.scratch),
                     reinterpret_cast<Moments*>(args.scratch) + whole_pieces};
  const int64_t blocks = (std::max(args.count, whole_pieces * kWarp) + kThreads - 1) / kThreads;
  const Team team = team_of(pieces_kernel, blocks, kThreads, 0, stream);
  launch(pieces_kernel, team.grid, stream, args, sums, whole_pieces, team.together);
}

}  // namespace gpu
}  // namespace r1k
