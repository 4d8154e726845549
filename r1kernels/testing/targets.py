"""The oracle of cross-entropies with several targets a row, label smoothing and z-loss, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels.testing.budget import EPS32, Expected


def target_losses(logits: Tensor, ids: Tensor, z_loss_coef: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """(1 - eps) (-log p_y) + eps mean_v (-log p_v) + c lse^2 of each target (D, N), from logits (N, V)."""
    z = logits.detach().double()
    lse = z.logsumexp(-1, keepdim=True)
    surprise = lse - z
    smooth = surprise.mean(-1) * label_smoothing if label_smoothing else 0
    return (1 - label_smoothing) * surprise.gather(-1, ids.T).T + smooth + z_loss_coef * lse.squeeze(-1).square()


def target_gradient(
    logits: Tensor, ids: Tensor, grads: Tensor, z_loss_coef: float = 0.0, label_smoothing: float = 0.0
) -> Expected:
    """The gradient of the logits (N, V) from those of the losses (D, N): the sum of that of each target,

        u ((1 - eps) (p_j - 1[j = y]) + eps (p_j - 1/V) + 2 c lse p_j).
    """
    z = logits.detach().double()
    lse, vocab = z.logsumexp(-1, keepdim=True), z.shape[-1]
    p = (z - lse).exp()
    value, terms = torch.zeros_like(z), torch.zeros_like(z)
    for targets, u in zip(ids, grads.double()[..., None], strict=True):
        is_target = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, targets[:, None], True)
        rest = torch.where(is_target, 0, p).sum(-1, keepdim=True)  # 1 - p of the target, without cancellation
        hit = (1 - label_smoothing) * torch.where(is_target, -rest, p)
        even, pressure = label_smoothing * (p - 1 / vocab), 2 * z_loss_coef * lse * p
        value += u * (hit + even + pressure)
        # p has the error of the log-sum-exp, and the large parts of a target's entry cancel.
        sizes = hit.abs() + label_smoothing * (p + 1 / vocab) + pressure.abs() + is_target * p
        terms += u.abs() * (sizes + 4 * (1 + 2 * z_loss_coef * lse.abs()) * (lse.abs() + 1) * p * EPS32)
    return Expected(value, terms)
