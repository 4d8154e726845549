"""The losses as trainers write them in plain torch: float32 arithmetic, or float64 where the inputs are."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 0.2
ENTROPY_COEF = 0.01


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    log_p = wide(logits).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def policy_loss(
    logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The mean over sequences of the mean over their tokens that count."""
    ratio = (logprobs - old_logprobs).exp()
    advantages = advantages.reshape(len(ratio), -1)
    terms = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    if mask is None:
        return terms.mean(1).mean()
    return (torch.where(mask, terms, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


def grpo_loss(
    logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor | None = None
) -> Tensor:
    logprobs, _ = logprobs_and_entropy(logits, token_ids)
    return policy_loss(logprobs, advantages, old_logprobs, mask)


def packed_grpo_loss(
    logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Sequences without padding, one after the other."""
    bounds = cu_seqlens.tolist()
    losses = [
        grpo_loss(*(value[None, begin:end] for value in (logits, token_ids)), advantages[i : i + 1],
                  old_logprobs[None, begin:end])
        for i, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.stack(losses).mean()


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor
) -> Tensor:
    """With an entropy bonus."""
    logprobs, entropy = logprobs_and_entropy(F.linear(hidden, weight), token_ids, entropy_gradient=True)
    return policy_loss(logprobs, advantages, old_logprobs) - ENTROPY_COEF * entropy.mean()


def linear_grpo_loss(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor
) -> Tensor:
    return grpo_loss(F.linear(hidden, weight), token_ids, advantages, old_logprobs)


def group_advantages(rewards: Tensor) -> Tensor:
    """(P, G) rewards."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3."""
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(logits).flatten(0, -2), targets.flatten())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(F.linear(hidden, weight), targets)


def distillation_loss(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    log_p, log_q = wide(student).log_softmax(-1), wide(teacher).log_softmax(-1)
    if divergence == "forward_kl":
        return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    if divergence == "reverse_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum(F.kl_div(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q)) / 2


def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, divergence: str
) -> Tensor:
    return distillation_loss(
        F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight), divergence
    )
