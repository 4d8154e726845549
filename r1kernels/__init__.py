"""r1kernels: the loss head of language-model RL, exact and fused. What is exported here is the public API.

Names are loaded when one of them is first used, so that `import r1kernels.rewards` needs no torch. From then on all
operators `torch.ops.r1kernels.*` exist.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1kernels import objectives
    from r1kernels import rewards as rewards  # not in __all__, so `as` says that they are public
    from r1kernels import testing as testing
    from r1kernels._dispatch import backend
    from r1kernels._library import has_fast_bf16, release_workspace
    from r1kernels.objectives import Objective
    from r1kernels.ops.cross_entropy import cross_entropy
    from r1kernels.ops.distillation_loss import DistillationLoss, distillation_loss
    from r1kernels.ops.global_normalizer import global_normalizer
    from r1kernels.ops.group_advantages import group_advantages
    from r1kernels.ops.grpo_loss import grpo_loss
    from r1kernels.ops.importance_weights import ImportanceWeights, importance_weights
    from r1kernels.ops.kl_estimate import kl_estimate
    from r1kernels.ops.linear.budget import linear_loss_bytes
    from r1kernels.ops.linear.cross_entropy import linear_cross_entropy
    from r1kernels.ops.linear.distillation_loss import linear_distillation_loss
    from r1kernels.ops.linear.grpo_loss import linear_grpo_loss
    from r1kernels.ops.linear.logits import linear_logits
    from r1kernels.ops.linear.multi_target import linear_multi_target
    from r1kernels.ops.linear.options import LinearOptions
    from r1kernels.ops.linear.token_statistics import linear_token_statistics
    from r1kernels.ops.linear.token_stats import linear_token_logprobs, linear_token_logprobs_and_entropy
    from r1kernels.ops.multi_reward_advantages import multi_reward_advantages
    from r1kernels.ops.pass_at_k_advantages import pass_at_k_advantages
    from r1kernels.ops.policy_loss import PolicyLoss, policy_loss
    from r1kernels.ops.policy_loss_reference import PolicyBatch
    from r1kernels.ops.token_filters import clip_cov_filter, high_entropy_filter, off_policy_filter
    from r1kernels.ops.token_logprobs import token_logprobs, token_logprobs_and_entropy
    from r1kernels.ops.token_statistics import TokenStatistics, token_statistics

__version__ = "0.2.0"  # setuptools reads it here, without importing anything

_SUBMODULES = ("objectives", "rewards", "testing")
_MODULES = {
    "DistillationLoss": "r1kernels.ops.distillation_loss",
    "ImportanceWeights": "r1kernels.ops.importance_weights",
    "LinearOptions": "r1kernels.ops.linear.options",
    "Objective": "r1kernels.objectives",
    "PolicyBatch": "r1kernels.ops.policy_loss_reference",
    "PolicyLoss": "r1kernels.ops.policy_loss",
    "TokenStatistics": "r1kernels.ops.token_statistics",
    "backend": "r1kernels._dispatch",
    "clip_cov_filter": "r1kernels.ops.token_filters",
    "cross_entropy": "r1kernels.ops.cross_entropy",
    "distillation_loss": "r1kernels.ops.distillation_loss",
    "global_normalizer": "r1kernels.ops.global_normalizer",
    "group_advantages": "r1kernels.ops.group_advantages",
    "grpo_loss": "r1kernels.ops.grpo_loss",
    "has_fast_bf16": "r1kernels._library",
    "high_entropy_filter": "r1kernels.ops.token_filters",
    "importance_weights": "r1kernels.ops.importance_weights",
    "kl_estimate": "r1kernels.ops.kl_estimate",
    "linear_cross_entropy": "r1kernels.ops.linear.cross_entropy",
    "linear_distillation_loss": "r1kernels.ops.linear.distillation_loss",
    "linear_grpo_loss": "r1kernels.ops.linear.grpo_loss",
    "linear_logits": "r1kernels.ops.linear.logits",
    "linear_loss_bytes": "r1kernels.ops.linear.budget",
    "linear_multi_target": "r1kernels.ops.linear.multi_target",
    "linear_token_logprobs": "r1kernels.ops.linear.token_stats",
    "linear_token_logprobs_and_entropy": "r1kernels.ops.linear.token_stats",
    "linear_token_statistics": "r1kernels.ops.linear.token_statistics",
    "multi_reward_advantages": "r1kernels.ops.multi_reward_advantages",
    "off_policy_filter": "r1kernels.ops.token_filters",
    "pass_at_k_advantages": "r1kernels.ops.pass_at_k_advantages",
    "policy_loss": "r1kernels.ops.policy_loss",
    "release_workspace": "r1kernels._library",
    "token_logprobs": "r1kernels.ops.token_logprobs",
    "token_logprobs_and_entropy": "r1kernels.ops.token_logprobs",
    "token_statistics": "r1kernels.ops.token_statistics",
}

__all__ = [
    "DistillationLoss",
    "ImportanceWeights",
    "LinearOptions",
    "Objective",
    "PolicyBatch",
    "PolicyLoss",
    "TokenStatistics",
    "__version__",
    "backend",
    "clip_cov_filter",
    "cross_entropy",
    "distillation_loss",
    "global_normalizer",
    "group_advantages",
    "grpo_loss",
    "has_fast_bf16",
    "high_entropy_filter",
    "importance_weights",
    "kl_estimate",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_grpo_loss",
    "linear_logits",
    "linear_loss_bytes",
    "linear_multi_target",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "linear_token_statistics",
    "multi_reward_advantages",
    "objectives",
    "off_policy_filter",
    "pass_at_k_advantages",
    "policy_loss",
    "release_workspace",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_statistics",
]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"r1kernels.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'r1kernels' has no attribute {name!r}")
    for public, module in _MODULES.items():
        globals()[public] = getattr(import_module(module), public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
