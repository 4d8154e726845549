// Arguments of the kernel that finds the largest entries of rows, on raw pointers.
#pragma once

#include <cstdint>

#include "../common/row_view.h"

namespace r1k {

// The ids of the k largest entries of each row, in descending order; of equal entries, the smaller id comes first.
struct TopK {
  RowView rows;
  int64_t k;     // 1 <= k <= vocab < 2^32
  int64_t* ids;  // [N, k]
};

}  // namespace r1k
