r"""Advantages from several rewards (GDPO): each reward is normalised in its group before the rewards are added.

If the rewards are added first, a reward with a large spread decides alone, and different combinations of rewards can
give the same advantage. The formulas are those of `group_advantages`, once for each reward and once for the batch, so
its rules hold: float64 inside, exact zeros, NaN for unscorable. These are a few operations on B x K numbers, which
plain PyTorch computes on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r1kernels.ops._checks import check_floating, check_number, check_shape, values_are_free
from r1kernels.ops.group_advantages import check_finite, checked_groups, reference


def _checked_weights(weights: Any, rewards: Tensor) -> Tensor:
    count = rewards.shape[-1]
    if isinstance(weights, Tensor):
        check_floating("weights", weights, rewards)
        check_shape("weights", weights, (count,), "one weight per reward")
        if values_are_free(weights) and not weights.isfinite().all():
            raise ValueError(f"weights is {weights.tolist()}, expected finite numbers")
        return weights.detach().double()
    if weights is None:
        weights = [1.0] * count
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"weights is a {type(weights).__name__}, expected numbers or a tensor")
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers, expected {count}: one weight per reward")
    numbers = [check_number(f"weights[{k}]", weight) for k, weight in enumerate(weights)]
    return torch.tensor(numbers, dtype=torch.float64, device=rewards.device)


def multi_reward_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantage of each answer from K rewards, each normalised among the answers to the same prompt (GDPO).

        s_i = sum_k w_k (r_ik - mean_group,k) / (std_group,k + eps)
        A_i = (s_i - mean_batch(s)) / (std_batch(s) + eps)

    Args:
        rewards: (B, K), float. NaN marks a reward that an answer does not have: it does not count in that reward's
            mean and std, and adds 0. An answer without any reward is unscorable: it does not count in the batch and
            gets 0. (P, G, K) is read as P groups of G when neither `group_size` nor `group_ids` is given.
        group_size: G; answers of one prompt are consecutive. Must divide B.
        group_ids: (B,), int64 or int32, instead of `group_size`. Groups may differ in size and be in any order.
        weights: K numbers, or (K,), float; None for 1 each.
        ddof: each std divides by n - ddof; 0 or 1.
        eps: added to each std, >= 0.

    Returns:
        The advantages, (B,) or (P, G); float32 (float64 for float64 rewards), not differentiable. They are exactly 0
        if all groups have equal rewards. The batch is what is given: with several ranks, give the rewards of all.

    Raises:
        TypeError: wrong dtype.
        ValueError: G does not divide B, both or neither of `group_size` and `group_ids`, an infinite reward, another
            number of weights than K.

    Memory: about 150 bytes an answer, and 8 a reward.

    Equivalent to: `group_advantages(sum(w * group_advantages(r, G) for w, r in zip(weights, rewards.T)), B)`.
    Source: arXiv 2601.05242; the batch is normalised over answers, as in TRL's "normalize_then_sum".
    """
    check_floating("rewards", rewards)
    if rewards.dim() < 2 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (B, K), or (P, G, K) without group_size")
    if type(ddof) is not int or ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof!r}, expected 0 or 1")
    eps, shape = check_number("eps", eps, minimum=0.0), rewards.shape[:-1]
    group_ids, group_size = checked_groups(rewards, tuple(shape), group_size, group_ids)
    factors = _checked_weights(weights, rewards)
    check_finite(rewards.detach())
    columns = rewards.detach().double().reshape(shape.numel(), rewards.shape[-1])
    total = torch.where(columns.isnan().all(1), torch.nan, torch.zeros_like(columns[:, 0]))
    for factor, column in zip(factors.unbind(), columns.unbind(1), strict=True):
        total += factor * reference(column, group_ids, group_size or 1, "group_std", ddof, eps)
    result = reference(total, None, max(len(total), 1), "group_std", ddof, eps)
    return result.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32).reshape(shape)
