// Group-relative advantages on the CPU, on raw pointers.
#pragma once

#include <cstdint>

namespace r1k {

enum class AdvantageScale : int64_t { group_std = 0, batch_std = 1, none = 2 };

struct GroupAdvantagesArgs {
  int64_t count;
  const float* rewards;      // [B], NaN = unscorable
  const int64_t* group_ids;  // [B] or null
  int64_t group_size;        // used when group_ids is null; divides count
  AdvantageScale scale;
  int64_t ddof;
  double eps;
  float* advantages;         // [B]
};

void group_advantages(const GroupAdvantagesArgs& args);

}  // namespace r1k
