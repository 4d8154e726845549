"""Inputs, float64 oracles and the error budget of the tests."""

from r1kernels import _library
from r1kernels._origin import instruction_set
from r1kernels.testing.advantages import (
    group_advantages,
    importance_weights,
    multi_reward_advantages,
    pass_at_k_advantages,
)
from r1kernels.testing.budget import EPS32, Expected, assert_within, rounding
from r1kernels.testing.divergences import (
    DivergenceExpected,
    divergence,
    random_pair,
    random_topk,
    topk_divergence,
)
from r1kernels.testing.inputs import (
    DYNAMO_WARNING,
    compiled,
    generator,
    length_mask,
    packed,
    poisoned,
    random_ids,
    random_lengths,
    random_logits,
    random_policy,
)
from r1kernels.testing.oracles import (
    PolicyExpected,
    TokenStats,
    kl_term,
    policy_loss,
    token_stats,
    token_stats_gradient,
)
from r1kernels.testing.statistics import StatisticsExpected, token_statistics, token_statistics_gradient
from r1kernels.testing.supports import over_support, random_support
from r1kernels.testing.targets import target_gradient, target_losses
from r1kernels.testing.token_local import check_token_local
from r1kernels.testing.top_k import TopKExpected, top_k_divergence

# The kernels under test: the compiled ones, or GPU kernels that the Triton interpreter runs on the CPU.
KERNELS = "triton" if _library.INTERPRETED else "cuda" if _library.EMULATED else "cpu"


__all__ = [
    "DYNAMO_WARNING",
    "EPS32",
    "KERNELS",
    "DivergenceExpected",
    "Expected",
    "PolicyExpected",
    "StatisticsExpected",
    "TokenStats",
    "TopKExpected",
    "assert_within",
    "check_token_local",
    "compiled",
    "divergence",
    "generator",
    "group_advantages",
    "importance_weights",
    "instruction_set",
    "kl_term",
    "length_mask",
    "multi_reward_advantages",
    "over_support",
    "packed",
    "pass_at_k_advantages",
    "poisoned",
    "policy_loss",
    "random_ids",
    "random_lengths",
    "random_logits",
    "random_pair",
    "random_policy",
    "random_support",
    "random_topk",
    "rounding",
    "target_gradient",
    "target_losses",
    "token_statistics",
    "token_statistics_gradient",
    "token_stats",
    "token_stats_gradient",
    "top_k_divergence",
    "topk_divergence",
]
