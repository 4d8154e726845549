// A = (r - mean) / (std + eps) per group, in double and in two passes.  A group whose rewards are all equal gives
// exactly 0: that is decided by max == min, because the rounded mean of equal numbers need not equal them.

#include "group_advantages.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace r1k {
namespace {

struct Moments {
  double mean = 0;
  double std = 0;
};

// Over the scorable rewards r[order[begin..end)].
Moments moments(const float* r, const int64_t* order, int64_t begin, int64_t end, int64_t ddof) {
  double sum = 0, low = INFINITY, high = -INFINITY;
  int64_t count = 0;
  for (int64_t k = begin; k < end; ++k) {
    const double x = r[order[k]];
    if (std::isnan(x)) continue;
    sum += x;
    low = std::min(low, x);
    high = std::max(high, x);
    ++count;
  }
  if (count == 0) return {};
  if (low == high) return {low, 0};
  const double mean = sum / static_cast<double>(count);
  double squares = 0;
  for (int64_t k = begin; k < end; ++k) {
    const double x = r[order[k]];
    if (!std::isnan(x)) squares += (x - mean) * (x - mean);
  }
  return {mean, count > ddof ? std::sqrt(squares / static_cast<double>(count - ddof)) : 0};
}

}  // namespace

void group_advantages(const GroupAdvantagesArgs& args) {
  const float* r = args.rewards;
  std::vector<int64_t> order(args.count);
  std::iota(order.begin(), order.end(), 0);
  if (args.group_ids != nullptr) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return args.group_ids[a] < args.group_ids[b]; });
  }
  const double batch_std = moments(r, order.data(), 0, args.count, args.ddof).std;

  for (int64_t begin = 0, end; begin < args.count; begin = end) {
    if (args.group_ids == nullptr) {
      end = begin + args.group_size;
    } else {
      for (end = begin + 1; end < args.count && args.group_ids[order[end]] == args.group_ids[order[begin]];) ++end;
    }
    const Moments group = moments(r, order.data(), begin, end, args.ddof);
    double scale = 1;
    if (args.scale == AdvantageScale::group_std) scale = 1 / (group.std + args.eps);
    if (args.scale == AdvantageScale::batch_std) scale = 1 / (batch_std + args.eps);
    for (int64_t k = begin; k < end; ++k) {
      const double centred = r[order[k]] - group.mean;
      // centred is exactly 0 in a constant group; with eps = 0 its scale is inf, and 0 * inf is NaN.
      const bool zero = std::isnan(centred) || centred == 0;
      args.advantages[order[k]] = zero ? 0.0f : static_cast<float>(centred * scale);
    }
  }
}

}  // namespace r1k
