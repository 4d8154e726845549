// Arguments of the fused policy loss on the CPU, on raw pointers.
#pragma once

#include <cstdint>

#include "../common/policy_args.h"
#include "../common/policy_terms.h"

namespace r1k {

struct PolicyLossArgs : PolicyLossInputs {
  float* grad_logprobs;       // [N]
  float* grad_entropy;        // [N] or null (entropy_coef = 0)

  int64_t begin(int64_t s) const { return cu_seqlens != nullptr ? cu_seqlens[s] : s * length; }
  int64_t end(int64_t s) const { return cu_seqlens != nullptr ? cu_seqlens[s + 1] : (s + 1) * length; }
};

int64_t counted_tokens(const PolicyLossArgs& args);
double denominator(const PolicyLossArgs& args, int64_t counted);
// One PolicySums for each sequence, added up in their order afterwards: the result does not depend on the number of
// threads.
void policy_loss_sequences(const PolicyLossArgs& args, double denominator, int64_t begin, int64_t end,
                           PolicySums* sums);
void policy_loss_reduce(const PolicyLossArgs& args, const PolicySums* sums, float* loss, float* metrics);

}  // namespace r1k
