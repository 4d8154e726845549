"""Losses in plain torch that only these cases measure. All others are in `r1kernels.bench.eager`."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kernels.bench import eager

ENTROPY_COEF = 0.01


def grpo_loss(
    logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The mean over sequences of the mean over their tokens that count."""
    terms = eager.clipped_terms(eager.logprobs(logits, token_ids), advantages, old_logprobs)
    if mask is None:
        return terms.mean(1).mean()
    return (torch.where(mask, terms, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


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
    logprobs, entropy = eager.finite_logprobs_and_entropy(F.linear(hidden, weight), token_ids, entropy_gradient=True)
    return eager.clipped_loss(logprobs, advantages, old_logprobs) - ENTROPY_COEF * entropy.mean()


def linear_divergence(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, kind: str
) -> Tensor:
    return eager.divergence(F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight), kind)
