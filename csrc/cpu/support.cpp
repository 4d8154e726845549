// Products of hidden states with the rows of the weight that are in the tokens' sets, and their gradients.  Products and
// the weight's gradient take entries id by id, so that a row of the weight, which the caches do not hold, is read once
// for all tokens of a block, and a row of its gradient is written once.  The gradient of hidden states takes ranges of
// ids, and in each the entries token by token, so that a token's sum stays in registers.  Columns are taken in segments,
// so that what all tokens of a block need stays in the L2 cache.  Every sum has one order: its bits depend on no other
// token, id or thread.

#include "support.h"

#include <type_traits>

#include "isa.h"
#include "vec.h"

namespace r1k {
namespace R1K_ISA {
namespace {

constexpr int kGroup = 8;  // entries of one id whose products are summed side by side

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

template <typename T>
const T* row_of(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const T*>(rows.data) + row * rows.stride + column;
}

// Fetches the columns of the row that is needed `kAhead` ids later, which is in no cache. Rows of unused ids are fetched in
// vain, which costs less than looking for the next one.
constexpr int64_t kAhead = 4;
template <typename W>
void fetch_ahead(const Rows& rows, int64_t id, int64_t end, int64_t column, int64_t width) {
  if (id + kAhead >= end) return;
  const char* const from = reinterpret_cast<const char*>(row_of<W>(rows, id + kAhead, column));
  for (int64_t byte = 0; byte < width * int64_t(sizeof(W)); byte += 64) __builtin_prefetch(from + byte);
}

// The segment that begins with a column.
template <typename T>
const T* segment_of(const Segments& matrix, int64_t column) {
  return static_cast<const T*>(matrix.data) + matrix.rows * column;
}

// The same order of additions whatever stands beside the vector.
inline float lane_sum(VecF x) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  return static_cast<float>(horizontal_sum(x));
#endif
}

// The same sums of eight vectors at once, each in the same order.
template <int kCount>
void lane_sums(const VecF* x, float* sums) {
#if defined(__AVX512F__)
  if constexpr (kCount == 8) {
    __m256 half[8], quarter[4], pair[2];
    for (int k = 0; k < 8; ++k) {
      half[k] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[k]), _mm512_extractf32x8_ps((__m512)x[k], 1));
    }
    for (int k = 0; k < 4; ++k) {  // k and k + 4 in the halves
      quarter[k] = _mm256_add_ps(_mm256_permute2f128_ps(half[k], half[k + 4], 0x20),
                                 _mm256_permute2f128_ps(half[k], half[k + 4], 0x31));
    }
    for (int k = 0; k < 2; ++k) {
      pair[k] = _mm256_add_ps(_mm256_shuffle_ps(quarter[2 * k], quarter[2 * k + 1], 0x44),
                              _mm256_shuffle_ps(quarter[2 * k], quarter[2 * k + 1], 0xee));
    }
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_shuffle_ps(pair[0], pair[1], 0x88),
                                         _mm256_shuffle_ps(pair[0], pair[1], 0xdd)));
    return;
  }
#endif
  for (int k = 0; k < kCount; ++k) sums[k] = lane_sum(x[k]);
}

// sums[k] = hidden[k] . weight over `width` columns.
template <int kCount, typename T, typename W>
void dot_rows(const T* const* hidden, const W* weight, int64_t width, float* sums) {
  VecF sum[kCount] = {};
  int64_t c = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<W, BFloat16>) {
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
      const __m512bh w = load_unaligned<__m512bh>(weight + c);
      for (int k = 0; k < kCount; ++k) {
        sum[k] = (VecF)_mm512_dpbf16_ps((__m512)sum[k], load_unaligned<__m512bh>(hidden[k] + c), w);
      }
    }
  }
#endif
  for (; c + kLanes <= width; c += kLanes) {
    const VecF w = load(weight + c);
    for (int k = 0; k < kCount; ++k) sum[k] = multiply_add(load(hidden[k] + c), w, sum[k]);
  }
  lane_sums<kCount>(sum, sums);
  for (int k = 0; k < kCount; ++k) {
    for (int64_t tail = c; tail < width; ++tail) sums[k] += to_float(hidden[k][tail]) * to_float(weight[tail]);
  }
}

template <typename T, typename W>
void products_of(const SupportProducts& args, int64_t block, int64_t id_begin, int64_t id_end) {
  const SupportIndex& index = args.index;
  const int32_t* const starts = index.starts_of(block);
  for (int64_t column = 0; column < args.width; column += kSupportColumns) {
    const int64_t width = args.width - column < kSupportColumns ? args.width - column : kSupportColumns;
    const T* const segment = segment_of<T>(args.hidden, column);
    const bool add = column > 0;
    for (int64_t id = id_begin; id < id_end; ++id) {
      if (starts[id] == starts[id + 1]) continue;
      fetch_ahead<W>(args.weight, id, id_end, column, width);
      const W* const weight = row_of<W>(args.weight, id, column);
      for (int32_t at = starts[id]; at < starts[id + 1]; at += kGroup) {
        const int count = starts[id + 1] - at < kGroup ? starts[id + 1] - at : kGroup;
        const T* hidden[kGroup];
        float sums[kGroup];
        for (int k = 0; k < count; ++k) hidden[k] = segment + index.tokens[at + k] * kSupportColumns;
        int k = 0;
        if (count == kGroup) dot_rows<kGroup>(hidden, weight, width, sums), k = kGroup;
        for (; k + 4 <= count; k += 4) dot_rows<4>(hidden + k, weight, width, sums + k);
        for (; k < count; ++k) dot_rows<1>(hidden + k, weight, width, sums + k);
        for (k = 0; k < count; ++k) {
          float& value = args.values[at + k];
          value = add ? value + sums[k] : sums[k];
        }
      }
    }
  }
}

// sum += factor * entries.  Of bfloat16 entries, with AVX-512 and kVectors > 1, a vector of `sum` has every second entry,
// which takes fewer instructions; `in_order` then puts them in order.
template <int kVectors, typename T>
void add_product(VecF* sum, VecF factor, const T* entries) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16> && kVectors > 1) {
    for (int v = 0; v < kVectors; v += 2) {
      const VecI both = load_unaligned<VecI>(entries + v * kLanes);
      sum[v] = multiply_add(factor, bit_cast<VecF>(both << 16), sum[v]);
      sum[v + 1] = multiply_add(factor, bit_cast<VecF>(both & int32_t(0xffff0000)), sum[v + 1]);
    }
    return;
  }
#endif
  for (int v = 0; v < kVectors; ++v) sum[v] = multiply_add(factor, load(entries + v * kLanes), sum[v]);
}

template <int kVectors, typename T>
void in_order([[maybe_unused]] VecF* sum) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16> && kVectors > 1) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int v = 0; v < kVectors; v += 2) {
      const __m512 even = (__m512)sum[v], odd = (__m512)sum[v + 1];
      sum[v] = (VecF)_mm512_permutex2var_ps(even, first, odd);
      sum[v + 1] = (VecF)_mm512_permutex2var_ps(even, last, odd);
    }
  }
#endif
}

// Copies a segment of the rows of a range. Where they lie, they start at multiples of a power of two, so that they would
// have to share a small part of the L2 cache.
template <typename W>
void copy_rows(const SupportGradHidden& args, const SupportRange& range, int64_t column, int64_t columns, W* to) {
  const int32_t* const starts = args.index.starts_of(range.block);
  for (int64_t id = range.begin; id < range.end; ++id) {
    if (starts[id] == starts[id + 1]) continue;
    fetch_ahead<W>(args.weight, id, range.end, column, columns);
    std::memcpy(to, row_of<W>(args.weight, id, column), columns * sizeof(W));
    to += kSupportHiddenColumns;
  }
}

// sums += values[k] * rows[k], by ascending k.
template <int kVectors, typename W>
void add_rows(const SupportEntry* begin, const SupportEntry* end, const W* rows, float* sums) {
  VecF sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = load(sums + v * kLanes);
  for (const SupportEntry* entry = begin; entry != end; ++entry) {
    add_product<kVectors>(sum, broadcast(entry->value), rows + entry->row * kSupportHiddenColumns);
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, sum[v]);
}

template <typename W>
void grad_hidden_of(const SupportGradHidden& args, int64_t block, int64_t first_range, int64_t end_range, int64_t part,
                    W* rows, float* block_sums) {
  constexpr int kVectors = 8;
  const int64_t columns = args.width - part < kSupportHiddenColumns ? args.width - part : kSupportHiddenColumns;
  const int64_t in_groups = columns - columns % (kVectors * kLanes), in_vectors = columns - columns % kLanes;
  const int64_t first = block * SupportIndex::kBlockTokens, rest = args.tokens - first;
  const int64_t count = rest < SupportIndex::kBlockTokens ? rest : SupportIndex::kBlockTokens;
  std::memset(block_sums, 0, count * kSupportHiddenColumns * sizeof(float));
  for (int64_t range = first_range; range < end_range; ++range) {
    const SupportSpan* const spans = args.spans + range * SupportIndex::kBlockTokens;
    copy_rows(args, args.ranges[range], part, columns, rows);
    for (int64_t n = 0; n < count; ++n) {
      const SupportEntry *const begin = args.entries + spans[n].begin, *const end = args.entries + spans[n].end;
      if (begin == end) continue;
      float* const sums = block_sums + n * kSupportHiddenColumns;
      int64_t c = 0;
      for (; c < in_groups; c += kVectors * kLanes) add_rows<kVectors>(begin, end, rows + c, sums + c);
      for (; c < in_vectors; c += kLanes) add_rows<1>(begin, end, rows + c, sums + c);
      for (; c < columns; ++c) {
        for (const SupportEntry* entry = begin; entry != end; ++entry) {
          const VecF weight = broadcast(to_float(rows[entry->row * kSupportHiddenColumns + c]));
          sums[c] = multiply_add(broadcast(entry->value), weight, broadcast(sums[c]))[0];
        }
      }
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    const float* const sums = block_sums + n * kSupportHiddenColumns;
    float* const out = args.out + (first + n) * args.width + part;
    int64_t c = 0;
    for (; c < in_groups; c += kVectors * kLanes) {
      VecF sum[kVectors];
      for (int v = 0; v < kVectors; ++v) sum[v] = load(sums + c + v * kLanes);
      in_order<kVectors, W>(sum);
      for (int v = 0; v < kVectors; ++v) store(out + c + v * kLanes, load(out + c + v * kLanes) + sum[v]);
    }
    for (; c < columns; ++c) out[c] += sums[c];
  }
}

// One segment of a row of the weight's gradient.
template <int kVectors, typename T, typename Out>
void add_tokens(const SupportGradWeight& args, int64_t id, int64_t part, int64_t column, Out* out) {
  const SupportIndex& index = args.index;
  const T* const segment = segment_of<T>(args.hidden, part) + (column - part);
  VecF sum[kVectors] = {};
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int32_t* const starts = index.starts_of(block);
    for (int32_t at = starts[id]; at < starts[id + 1]; ++at) {
      const float value = args.values[at];
      if (value == 0) continue;
      const VecF factor = broadcast(value);
      const T* const hidden = segment + index.tokens[at] * kSupportColumns;
      add_product<kVectors>(sum, factor, hidden);
    }
  }
  in_order<kVectors, T>(sum);
  alignas(64) Out result[kVectors * kLanes];
  Out* const to = args.stream ? result : out;
  for (int v = 0; v < kVectors; ++v) {
    VecF value = sum[v];
    if (args.accumulate) value += load(out + v * kLanes);
    if constexpr (sizeof(Out) == 2) value = value == value ? value : broadcast(__builtin_nanf(""));
    store(to + v * kLanes, value);
  }
  if (args.stream) stream_copy(out, result, sizeof(result));
}

template <typename T, typename Out>
void add_tail(const SupportGradWeight& args, int64_t id, int64_t part, int64_t column, Out* out) {
  const SupportIndex& index = args.index;
  const T* const segment = segment_of<T>(args.hidden, part) + (column - part);
  float sum = 0;
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int32_t* const starts = index.starts_of(block);
    for (int32_t at = starts[id]; at < starts[id + 1]; ++at) {
      const float value = args.values[at];
      if (value == 0) continue;
      const float entry = to_float(segment[index.tokens[at] * kSupportColumns]);
      sum = multiply_add(broadcast(value), broadcast(entry), broadcast(sum))[0];
    }
  }
  if (args.accumulate) sum += to_float(*out);
  *out = from_float<Out>(canonical(sum));
}

void fill_zeros(char* out, int64_t bytes, bool stream) {
  alignas(64) static const char zeros[4096] = {};
  if (!stream) {
    std::memset(out, 0, bytes);
    return;
  }
  for (; bytes > 0; bytes -= sizeof(zeros), out += sizeof(zeros)) {
    stream_copy(out, zeros, bytes < int64_t(sizeof(zeros)) ? bytes : int64_t(sizeof(zeros)));
  }
}

template <typename T, typename Out>
void grad_weight_of(const SupportGradWeight& args, int64_t part, int64_t id_begin, int64_t id_end) {
  const SupportIndex& index = args.index;
  Out* const out = static_cast<Out*>(args.out);
  const int64_t end = part + kSupportColumns < args.width ? part + kSupportColumns : args.width;
  const auto is_used = [&](int64_t id) {
    for (int64_t block = 0; block < index.blocks; ++block) {
      const int32_t* const starts = index.starts_of(block);
      if (starts[id] != starts[id + 1]) return true;
    }
    return false;
  };
  for (int64_t id = id_begin; id < id_end; ++id) {
    if (!is_used(id)) {
      if (args.accumulate || part > 0) continue;  // the first part zeroes the whole row
      int64_t last = id + 1;
      while (last < id_end && !is_used(last)) ++last;
      fill_zeros(reinterpret_cast<char*>(out + id * args.width), (last - id) * args.width * sizeof(Out), args.stream);
      id = last - 1;
      continue;
    }
    Out* const row = out + id * args.width;
    int64_t c = part;
    constexpr int kMost = kLanes == 16 ? 16 : 8;
    for (; c + kMost * kLanes <= end; c += kMost * kLanes) add_tokens<kMost, T>(args, id, part, c, row + c);
    for (; c + 4 * kLanes <= end; c += 4 * kLanes) add_tokens<4, T>(args, id, part, c, row + c);
    for (; c + kLanes <= end; c += kLanes) add_tokens<1, T>(args, id, part, c, row + c);
    for (; c < end; ++c) add_tail<T>(args, id, part, c, row + c);
  }
  if (args.stream) stream_fence();
}

// run(entry of the first dtype) and so on: the types of pointers that stand for dtypes.
template <typename Run>
void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32: return run(static_cast<const float*>(nullptr));
    case DType::bfloat16: return run(static_cast<const BFloat16*>(nullptr));
    case DType::float16: return run(static_cast<const Float16*>(nullptr));
  }
}

template <typename Pointer>
using Element = std::remove_const_t<std::remove_pointer_t<Pointer>>;

void products(const SupportProducts& args, int64_t block, int64_t id_begin, int64_t id_end) {
  with_type(args.hidden.dtype, [&](auto hidden) {
    with_type(args.weight.dtype, [&](auto weight) {
      products_of<Element<decltype(hidden)>, Element<decltype(weight)>>(args, block, id_begin, id_end);
    });
  });
}

void grad_hidden(const SupportGradHidden& args, int64_t block, int64_t first_range, int64_t end_range, int64_t part,
                 SupportMemory& memory) {
  with_type(args.weight.dtype, [&](auto weight) {
    auto* const rows = reinterpret_cast<Element<decltype(weight)>*>(memory.rows);
    grad_hidden_of(args, block, first_range, end_range, part, rows, memory.sums);
  });
}

void grad_weight(const SupportGradWeight& args, int64_t part, int64_t id_begin, int64_t id_end) {
  with_type(args.hidden.dtype, [&](auto hidden) {
    with_type(args.out_dtype, [&](auto out) {
      grad_weight_of<Element<decltype(hidden)>, Element<decltype(out)>>(args, part, id_begin, id_end);
    });
  });
}

}  // namespace

const SupportKernels support_kernels = {products, grad_hidden, grad_weight};

}  // namespace R1K_ISA
}  // namespace r1k
