// Group-relative advantages on a GPU, on raw pointers.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace r1k {
namespace gpu {

enum class AdvantageScale : int64_t { group_std = 0, batch_std = 1, none = 2 };

struct GroupAdvantagesArgs {
  int64_t count;
  const float* rewards;       // [B], NaN = unscorable
  const int64_t* sorted_ids;  // [B] ids of groups in ascending order, or null
  const int64_t* order;       // [B] whose they are: sorted_ids[k] is that of reward order[k]
  int64_t group_size;         // where there are no ids; divides count
  AdvantageScale scale;
  int64_t ddof;
  double eps;
  float* advantages;          // [B]
  double* scratch;            // [group_advantages_scratch(args)]
};

int64_t group_advantages_scratch(const GroupAdvantagesArgs& args);
void launch_group_advantages(const GroupAdvantagesArgs& args, const Stream& stream);

}  // namespace gpu
}  // namespace r1k
