r"""Group-relative advantages: A = (r - mean) / (std + eps) over the answers to one prompt.

A group whose rewards are all equal has advantage exactly 0 (max = min decides, not rounded arithmetic: in fp32
the mean of 0.1, 0.1, 0.1 is not 0.1, and dividing by a tiny std turns that into a large advantage).
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops._checks import check_floating, check_number, check_shape, ids_int64, values_are_free

SCALES = ("group_std", "batch_std", "none")


def _moments(rewards: Tensor, groups: Tensor, count: int, ddof: int) -> tuple[Tensor, Tensor]:
    """(mean, std) of each group's scorable rewards. Where all are equal, std is exactly 0 and the mean is exact."""
    scorable = ~rewards.isnan()
    safe = torch.where(scorable, rewards, 0)
    zeros = rewards.new_zeros(count)
    n = zeros.index_add(0, groups, scorable.to(rewards.dtype))
    low = zeros.scatter_reduce(0, groups, torch.where(scorable, rewards, torch.inf), "amin", include_self=False)
    high = zeros.scatter_reduce(0, groups, torch.where(scorable, rewards, -torch.inf), "amax", include_self=False)
    constant = low >= high
    mean = torch.where(constant, low, zeros.index_add(0, groups, safe) / n.clamp(min=1))
    centred = torch.where(scorable, safe - mean[groups], 0)
    variance = zeros.index_add(0, groups, centred.square()) / (n - ddof).clamp(min=1)
    return mean, torch.where(constant, 0, variance.sqrt())


def reference(
    rewards: Tensor, group_ids: Tensor | None, group_size: int, scale: str, ddof: int, eps: float
) -> Tensor:
    """The same in plain PyTorch, in float64 inside."""
    if values_are_free(rewards) and rewards.isinf().any():
        position = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"rewards[{position}] is {float(rewards[position])}, expected a finite number, or NaN for "
                         "unscorable")
    r = rewards.double()
    if group_ids is None:
        groups, count = torch.arange(len(r), device=r.device) // group_size, len(r) // max(group_size, 1)
    else:
        names, groups = torch.unique(group_ids, return_inverse=True)
        count = len(names)
    mean, std = _moments(r, groups, count, ddof)
    centred = r - mean[groups]
    if scale == "group_std":
        centred = centred / (std[groups] + eps)
    elif scale == "batch_std":
        centred = centred / (_moments(r, torch.zeros_like(groups), 1, ddof)[1] + eps)
    exact_zero = rewards.isnan() | (r == mean[groups])
    return torch.where(exact_zero, 0, centred).to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: str = "group_std",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantage of each answer relative to the other answers to the same prompt.

    A_i = (r_i - mean_group) / (std + eps)

    Args:
        rewards: (B,), float. NaN marks an unscorable answer, which does not count in mean and std and gets 0.
            (P, G) is read as P groups of G when neither `group_size` nor `group_ids` is given.
        group_size: G; answers of one prompt are consecutive. Must divide B.
        group_ids: (B,), int64 or int32, instead of `group_size`. Groups may differ in size and be in any order.
        scale: "group_std"; "batch_std" (group mean, std of the whole batch); "none" (Dr. GRPO).
        ddof: the std divides by n - ddof; 0 or 1.
        eps: added to the std, >= 0.

    Returns:
        The advantages, in the shape of rewards; float32 (float64 for float64 rewards), not differentiable.
        They are exactly 0 in a group of equal rewards or of one answer.

    Raises:
        TypeError: wrong dtype. ValueError: G does not divide B, both or neither of `group_size` and `group_ids`,
        an infinite reward, an unknown scale.

    Memory: 12 bytes an answer.

    Equivalent to: `(r - r.view(-1, G).mean(1, keepdim=True)...) / (std + eps)` without its rounding.
    Source: arXiv 2402.03300; scale "none": arXiv 2503.20783.
    """
    check_floating("rewards", rewards)
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    if not isinstance(ddof, int) or ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof!r}, expected 0 or 1")
    eps = check_number("eps", eps, minimum=0.0)
    if group_ids is None and group_size is None and rewards.dim() == 2:
        group_size = rewards.shape[1]
    elif rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (B,), or (P, G) without group_size")
    if (group_ids is None) == (group_size is None):
        given = "neither" if group_ids is None else "both"
        raise ValueError(f"{given} of group_size and group_ids given, expected exactly one")
    count = rewards.numel()
    if group_ids is not None:
        group_ids = ids_int64("group_ids", group_ids, rewards)
        check_shape("group_ids", group_ids, rewards.shape, "one group id per reward")
    elif isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1 or count % group_size:
        raise ValueError(f"group_size is {group_size!r}, expected a positive integer that divides the {count} rewards")
    flat = rewards.detach().reshape(-1)
    if _dispatch.select(rewards) == "reference":
        result = reference(flat, group_ids, group_size or 1, scale, ddof, eps)
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
