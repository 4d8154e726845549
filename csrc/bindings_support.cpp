// The operators over sets of ids on the CPU, over PyTorch's stable ABI: check, index the entries by id, launch, register.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>

#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/support.h"

namespace {

using namespace r1k::bindings;
using r1k::SupportEntry;
using r1k::SupportIndex;
using r1k::SupportRange;
using r1k::SupportSpan;

int64_t blocks_of(int64_t tokens) { return (tokens + SupportIndex::kBlockTokens - 1) / SupportIndex::kBlockTokens; }

// Boundaries of the sets, which ascend from 0 to the number of ids.
const int64_t* boundaries(const Tensor& offsets, int64_t ids) {
  R1K_CHECK(offsets.dim() == 1 && offsets.numel() > 0, "offsets must be (N + 1,)");
  const int64_t count = offsets.numel() - 1;
  const int64_t* const at = data<int64_t>(offsets, "offsets", ScalarType::Long, count + 1);
  R1K_CHECK(at[0] == 0 && at[count] == ids, "support offsets begin with ", at[0], " and end with ", at[count],
            ", expected 0 and ", ids, ", the number of support token_ids");
  for (int64_t n = 0; n < count; ++n) {
    R1K_CHECK(at[n] <= at[n + 1], "support offsets[", n + 1, "] is ", at[n + 1], ", expected at least offsets[", n,
              "], which is ", at[n]);
  }
  return at;
}

// The index of the sets where `mask` is true and that have `largest` ids at most, and the place of each token in its
// set.  An id that a set has twice is indexed once.
std::tuple<Tensor, Tensor, Tensor, Tensor> support_index(Tensor support_ids, Tensor offsets, Tensor token_ids,
                                                         MaybeTensor mask, int64_t vocab, int64_t largest) {
  const int64_t size = support_ids.numel(), count = token_ids.numel();
  R1K_CHECK(offsets.numel() == count + 1, "offsets has ", offsets.numel(), " entries, expected ", count + 1);
  R1K_CHECK(size < std::numeric_limits<int32_t>::max(), "support has ", size, " token_ids, expected fewer than 2^31");
  R1K_CHECK(vocab > 0 && vocab < std::numeric_limits<int32_t>::max(), "vocab is ", vocab, ", expected [1, 2^31)");
  const int64_t* const ids = data<int64_t>(support_ids, "support token_ids", ScalarType::Long, size);
  const int64_t* const tokens = data<int64_t>(token_ids, "token_ids", ScalarType::Long, count);
  const bool* const counted = bools(mask, "mask", count);
  const int64_t* const at = boundaries(offsets, size);
  const int64_t blocks = std::max<int64_t>(blocks_of(count), 1);
  Tensor targets = empty(token_ids, {count}, ScalarType::Long);
  Tensor starts = empty(token_ids, {blocks, vocab + 1}, ScalarType::Int);
  Tensor entries = empty(token_ids, {size}, ScalarType::Int);
  Tensor rows = empty(token_ids, {size}, ScalarType::Int);
  int64_t* const target = static_cast<int64_t*>(targets.data_ptr());
  int32_t* const start = static_cast<int32_t*>(starts.data_ptr());
  int32_t* const entry = static_cast<int32_t*>(entries.data_ptr());
  int32_t* const row = static_cast<int32_t*>(rows.data_ptr());
  // An error must not leave a thread, so the threads only note which sets are wrong.
  std::vector<char> wrong(count, 0);
  parallel_ranges(count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      target[n] = 0;
      if ((counted != nullptr && !counted[n]) || at[n] == at[n + 1]) continue;
      int64_t found = -1;
      bool inside = true;
      for (int64_t e = at[n + 1] - 1; e >= at[n]; --e) {
        inside &= ids[e] >= 0 && ids[e] < vocab;
        found = ids[e] == tokens[n] ? e : found;
      }
      wrong[n] = !inside || found < 0;
      target[n] = found - at[n];
    }
  });
  for (int64_t n = 0; n < count; ++n) {
    if (!wrong[n]) continue;
    for (int64_t e = at[n]; e < at[n + 1]; ++e) {
      R1K_CHECK(ids[e] >= 0 && ids[e] < vocab, "support token_ids[", e, "] is ", ids[e], ", expected an id in [0, ",
                vocab, ")");
    }
    R1K_CHECK(false, "token_ids[", n, "] is ", tokens[n], ", expected an id of its set, support token_ids[", at[n], ":",
              at[n + 1], "] (position counted over all dimensions)");
  }
  // A counting sort of each block, whose entries have the memory of its sets.  Threads count, and place, the entries of
  // parts of its tokens.
  const int64_t parts = std::clamp<int64_t>(size / blocks / 65536, 1, torch::stable::get_num_threads());
  std::vector<int32_t> places(parts * vocab);  // of the next entry of each id, in each part
  const auto in_parts = [&](int64_t first, int64_t end, const auto& visit) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin_part, int64_t end_part) {
      std::vector<int32_t> last(vocab, -1);  // the token whose set had the id last
      for (int64_t part = begin_part; part < end_part; ++part) {
        int32_t* const place = places.data() + part * vocab;
        const int64_t part_end = first + (end - first) * (part + 1) / parts;
        for (int64_t n = first + (end - first) * part / parts; n < part_end; ++n) {
          if ((counted != nullptr && !counted[n]) || at[n + 1] - at[n] > largest) continue;
          for (int64_t e = at[n]; e < at[n + 1]; ++e) {
            if (last[ids[e]] == n) continue;
            last[ids[e]] = static_cast<int32_t>(n);
            visit(place[ids[e]]++, n, e);
          }
        }
      }
    });
  };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = std::min(block * SupportIndex::kBlockTokens, count);
    const int64_t end = std::min(first + SupportIndex::kBlockTokens, count);
    int32_t* const begins = start + block * (vocab + 1);
    std::fill(places.begin(), places.end(), 0);
    in_parts(first, end, [](int32_t, int64_t, int64_t) {});
    int32_t next = static_cast<int32_t>(at[first]);
    for (int64_t v = 0; v < vocab; ++v) {
      begins[v] = next;
      for (int64_t part = 0; part < parts; ++part) {
        const int32_t number = places[part * vocab + v];
        places[part * vocab + v] = next;
        next += number;
      }
    }
    begins[vocab] = next;
    in_parts(first, end, [&](int32_t place, int64_t n, int64_t e) {
      entry[place] = static_cast<int32_t>(e);
      row[place] = static_cast<int32_t>(n);
    });
  }
  return {targets, starts, entries, rows};
}

r1k::Rows rows_of(const Tensor& matrix, const char* name) {
  R1K_CHECK(matrix.dim() == 2, name, " must be a matrix");
  R1K_CHECK(matrix.stride(1) == 1 || matrix.size(1) <= 1, name, " must have adjacent columns");
  return {matrix.data_ptr(), dtype_of(matrix, name), matrix.stride(0)};
}

// The index, of tokens below `count`.
SupportIndex index_of(const Tensor& starts, const Tensor& entries, const Tensor& tokens, int64_t count) {
  const int64_t blocks = std::max<int64_t>(blocks_of(count), 1);
  R1K_CHECK(starts.dim() == 2 && starts.size(0) == blocks && starts.size(1) > 1, "starts must be (", blocks, ", V + 1)");
  SupportIndex index;
  index.blocks = blocks;
  index.vocab = starts.size(1) - 1;
  index.starts = data<int32_t>(starts, "starts", ScalarType::Int, starts.numel());
  index.entries = data<int32_t>(entries, "entries", ScalarType::Int, entries.numel());
  index.tokens = data<int32_t>(tokens, "tokens", ScalarType::Int, entries.numel());
  const int64_t size = entries.numel();
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int32_t* const begins = index.starts_of(block);
    const int64_t first = block * SupportIndex::kBlockTokens, end = std::min(first + SupportIndex::kBlockTokens, count);
    bool ascends = begins[0] >= 0 && begins[index.vocab] <= size;
    for (int64_t v = 0; v < index.vocab; ++v) ascends &= begins[v] <= begins[v + 1];
    R1K_CHECK(ascends, "starts must ascend within [0, ", size, "]");
    std::atomic<bool> inside = true;  // an error must not leave a thread
    parallel_ranges(begins[index.vocab] - begins[0], 1 << 16, [&](int64_t begin, int64_t last) {
      bool all = true;
      for (int64_t at = begins[0] + begin; at < begins[0] + last; ++at) {
        all &= index.entries[at] >= 0 && index.entries[at] < size && index.tokens[at] >= first && index.tokens[at] < end;
      }
      if (!all) inside = false;
    });
    R1K_CHECK(inside.load(), "entries must be in [0, ", size, ") and tokens in [", first, ", ", end, ")");
  }
  return index;
}

// Ids in `parts` ranges of about equal work: an entry costs as much as `ids` ids.
template <typename Run>
void parallel_ids(const SupportIndex& index, int64_t first_block, int64_t end_block, int64_t parts, const Run& run) {
  std::vector<int64_t> work(index.vocab + 1);
  for (int64_t v = 0; v <= index.vocab; ++v) {
    work[v] = v / 16;
    for (int64_t block = first_block; block < end_block; ++block) {
      work[v] += index.starts_of(block)[v] - index.starts_of(block)[0];
    }
  }
  const auto boundary = [&](int64_t part) {
    return std::lower_bound(work.begin(), work.end(), work.back() * part / parts) - work.begin();
  };
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part == 0 ? 0 : boundary(part), end = part + 1 == parts ? index.vocab : boundary(part + 1);
    if (begin < end) run(begin, end);
  }
}

// A copy of the matrix in segments, in `memory`.
r1k::Segments segments_of(const Tensor& matrix, const char* name, Tensor& memory) {
  constexpr int64_t kColumns = r1k::kSupportColumns;
  const r1k::Rows rows = rows_of(matrix, name);
  const int64_t count = matrix.size(0), width = matrix.size(1), size = r1k::size_of(rows.dtype);
  const int64_t segments = (width + kColumns - 1) / kColumns;
  memory = empty(matrix, {segments, count, kColumns}, matrix.scalar_type());
  char* const to = static_cast<char*>(memory.data_ptr());
  const char* const from = static_cast<const char*>(rows.data);
  parallel_ranges(count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t segment = 0; segment < segments; ++segment) {
      const int64_t column = segment * kColumns, bytes = std::min(kColumns, width - column) * size;
      for (int64_t n = begin; n < end; ++n) {
        std::memcpy(to + (segment * count + n) * kColumns * size, from + (n * rows.stride + column) * size, bytes);
      }
    }
  });
  return {to, rows.dtype, count, kColumns};
}

// run(at) for the entries of the index, in parts.
template <typename Run>
void for_entries(const SupportIndex& index, const Run& run) {
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int32_t* const starts = index.starts_of(block);
    parallel_ranges(starts[index.vocab] - starts[0], 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t at = starts[0] + begin; at < starts[0] + end; ++at) run(at);
    });
  }
}

// Values in the order of the index, in `memory`: the kernels read them several times.
const float* ordered(const Tensor& values, const SupportIndex& index, Tensor& memory) {
  memory = empty(values, {values.numel()}, ScalarType::Float);
  const float* const from = floats(values, "values", values.numel());
  float* const to = static_cast<float*>(memory.data_ptr());
  for_entries(index, [&](int64_t at) { to[at] = from[index.entries[at]]; });
  return to;
}

int64_t parts_of(const SupportIndex& index, int64_t entries) {
  constexpr int64_t kEntriesOfAPart = 8192;
  return std::clamp<int64_t>((entries + index.vocab / 16) / kEntriesOfAPart, 1, 64);
}

void support_products(Tensor hidden, Tensor weight, Tensor starts, Tensor entries, Tensor tokens, Tensor values,
                      bool accumulate) {
  r1k::SupportProducts args;
  Tensor memory;
  args.hidden = segments_of(hidden, "hidden", memory);
  args.index = index_of(starts, entries, tokens, hidden.size(0));
  args.weight = rows_of(weight, "weight");
  args.width = hidden.size(1);
  R1K_CHECK(weight.size(1) == args.width && weight.size(0) == args.index.vocab, "weight must be (V, H)");
  float* const out = const_cast<float*>(floats(values, "values", entries.numel()));
  Tensor in_order = empty(values, {entries.numel()}, ScalarType::Float);
  args.values = static_cast<float*>(in_order.data_ptr());
  std::vector<SupportRange> ranges;
  const int64_t parts = parts_of(args.index, entries.numel() / args.index.blocks);
  for (int64_t block = 0; block < args.index.blocks; ++block) {
    parallel_ids(args.index, block, block + 1, parts,
                 [&](int64_t begin, int64_t end) { ranges.push_back({block, begin, end}); });
  }
  const auto run = r1k::active_kernels()->support->products;
  parallel_ranges(ranges.size(), 1, [&](int64_t k, int64_t) { run(args, ranges[k].block, ranges[k].begin, ranges[k].end); });
  for_entries(args.index, [&](int64_t at) {
    float& value = out[args.index.entries[at]];
    value = accumulate ? value + args.values[at] : args.values[at];
  });
}

// The entries of a block of tokens in ranges of ids, by token, then by id.
struct TokenLists {
  std::vector<SupportRange> ranges;  // of the blocks one after another
  std::vector<int64_t> first_range;  // [blocks + 1]
  std::unique_ptr<SupportSpan[]> spans;
  std::unique_ptr<SupportEntry[]> entries;
};

// A range has `rows` ids at most. Values of 0 are left out: their tokens have no gradient.
TokenLists lists_of(const SupportIndex& index, const float* values, int64_t size, int64_t rows) {
  constexpr int64_t kTokens = SupportIndex::kBlockTokens;
  TokenLists lists;
  lists.first_range.push_back(0);
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int32_t* const starts = index.starts_of(block);
    int64_t used = 0, begin = 0;
    for (int64_t id = 0; id < index.vocab; ++id) {
      used += starts[id] != starts[id + 1];
      if (used < rows && id + 1 < index.vocab) continue;
      if (used > 0) lists.ranges.push_back({block, begin, id + 1});
      used = 0, begin = id + 1;
    }
    lists.first_range.push_back(lists.ranges.size());
  }
  lists.spans.reset(new SupportSpan[lists.ranges.size() * kTokens]);
  lists.entries.reset(new SupportEntry[size]);
  parallel_ranges(lists.ranges.size(), 1, [&](int64_t k, int64_t) {
    const SupportRange& range = lists.ranges[k];
    const int32_t* const starts = index.starts_of(range.block);
    const int32_t* const tokens = index.tokens;
    const int64_t first_token = range.block * kTokens;
    SupportSpan* const spans = lists.spans.get() + k * kTokens;
    std::array<int32_t, kTokens> counts = {};
    for (int32_t at = starts[range.begin]; at < starts[range.end]; ++at) ++counts[tokens[at] - first_token];
    int32_t begin = starts[range.begin];
    for (int64_t n = 0; n < kTokens; ++n) {
      spans[n] = {begin, begin};
      begin += counts[n];
    }
    int32_t row = -1;
    for (int64_t id = range.begin; id < range.end; ++id) {
      row += starts[id] != starts[id + 1];
      for (int32_t at = starts[id]; at < starts[id + 1]; ++at) {
        const float value = values[index.entries[at]];
        if (value != 0) lists.entries[spans[tokens[at] - first_token].end++] = {row, value};
      }
    }
  });
  return lists;
}

void support_grad_hidden(Tensor values, Tensor weight, Tensor starts, Tensor entries, Tensor tokens, Tensor out) {
  constexpr int64_t kColumns = r1k::kSupportHiddenColumns;
  r1k::SupportGradHidden args;
  args.weight = rows_of(weight, "weight");
  R1K_CHECK(out.dim() == 2, "out must be (N, H)");
  args.tokens = out.size(0);
  args.index = index_of(starts, entries, tokens, args.tokens);
  args.width = weight.size(1);
  R1K_CHECK(weight.size(0) == args.index.vocab, "weight must be (V, H)");
  R1K_CHECK(out.size(1) == args.width, "out has ", out.size(1), " columns, expected ", args.width);
  const TokenLists lists = lists_of(args.index, floats(values, "values", entries.numel()), entries.numel(),
                                    args.kRangeBytes / (kColumns * r1k::size_of(args.weight.dtype)));
  args.ranges = lists.ranges.data();
  args.spans = lists.spans.get();
  args.entries = lists.entries.get();
  args.out = const_cast<float*>(floats(out, "out", out.numel()));
  const int64_t parts = (args.width + kColumns - 1) / kColumns;
  const auto run = r1k::active_kernels()->support->grad_hidden;
  parallel_parts(parts * args.index.blocks, [&](const auto& next) {
    const std::unique_ptr<r1k::SupportMemory> memory(new r1k::SupportMemory);
    for (int64_t k = next(); k >= 0; k = next()) {
      const int64_t block = k / parts;
      run(args, block, lists.first_range[block], lists.first_range[block + 1], k % parts * kColumns, *memory);
    }
  });
}

void support_grad_weight(Tensor values, Tensor hidden, Tensor starts, Tensor entries, Tensor tokens, Tensor out,
                         bool accumulate) {
  r1k::SupportGradWeight args;
  Tensor memory;
  args.hidden = segments_of(hidden, "hidden", memory);
  args.index = index_of(starts, entries, tokens, hidden.size(0));
  args.width = hidden.size(1);
  R1K_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(1) == args.width && out.size(0) == args.index.vocab,
            "out must be contiguous (V, H)");
  R1K_CHECK(values.numel() == entries.numel(), "values must be (M,)");
  Tensor in_order;
  args.values = ordered(values, args.index, in_order);
  args.out = out.data_ptr();
  args.out_dtype = dtype_of(out, "out");
  args.accumulate = accumulate;
  constexpr int64_t kBeyondCaches = 32 << 20;
  args.stream = !accumulate && out.numel() * r1k::size_of(args.out_dtype) >= kBeyondCaches;
  std::vector<SupportRange> ranges;
  parallel_ids(args.index, 0, args.index.blocks, parts_of(args.index, entries.numel()),
               [&](int64_t begin, int64_t end) { ranges.push_back({0, begin, end}); });
  const int64_t count = ranges.size(), parts = (args.width + r1k::kSupportColumns - 1) / r1k::kSupportColumns;
  const auto run = r1k::active_kernels()->support->grad_weight;
  parallel_ranges(parts * count, 1, [&](int64_t k, int64_t) {
    run(args, k / count * r1k::kSupportColumns, ranges[k % count].begin, ranges[k % count].end);
  });
}

std::tuple<Tensor, Tensor, Tensor> support_stats(Tensor values, Tensor offsets, Tensor targets, MaybeTensor mask,
                                                 double temperature, MaybeTensor temperatures) {
  const int64_t count = targets.numel();
  R1K_CHECK(values.dim() == 1 && offsets.numel() == count + 1, "values must be (M,), and offsets (N + 1,)");
  Tensor logprobs = empty(values, {count}, ScalarType::Float);
  Tensor lse = empty(values, {count}, ScalarType::Double);
  Tensor entropy = empty(values, {count}, ScalarType::Double);
  r1k::TokenStatsForward args = {};
  args.logits = row_view(values);
  args.offsets = boundaries(offsets, values.numel());
  args.token_ids = data<int64_t>(targets, "targets", ScalarType::Long, count);
  args.mask = bools(mask, "mask", count);
  args.temperature = {temperature, floats(temperatures, "temperatures", count)};
  for (int64_t n = 0; n < count; ++n) {
    R1K_CHECK((args.mask != nullptr && !args.mask[n]) ||
                  (args.token_ids[n] >= 0 && args.token_ids[n] < args.offsets[n + 1] - args.offsets[n]),
              "targets[", n, "] is ", args.token_ids[n], ", expected a place in a set");
  }
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.lse = static_cast<double*>(lse.data_ptr());
  args.entropy = static_cast<double*>(entropy.data_ptr());
  const auto forward = r1k::active_kernels()->token_stats->forward;
  parallel_ranges(count, row_grain(values.numel() / std::max<int64_t>(count, 1)),
                  [&](int64_t begin, int64_t end) { forward(args, begin, end); });
  return {logprobs, lse, entropy};
}

void support_stats_backward(Tensor values, Tensor offsets, Tensor targets, Tensor lse, Tensor entropy,
                            MaybeTensor grad_logprobs, MaybeTensor grad_entropy, double temperature,
                            MaybeTensor temperatures, double softcap, Tensor out) {
  const int64_t count = targets.numel();
  R1K_CHECK(values.dim() == 1 && offsets.numel() == count + 1, "values must be (M,), and offsets (N + 1,)");
  r1k::TokenStatsBackward args = {};
  args.logits = row_view(values);
  args.offsets = boundaries(offsets, values.numel());
  args.token_ids = data<int64_t>(targets, "targets", ScalarType::Long, count);
  args.lse = data<double>(lse, "lse", ScalarType::Double, count);
  args.entropy = data<double>(entropy, "entropy", ScalarType::Double, count);
  args.grad_logprobs = floats(grad_logprobs, "grad_logprobs", count);
  args.grad_entropy = floats(grad_entropy, "grad_entropy", count);
  args.temperature = {temperature, floats(temperatures, "temperatures", count)};
  args.softcap = softcap;
  R1K_CHECK(args.logits.dtype == r1k::DType::float32, "values must be float32");
  for (int64_t n = 0; n < count; ++n) {
    const bool skipped = (args.grad_logprobs == nullptr || args.grad_logprobs[n] == 0) &&
                         (args.grad_entropy == nullptr || args.grad_entropy[n] == 0);
    R1K_CHECK(skipped || (args.token_ids[n] >= 0 && args.token_ids[n] < args.offsets[n + 1] - args.offsets[n]),
              "targets[", n, "] is ", args.token_ids[n], ", expected a place in a set");
  }
  args.out = const_cast<float*>(floats(out, "out", values.numel()));
  args.out_dtype = r1k::DType::float32;
  const auto backward = r1k::active_kernels()->token_stats->backward;
  parallel_ranges(count, row_grain(values.numel() / std::max<int64_t>(count, 1)),
                  [&](int64_t begin, int64_t end) { backward(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) {
  m.impl("support_index", TORCH_BOX(&support_index));
  m.impl("support_products", TORCH_BOX(&support_products));
  m.impl("support_grad_hidden", TORCH_BOX(&support_grad_hidden));
  m.impl("support_grad_weight", TORCH_BOX(&support_grad_weight));
  m.impl("support_stats", TORCH_BOX(&support_stats));
  m.impl("support_stats_backward", TORCH_BOX(&support_stats_backward));
}
