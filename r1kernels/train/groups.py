"""Groups of rewards: how far they differ, which are worth training on, and their advantages."""

from __future__ import annotations

import torch
from torch import Tensor

import r1kernels

# Below this, a group's rewards hardly differ, and dividing by their deviation makes crumbs as large as successes.
SMALL_SPREAD = 0.1


def spreads(groups: Tensor) -> Tensor:
    """Largest less smallest reward of each group (n, G), without those that are NaN; 0 where all are."""
    infinity = float("inf")
    spread = groups.nan_to_num(-infinity).amax(-1) - groups.nan_to_num(infinity).amin(-1)
    return spread.clamp(min=0)


def advantages_of(rewards: Tensor, group_size: int, *, min_spread: float, scale: str) -> Tensor:
    """Advantages (B,) of rewards (B,): 0 for NaN, and in groups that differ by no more than `min_spread`."""
    groups = rewards.view(-1, group_size)
    level = (spreads(groups) <= min_spread).unsqueeze(-1) & ~groups.isnan()
    groups = torch.where(level, groups.nanmean(-1, keepdim=True), groups)
    return r1kernels.group_advantages(groups.flatten(), group_size, scale=scale)


def choose(rewards: Tensor, group_size: int, count: int, *, min_spread: float) -> tuple[Tensor, dict[str, float]]:
    """Rows of `count` groups to train on, and the shares of groups whose rewards are all the same, and hardly differ.

    Of more groups than are needed, those that differ come first, each kind in order.
    """
    groups = rewards.view(-1, group_size)
    spread = spreads(groups)
    flat = spread <= min_spread
    chosen = torch.argsort(flat.long(), stable=True)[:count].sort().values
    rows = torch.arange(rewards.numel()).view(groups.shape)[chosen].flatten()
    small = (spread > 0) & (spread < SMALL_SPREAD)
    return rows, {"zero_spread": flat.double().mean().item(), "small_spread": small.double().mean().item()}
