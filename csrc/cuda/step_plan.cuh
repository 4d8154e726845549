// The warp that plans in the fused step: merges the parts of a row, works out its token's loss, and tells the block's
// warps what becomes of the row.
#pragma once

#include "common/policy_terms.h"
#include "common/vocabulary.h"
#include "cuda/step_rows.cuh"
#include "cuda/step_shared.cuh"

namespace r1k {
namespace gpu {

template <typename D>
__device__ RowStatistics merged_statistics(const GrpoStepArgs& args, const StepShared& shared, int depth, int parts) {
  const double c = scale_of_sums<D::kExact>(args.temperature);
  const double own = shared.own[depth];
  float top = kLowest;
  for (int k = lane_id(); k < parts; k += kWarp) top = std::fmax(top, shared.sums[depth][k][0]);
  RowTotals totals = row_totals<D::kExact>(highest_lane(top), own, c);
  for (int k = lane_id(); k < parts; k += kWarp) {
    const float* const sums = shared.sums[depth][k];
    const double part = static_cast<double>(sums[1]) + static_cast<double>(sums[3]);
    if (part != 0) add_part<D::kExact>(totals, sums[0], part, sums[2], c);
  }
  totals.total = sum_lanes(totals.total);
  totals.weighted = sum_lanes(totals.weighted);
  return row_statistics<D::kExact>(totals, own, args.temperature, c);
}

// What is known of a token before its log-prob.
struct TokenInputs {
  PolicyToken token;
  float old;
  int64_t id;
};

__device__ __forceinline__ TokenInputs read_token(const GrpoStepArgs& args, int64_t n, TokenWeight& weight) {
  TokenInputs inputs = {};
  if (n < 0) return inputs;
  const int64_t sequence = sequence_of(args.policy, n);
  const Broadcast &advantages = args.policy.advantages, &importance = args.policy.importance_weights;
  inputs.id = args.token_ids[n];
  inputs.old = args.policy.old_logprobs != nullptr ? args.policy.old_logprobs[n] : 0;
  inputs.token.has_ref = args.policy.ref_logprobs != nullptr;
  inputs.token.ref = inputs.token.has_ref ? args.policy.ref_logprobs[n] : 0;
  inputs.token.advantage = advantages.data[advantages.per_sequence ? sequence : n];
  inputs.token.importance = importance.data == nullptr ? 1 : importance.data[importance.per_sequence ? sequence : n];
  inputs.token.weight = weight.of(args.policy, sequence);
  return inputs;
}

template <typename D>
__device__ void plan_rows(const Step& step, StepShared& shared, int64_t cluster, int64_t clusters,
                          PolicySums* partials) {
  const GrpoStepArgs& args = step.args;
  const int parts = step.tile.cluster * step.tile.warps;
  if (cluster_rank() == 0 && args.policy.mask != nullptr) {
    for (int64_t n = cluster + lane_id() * clusters; n < args.policy.tokens; n += kWarp * clusters) {
      if (!args.policy.mask[n]) args.logprobs[n] = args.entropy[n] = 0;
    }
  }
  PolicySums total;
  RowWalk walk(args.policy.mask, args.policy.tokens, cluster, clusters);
  TokenWeight weight(args.policy);
  int64_t n = walk.next();
  TokenInputs inputs = read_token(args, n, weight);
  for (int64_t q = 0; n >= 0; ++q) {
    const int depth = static_cast<int>(q % kDepth);
    const int64_t next = walk.next();
    const TokenInputs next_inputs = read_token(args, next, weight);  // under way while this row is waited for
    R1K_DEVICE_CHECK(inputs.id >= 0 && inputs.id < args.logits.vocab,
                     "r1kernels: token_ids holds an id outside [0, V)");

    if (lane_id() == 0) barrier_expect(&shared.published[depth], parts * sizeof(shared.sums[0][0]) + sizeof(float));
    barrier_wait_cluster(&shared.published[depth], static_cast<int>(q / kDepth % 2));
    const RowStatistics row = merged_statistics<D>(args, shared, depth, parts);
    PolicyToken token = inputs.token;
    token.logprob = static_cast<float>(row.logprob);
    token.entropy = static_cast<float>(row.entropy);
    token.log_ratio = token.logprob - (args.policy.old_logprobs != nullptr ? inputs.old : token.logprob);
    PolicySums unused;
    const PolicyGradient gradient = add_token(unused, args.policy.objective, token);
    if (lane_id() == 0) {
      RowPlan& plan = shared.plan[depth];
      plan.row = row_gradient(row.lse, row.entropy, args.temperature, gradient.g, gradient.eta);
      plan.own = own_gradient<D::kExact>(shared.own[depth], row.lse, row.entropy, args.temperature, gradient.g,
                                         gradient.eta);
      plan.id = inputs.id;
      plan.kind = gradient.eta != 0 ? RowKind::policy_and_entropy : gradient.g != 0 ? RowKind::policy : RowKind::zero;
      barrier_arrive(&shared.planned[depth]);
    }
    if (q % step.tile.cluster == cluster_rank()) {  // the blocks take turns, and nobody waits for it
      add_token(total, args.policy.objective, token);
      if (lane_id() == 0) {
        args.logprobs[n] = token.logprob;
        args.entropy[n] = token.entropy;
      }
    }
    n = next;
    inputs = next_inputs;
  }
  if (lane_id() == 0) partials[blockIdx.x] = total;
}

}  // namespace gpu
}  // namespace r1k
