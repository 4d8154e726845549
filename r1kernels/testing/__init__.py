"""Inputs, float64 oracles and the error budget of the tests."""

from r1kernels.testing.budget import EPS32, Expected, assert_within, rounding
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
    group_advantages,
    kl_term,
    policy_loss,
    token_stats,
    token_stats_gradient,
)

__all__ = [
    "DYNAMO_WARNING",
    "EPS32",
    "Expected",
    "PolicyExpected",
    "TokenStats",
    "assert_within",
    "compiled",
    "generator",
    "group_advantages",
    "kl_term",
    "length_mask",
    "packed",
    "poisoned",
    "policy_loss",
    "random_ids",
    "random_lengths",
    "random_logits",
    "random_policy",
    "rounding",
    "token_stats",
    "token_stats_gradient",
]
