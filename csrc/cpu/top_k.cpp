// The k largest entries of rows of logits, from one read of each row and a second read of a few entries.  A row is cut
// into groups.  The k-th largest of the groups' maxima is a lower bound of the k-th largest entry, and only the few
// groups whose maximum reaches it can have one of the k largest.

#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "isa.h"
#include "row_stats.h"

namespace r1k {
namespace R1K_ISA {
namespace {

constexpr int64_t kMostVectors = 32;

// A larger key is a larger entry or, of equal entries, a smaller id.  NaN is larger than all numbers.
uint64_t key_of(float value, int64_t id) {
  uint32_t bits = bit_cast<uint32_t>(value == value ? value + 0.0f : __builtin_nanf(""));  // -0 counts as 0
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

int64_t id_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

bool any(VecI lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#else
  uint64_t parts[sizeof(lanes) / 8], all = 0;
  std::memcpy(parts, &lanes, sizeof(lanes));
  for (const uint64_t part : parts) all |= part;
  return all != 0;
#endif
}

// A row in blocks of `vectors` vectors.  Each lane of a block is a group.
template <typename T>
class Row {
 public:
  Row(const T* row, int64_t stride, int64_t vocab, int64_t k) : row_(row), stride_(stride), vocab_(vocab) {
    while (vectors_ > 1 && vocab / vectors_ < 4 * k) vectors_ /= 2;
  }

  int64_t size() const { return vectors_ * kLanes; }
  int64_t vectors() const { return vectors_; }

  // The block from `begin` in fp32, where it is or in `copy`; -inf behind the last entry.
  const float* block(int64_t begin, float* copy) const {
    const int64_t count = std::min(size(), vocab_ - begin);
    if constexpr (sizeof(T) == 4) {
      if (stride_ == 1 && count == size()) return row_ + begin;
    }
    for (int64_t k = load_block(row_, stride_, begin, static_cast<int>(count), copy); k < size(); ++k) {
      copy[k] = -INFINITY;
    }
    return copy;
  }

 private:
  const T* row_;
  int64_t stride_, vocab_, vectors_ = kMostVectors;
};

struct Scratch {
  std::vector<float> maxima, sorted;
  std::vector<uint64_t> keys;
};

template <typename T>
void select_row(const T* row, int64_t stride, int64_t vocab, int64_t k, Scratch& scratch, int64_t* ids) {
  alignas(64) float copy[(kMostVectors + kUnroll) * kLanes];
  const Row<T> blocks(row, stride, vocab, k);
  const int64_t size = blocks.size(), count = (vocab + size - 1) / size;
  auto& [maxima, sorted, keys] = scratch;
  maxima.resize(count * kLanes);
  for (int64_t b = 0; b < count; ++b) {
    const float* const block = blocks.block(b * size, copy);
    VecF top = broadcast(-INFINITY);
    for (int64_t v = 0; v < size; v += kLanes) top = larger(load(block + v), top);
    store(maxima.data() + b * kLanes, top);
  }

  float least = -INFINITY;
  if (static_cast<int64_t>(maxima.size()) >= k) {
    sorted = maxima;
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    least = sorted[k - 1];
  }

  keys.clear();
  int64_t ties = 0;  // entries that equal `least`: of k of them, the ids are the smallest
  for (int64_t b = 0; b < count; ++b) {
    const float* const tops = maxima.data() + b * kLanes;
    const bool takes_ties = ties < k;
    if (!any(takes_ties ? load(tops) >= least : load(tops) > least)) continue;
    const float* const block = blocks.block(b * size, copy);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(tops[lane] >= least)) continue;
      for (int64_t at = lane; at < size; at += kLanes) {
        const bool tie = block[at] == least;
        if (!(block[at] > least) && !(tie && takes_ties)) continue;
        if (b * size + at >= vocab) continue;
        ties += tie;
        keys.push_back(key_of(block[at], b * size + at));
      }
    }
  }
  if (static_cast<int64_t>(keys.size()) < k) {  // NaN, which no comparison sees
    keys.clear();
    for (int64_t at = 0; at < vocab; ++at) keys.push_back(key_of(to_float(row[at * stride]), at));
  }
  const auto end = keys.begin() + k;
  std::nth_element(keys.begin(), end - 1, keys.end(), std::greater<uint64_t>());
  std::sort(keys.begin(), end, std::greater<uint64_t>());
  for (int64_t j = 0; j < k; ++j) ids[j] = id_of(keys[j]);
}

template <typename T>
void select_rows(const TopK& args, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t n = begin; n < end; ++n) {
    const T* const row = static_cast<const T*>(args.rows.data) + args.rows.offset(n);
    select_row(row, args.rows.vocab_stride, args.rows.vocab, args.k, scratch, args.ids + n * args.k);
  }
}

void top_k(const TopK& args, int64_t begin, int64_t end) {
  switch (args.rows.dtype) {
    case DType::float32: return select_rows<float>(args, begin, end);
    case DType::bfloat16: return select_rows<BFloat16>(args, begin, end);
    case DType::float16: return select_rows<Float16>(args, begin, end);
  }
}

}  // namespace

const TopKKernels top_k_kernels = {top_k};

}  // namespace R1K_ISA
}  // namespace r1k
