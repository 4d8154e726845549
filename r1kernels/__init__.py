"""r1kernels: the loss head of language-model RL, exact and fused. What is exported here is the public API."""

from r1kernels import objectives
from r1kernels._library import backend
from r1kernels.objectives import Objective
from r1kernels.ops.cross_entropy import cross_entropy
from r1kernels.ops.distillation_loss import DistillationLoss, distillation_loss
from r1kernels.ops.group_advantages import group_advantages
from r1kernels.ops.grpo_loss import grpo_loss
from r1kernels.ops.kl_estimate import kl_estimate
from r1kernels.ops.linear_cross_entropy import linear_cross_entropy
from r1kernels.ops.linear_distillation_loss import linear_distillation_loss
from r1kernels.ops.linear_grpo_loss import linear_grpo_loss
from r1kernels.ops.linear_options import LinearOptions
from r1kernels.ops.linear_token_stats import linear_token_logprobs, linear_token_logprobs_and_entropy
from r1kernels.ops.policy_loss import PolicyLoss, policy_loss
from r1kernels.ops.policy_loss_reference import PolicyBatch
from r1kernels.ops.token_stats import token_logprobs, token_logprobs_and_entropy

__version__ = "0.1.0"

__all__ = [
    "DistillationLoss",
    "LinearOptions",
    "Objective",
    "PolicyBatch",
    "PolicyLoss",
    "__version__",
    "backend",
    "cross_entropy",
    "distillation_loss",
    "group_advantages",
    "grpo_loss",
    "kl_estimate",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "objectives",
    "policy_loss",
    "token_logprobs",
    "token_logprobs_and_entropy",
]
