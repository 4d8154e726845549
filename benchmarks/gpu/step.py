"""The fused GRPO step by its operator: out of place and in place, by the kernel's own tile or another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.losses import LossFunction
from gpu.setting import CUDA
from r1kernels import Objective, objectives
from r1kernels.ops.policy_loss import kl_number

STEP, IN_PLACE = f"{CUDA}, operator", f"{CUDA}, operator, in place"
CLUSTERS = (1, 2, 4, 8)
PER_TOKEN = ("old_logprobs", "ref_logprobs", "mask", "cu_seqlens", "importance_weights", "normalizer")


def tile_of(cluster: int) -> list[int]:
    """What the operator's `tile` is for rows that are cut into so many blocks. Empty: the library chooses."""
    return [cluster]


def step(
    inputs: dict[str, Tensor], objective: Objective | None = None, tile: Sequence[int] = (), out: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """(loss, metrics, log-probs, entropy, gradient) of the arguments of `r1kernels.grpo_loss`."""
    logits, objective = inputs["logits"], objective or objectives.grpo()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    results = torch.ops.r1kernels_cuda.grpo_step(
        logits, inputs["token_ids"], inputs["advantages"], *(inputs.get(name) for name in PER_TOKEN), temperature,
        objectives.SURROGATES.index(objective.surrogate), kl_number(objective),
        objectives.AGGREGATES.index(objective.aggregate), objective.clip_low, objective.clip_high,
        math.inf if objective.ratio_cap is None else objective.ratio_cap, objective.tau_pos, objective.tau_neg,
        objective.kl_coef, objective.entropy_coef, float(objective.max_length or 1), list(tile), out,
    )
    return (*results, out)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rest: dict[str, Tensor], tile: Sequence[int], in_place: bool) -> Tensor:
        given = logits.clone() if in_place else logits.detach()
        loss, *_, grad = step({"logits": given, **rest}, tile=tile, out=given if in_place else None)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None


def loss_by_operator(tile: Sequence[int] = (), in_place: bool = False) -> LossFunction:
    """With the gradient that the operator gave, for comparisons."""

    def loss(logits: Tensor, **rest: Tensor) -> Tensor:
        return _Loss.apply(logits, rest, tile, in_place)

    return loss
