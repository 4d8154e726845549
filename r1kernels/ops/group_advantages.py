r"""Group-relative advantages: A = (r - baseline) / (std + eps) over the answers to one prompt.

A group whose rewards are all equal has advantage exactly 0 (max = min decides, not rounded arithmetic: in fp32
the mean of 0.1, 0.1, 0.1 is not 0.1, and dividing by a tiny std turns that into a large advantage).

The mean is the baseline of the kernels. The other baselines are a few operations on B numbers: plain PyTorch computes
them, on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops._checks import (
    FLOAT_DTYPES,
    INT_DTYPES,
    check_floating,
    check_number,
    check_shape,
    check_tensor,
    ids_int64,
    values_are_free,
)

SCALES = ("group_std", "batch_std", "none")
BASELINES = ("mean", "leave_one_out", "length_weighted")


def groups_of(rewards: Tensor, group_ids: Tensor | None, group_size: int) -> tuple[Tensor, int]:
    """The number of the group of each reward (B,), and an upper bound of these numbers, without a synchronisation."""
    if group_ids is None:
        count = len(rewards) // max(group_size, 1)
        return torch.arange(count, device=rewards.device).unsqueeze(1).expand(count, group_size).reshape(-1), count
    ordered, order = group_ids.sort()
    begins = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0))[: len(ordered)]
    return torch.empty_like(order).scatter(0, order, begins.cumsum(0)), len(rewards)


def _moments(rewards: Tensor, groups: Tensor, count: int, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, mean, std) of each group's scorable rewards. If all are equal, std is exactly 0 and the mean is exact."""
    scorable = ~rewards.isnan()
    zeros = rewards.new_zeros(count)
    n = zeros.index_add(0, groups, scorable.to(rewards.dtype))
    mean = _weighted_mean(rewards, scorable.to(rewards.dtype), groups, count)
    centred = torch.where(scorable, rewards - mean[groups], 0)
    variance = zeros.index_add(0, groups, centred.square()) / (n - ddof).clamp(min=1)
    return n, mean, variance.sqrt()


def _weighted_mean(rewards: Tensor, weights: Tensor, groups: Tensor, count: int) -> Tensor:
    """The weighted mean of each group's scorable rewards; exactly their value if all are equal, and 0 without weights.
    """
    scorable = ~rewards.isnan()
    zeros = rewards.new_zeros(count)
    low = zeros.scatter_reduce(0, groups, torch.where(scorable, rewards, torch.inf), "amin", include_self=False)
    high = zeros.scatter_reduce(0, groups, torch.where(scorable, rewards, -torch.inf), "amax", include_self=False)
    weights = torch.where(scorable, weights, 0)
    total = zeros.index_add(0, groups, weights)
    weighted = zeros.index_add(0, groups, torch.where(scorable, rewards * weights, 0))
    return torch.where(low >= high, low, weighted / torch.where(total > 0, total, 1))


def check_finite(rewards: Tensor) -> None:
    """For functions without a kernel; kernels check the rewards themselves."""
    if values_are_free(rewards) and rewards.isinf().any():
        position = int(rewards.flatten().isinf().nonzero()[0])
        raise ValueError(f"rewards[{position}] is {float(rewards.flatten()[position])}, expected a finite number, or "
                         "NaN for unscorable")


def reference(
    rewards: Tensor, group_ids: Tensor | None, group_size: int, scale: str, ddof: int, eps: float,
    baseline: str = "mean", lengths: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in float64 inside."""
    check_finite(rewards)
    r = rewards.double()
    groups, count = groups_of(r, group_ids, group_size)
    n, mean, std = _moments(r, groups, count, ddof)
    centre = mean if lengths is None else _weighted_mean(r, lengths.double(), groups, count)
    centred = r - centre[groups]
    exact_zero = rewards.isnan() | (centred == 0)
    if baseline == "leave_one_out":  # r - mean of the others
        centred = centred * (n / (n - 1).clamp(min=1))[groups]
    if scale == "group_std":
        centred = centred / (std[groups] + eps)
    elif scale == "batch_std":
        centred = centred / (_moments(r, torch.zeros_like(groups), 1, ddof)[2] + eps)
    return torch.where(exact_zero, 0, centred).to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def checked_groups(
    rewards: Tensor, shape: tuple[int, ...], group_size: Any, group_ids: Any
) -> tuple[Tensor | None, int | None]:
    """(group_ids, group_size), of which one is given, for rewards whose answers have this shape: (B,) or (P, G)."""
    given = f"rewards has shape {tuple(rewards.shape)}"
    columns = ", K" * (rewards.dim() - len(shape))
    if group_ids is None and group_size is None and len(shape) == 2:
        group_size = shape[1]
    elif len(shape) != 1:
        raise ValueError(f"{given}, expected (B{columns or ','}), or (P, G{columns}) without group_size")
    if (group_ids is None) == (group_size is None):
        number = "neither" if group_ids is None else "both"
        raise ValueError(f"{number} of group_size and group_ids given, expected exactly one")
    count = torch.Size(shape).numel()
    if group_ids is not None:
        group_ids = ids_int64("group_ids", group_ids, rewards)
        check_shape("group_ids", group_ids, shape, "one group id per reward")
    elif isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1 or count % group_size:
        raise ValueError(f"group_size is {group_size!r}, expected a positive integer that divides the {count} rewards")
    return group_ids, group_size


def _checked_lengths(lengths: Any, rewards: Tensor, baseline: str) -> Tensor | None:
    if (lengths is None) == (baseline == "length_weighted"):
        expected = "one number per answer" if lengths is None else "None"
        raise ValueError(f"lengths is {'None' if lengths is None else 'given'} with the baseline {baseline!r}, "
                         f"expected {expected}")
    if lengths is None:
        return None
    check_tensor("lengths", lengths, rewards)
    if lengths.dtype not in FLOAT_DTYPES + INT_DTYPES:
        raise TypeError(f"lengths has dtype {lengths.dtype}, expected int64, int32 or a floating dtype")
    check_shape("lengths", lengths, tuple(rewards.shape), "one length per reward")
    lengths = lengths.detach().reshape(-1)
    if values_are_free(lengths):
        bad = ~rewards.reshape(-1).isnan() & ~((lengths >= 0) & (lengths < torch.inf))
        if bad.any():
            position = int(bad.nonzero()[0])
            raise ValueError(f"lengths[{position}] is {lengths[position].item()}, expected a finite number >= 0")
    return lengths


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    lengths: Tensor | None = None,
    scale: str = "group_std",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantage of each answer relative to the other answers to the same prompt.

        A_i = (r_i - baseline_i) / (std + eps)

        baseline_i = mean of the group ("mean", GRPO), mean of the n - 1 other answers ("leave_one_out", RLOO), or
        sum_j l_j r_j / sum_j l_j over the group with lengths l ("length_weighted", OPO)

    Args:
        rewards: (B,), float. NaN marks an unscorable answer, which does not count in baseline and std and gets 0.
            (P, G) is read as P groups of G when neither `group_size` nor `group_ids` is given.
        group_size: G; answers of one prompt are consecutive. Must divide B.
        group_ids: (B,), int64 or int32, instead of `group_size`. Groups may differ in size and be in any order.
        baseline: "mean", "leave_one_out" or "length_weighted". RLOO and OPO divide by nothing: give `scale="none"`.
        lengths: tokens of each answer, >= 0, in the shape of rewards, integers or float; with "length_weighted" only.
            That of an unscorable answer does not matter. The baseline of a group without a token is 0.
        scale: "group_std"; "batch_std" (std of the whole batch); "none" (Dr. GRPO). Both are about the mean.
        ddof: the std divides by n - ddof; 0 or 1.
        eps: added to the std, >= 0.

    Returns:
        The advantages, in the shape of rewards; float32 (float64 for float64 rewards), not differentiable.
        They are exactly 0 in a group of equal rewards or of one answer.

    Raises:
        TypeError: wrong dtype.
        ValueError: G does not divide B, both or neither of `group_size` and `group_ids`, an infinite reward, an unknown
            scale or baseline, `lengths` missing, negative or not needed.

    Memory: 12 bytes an answer; about 150 with another baseline than the mean, which plain PyTorch computes in float64.

    Equivalent to: `(r - r.view(-1, G).mean(1, keepdim=True)...) / (std + eps)` without its rounding.
    Source: arXiv 2402.03300; scale "none": arXiv 2503.20783; RLOO: arXiv 2402.14740; OPO: arXiv 2505.23585.
    """
    check_floating("rewards", rewards)
    for name, value, known in (("scale", scale, SCALES), ("baseline", baseline, BASELINES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if type(ddof) is not int or ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof!r}, expected 0 or 1")
    eps = check_number("eps", eps, minimum=0.0)
    group_ids, group_size = checked_groups(rewards, tuple(rewards.shape), group_size, group_ids)
    lengths = _checked_lengths(lengths, rewards, baseline)
    flat = rewards.detach().reshape(-1)
    if baseline != "mean" or _dispatch.select(rewards) == "reference":
        result = reference(flat, group_ids, group_size or 1, scale, ddof, eps, baseline, lengths)
    else:
        result = _library.call(
            torch.ops.r1kernels.group_advantages.default,
            flat.float().contiguous(),
            group_ids,
            group_size or 1,
            SCALES.index(scale),
            ddof,
            eps,
        )
    return result.reshape(rewards.shape)
