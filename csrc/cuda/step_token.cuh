// A row's token in the fused step: what it weighs in the loss, and what its loss makes of the row's sums.
#pragma once

#include "common/policy_terms.h"
#include "cuda/sequences.cuh"
#include "cuda/step_part.cuh"

namespace r1k {
namespace gpu {

constexpr int kMaxCluster = 8;  // blocks; more is not portable
constexpr int kMaxParts = kMaxCluster * kStepWarps;

// What is known of a token before its log-prob.
struct TokenInputs {
  PolicyToken token;
  float old;
  int64_t id;
};

// What becomes of a row, once its token's loss is known.
enum class RowKind : int { zero, policy, policy_and_entropy };
struct RowPlan {
  RowGradient row;
  float own;  // the gradient of the token's own entry
  RowKind kind;
};

struct StepShared {
  float sums[kMaxParts][4];  // top, rest, weighted, count of the vectors of each warp of the cluster
  float own;                 // the token's own logit
  TokenInputs inputs;
  RowPlan plan;
  Barrier arrived;           // the block's part of the row
  Barrier published;         // sums and logit, by all warps of the cluster
};
constexpr size_t kLogitsOffset = (sizeof(StepShared) + 127) / 128 * 128;

// ---- weights of tokens --------------------------------------------------------------------------------------

// Tokens of [begin, end) that count, by all threads of a block; counts[] of each warp is the result.
__device__ inline int64_t counted_tokens(const bool* mask, int64_t begin, int64_t end, int64_t* counts) {
  if (mask == nullptr) return end - begin;
  const int64_t thread = threadIdx.x;
  int64_t count = 0;
  const int64_t to_vector = -reinterpret_cast<intptr_t>(mask + begin) & (kVec - 1);
  const int64_t head = begin + to_vector < end ? begin + to_vector : end;
  if (begin + thread < head) count += mask[begin + thread];
  const int64_t body = head + (end - head) / kVec * kVec;
#pragma unroll 4
  for (int64_t t = head + kVec * thread; t < body; t += kVec * kStepThreads) {
    const Vec16 v = *reinterpret_cast<const Vec16*>(mask + t);
    for (int k = 0; k < 4; ++k) count += count_bits(v.word[k] & 0x01010101u);
  }
  if (body + thread < end) count += mask[body + thread];
  count = sum_lanes(count);
  if (lane_id() == 0) counts[warp_id()] = count;
  sync_block();
  count = 0;
  for (int w = 0; w < kStepWarps; ++w) count += counts[w];
  return count;
}

// The weight of a sequence's tokens in the loss, by a block; of all sequences alike unless each is averaged by itself.
__device__ inline double weight_of(const PolicyLossArgs& args, int64_t sequence, int64_t* counts) {
  const double sequences = static_cast<double>(args.sequences > 1 ? args.sequences : 1);
  double denominator = sequences;
  if (args.objective.aggregate == Aggregate::constant) denominator = sequences * args.objective.max_length;
  if (args.objective.aggregate == Aggregate::token_mean && args.normalizer == nullptr) {
    const int64_t counted = counted_tokens(args.mask, 0, args.tokens, counts);
    denominator = static_cast<double>(counted > 1 ? counted : 1);
  }
  if (args.normalizer != nullptr) denominator = *args.normalizer;
  if (args.objective.aggregate != Aggregate::sequence_mean) return 1 / denominator;
  const Sequences all = {args.tokens, args.sequences, args.length, args.cu_seqlens};
  const int64_t begin = all.begin(sequence);  // within [0, N], whatever cu_seqlens says
  const int64_t counted = counted_tokens(args.mask, begin, begin + all.size(sequence), counts);
  return 1 / (denominator * static_cast<double>(counted > 1 ? counted : 1));
}

// ---- one token, by all lanes of a warp ----------------------------------------------------------------------

// The sequence that holds a token: the last one that begins at or before it.
__device__ inline int64_t sequence_of(const PolicyLossArgs& args, int64_t token) {
  if (args.cu_seqlens == nullptr) return token / args.length;
  int64_t low = 0, width = args.sequences;
  while (width > 1) {
    const int64_t step = (width + kWarp - 1) / kWarp;
    const int64_t at = lane_id() * step;
    const int before = count_bits(ballot(at < width && args.cu_seqlens[low + at] <= token));
    const int64_t skipped = (before > 0 ? before - 1 : 0) * step;
    low += skipped;
    width = step < width - skipped ? step : width - skipped;
  }
  return low;
}

__device__ __forceinline__ TokenInputs read_token(const GrpoStepArgs& args, int64_t n, const double* weights) {
  const PolicyLossArgs& policy = args.policy;
  TokenInputs inputs = {};
  inputs.id = args.token_ids[n];
  inputs.old = policy.old_logprobs != nullptr ? policy.old_logprobs[n] : 0;
  inputs.token.has_ref = policy.ref_logprobs != nullptr;
  inputs.token.ref = inputs.token.has_ref ? policy.ref_logprobs[n] : 0;
  const int64_t sequence = sequence_of(policy, n);
  const Broadcast &advantages = policy.advantages, &importance = policy.importance_weights;
  inputs.token.advantage = advantages.at(n, sequence);
  inputs.token.importance = importance.data == nullptr ? 1 : importance.at(n, sequence);
  wait_for_previous_kernel();
  inputs.token.weight = weights[policy.objective.aggregate == Aggregate::sequence_mean ? sequence : 0];
  R1K_DEVICE_CHECK(inputs.id >= 0 && inputs.id < args.logits.vocab, "r1kernels: token_ids holds an id outside [0, V)");
  return inputs;
}

template <typename D>
__device__ RowStatistics merged_statistics(const GrpoStepArgs& args, const StepShared& shared, int parts) {
  const double c = scale_of_sums<D::kExact>(args.temperature);
  const double own = shared.own;
  float top = kLowest;
  for (int k = lane_id(); k < parts; k += kWarp) top = std::fmax(top, shared.sums[k][0]);
  RowTotals totals = row_totals<D::kExact>(highest_lane(top), own, c);
  for (int k = lane_id(); k < parts; k += kWarp) {
    const float* const sums = shared.sums[k];
    const double part = static_cast<double>(sums[1]) + static_cast<double>(sums[3]);
    if (part != 0) add_part<D::kExact>(totals, sums[0], part, sums[2], c);
  }
  totals.total = sum_lanes(totals.total);
  totals.weighted = sum_lanes(totals.weighted);
  return row_statistics<D::kExact>(totals, own, args.temperature, c);
}

// The token's log-prob and entropy, and what becomes of its row, once the sums of all parts have arrived.
template <typename D>
__device__ void plan_row(const GrpoStepArgs& args, StepShared& shared, int64_t n, int parts) {
  const RowStatistics row = merged_statistics<D>(args, shared, parts);
  PolicyToken token = shared.inputs.token;
  token.logprob = static_cast<float>(row.logprob);
  token.entropy = static_cast<float>(row.entropy);
  token.log_ratio = token.logprob - (args.policy.old_logprobs != nullptr ? shared.inputs.old : token.logprob);
  PolicySums unused;  // the policy loss is added up afterwards, from the log-probs
  const PolicyGradient gradient = add_token(unused, args.policy.objective, token);
  if (lane_id() != 0) return;
  RowPlan& plan = shared.plan;
  plan.row = row_gradient<D::kExact>(row.lse, row.entropy, args.temperature, gradient.g, gradient.eta);
  plan.own = own_gradient<D::kExact>(shared.own, row.lse, row.entropy, args.temperature, gradient.g, gradient.eta);
  plan.kind = gradient.eta != 0 ? RowKind::policy_and_entropy : gradient.g != 0 ? RowKind::policy : RowKind::zero;
  if (cluster_rank() == 0) {
    args.logprobs[n] = token.logprob;
    args.entropy[n] = token.entropy;
  }
}

}  // namespace gpu
}  // namespace r1k
