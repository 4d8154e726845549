"""The gap between the policy that sampled a rollout and the one that is trained on it, and what makes up for it.

The two are the same weights in two programs, which round differently, or a server that is some updates behind. With
samples of mu and gradients of pi, every token (or sequence) wants the weight pi / mu; a large one is mostly noise, so
it is cut off (truncated importance sampling, TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training") or its tokens are left out (masked, MIS: Liu et al. 2025, "When speed kills stability").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Ratios are computed from logarithms within these bounds, far outside any useful cap; and no gap of a token counts for
# more than the log-prob that servers write for a probability of 0.
_BOUND, _WIDEST = 20.0, 9999.0


@dataclass(frozen=True)
class ImportanceConfig:
    """`truncate` moves weights into [floor, cap]; `mask` drops what lies outside; `none` only measures the gap.

    A weight is that of a token, or of a whole sequence: the product over its tokens.
    """

    mode: Literal["none", "truncate", "mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    cap: float = 2.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.cap < math.exp(_BOUND):
            raise ValueError(f"cap is {self.cap}, expected a number from 1 to {math.exp(_BOUND):.0f}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}, expected a number from 0 to 1")


def importance_weights(
    rollout_logprobs: Tensor, train_logprobs: Tensor, mask: Tensor, settings: ImportanceConfig
) -> tuple[Tensor | None, dict[str, float]]:
    """Weights for `linear_grpo_loss`, exactly 1 where the log-probs are equal, and what the gap is.

    Args:
        rollout_logprobs: (B, T), of each token when it was sampled.
        train_logprobs: (B, T), of the same tokens by the policy to be updated, before its first update.
        mask: (B, T) bool; nothing behind it matters.

    Returns:
        Weights (B, T), or (B,) for sequences; None for `none`. Metrics: `logprob_gap_mean` and `logprob_gap_max` of
        |log pi - log mu|; `rollout_kl_k1` and `rollout_kl_k3`, estimates of KL(mu || pi) a token;
        `importance_mean`, `importance_cut` (the share truncated or masked) and `importance_ess`, the effective sample
        size as a share of the tokens (or sequences), all three of the weights of `settings.level`.

    Raises:
        ValueError: the log-probs of a counted token give no ratio.
    """
    mask = mask.bool()
    gap = (train_logprobs.double() - rollout_logprobs.double()).masked_fill(~mask, 0.0)
    if gap.isnan().any():
        row, column = gap.isnan().nonzero()[0].tolist()
        raise ValueError(
            f"token {column} of sample {row} has log-prob {rollout_logprobs[row, column].item()} in the rollout and "
            f"{train_logprobs[row, column].item()} in training, expected numbers"
        )
    gap = gap.clamp(-_WIDEST, _WIDEST)
    counted = gap[mask]
    near = counted.clamp(-_BOUND, _BOUND)
    metrics = {
        "logprob_gap_mean": _mean(counted.abs()),
        "logprob_gap_max": counted.abs().max().item() if len(counted) else 0.0,
        "rollout_kl_k1": _mean(-counted),
        "rollout_kl_k3": _mean(near.expm1() - near),
    }
    sequences = settings.level == "sequence"
    logs = (gap.sum(-1) if sequences else gap).clamp(-_BOUND, _BOUND)
    ratios = logs.exp()
    kept = (ratios >= settings.floor) & (ratios <= settings.cap)
    if settings.mode == "truncate":
        weights = ratios.clamp(settings.floor, settings.cap)
    elif settings.mode == "mask":
        weights = ratios.where(kept, 0.0)
    else:
        weights, kept = ratios, torch.ones_like(kept)
    among = mask.any(-1) if sequences else mask
    used = weights[among]
    metrics["importance_mean"] = _mean(used)
    metrics["importance_cut"] = _mean((~kept[among]).double())
    squares = used.square().sum().item()
    metrics["importance_ess"] = used.sum().item() ** 2 / (len(used) * squares) if squares else 0.0
    return None if settings.mode == "none" else weights.float(), metrics


def _mean(values: Tensor) -> float:
    return values.mean().item() if values.numel() else 0.0
