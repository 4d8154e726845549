r"""Advantages for pass@k: what an answer adds to the best of k answers, over all choices of k answers of its group.

Sort the n scorable rewards of a group, r_1 <= ... <= r_n. The best of a random subset of k answers is r_j with
probability C(j-1, k-1) / C(n, k); of a random subset that has answer i, it is r_i with probability
C(i-1, k-1) / C(n-1, k-1), and r_j, j > i, with C(j-2, k-2) / C(n-1, k-1). So means over all subsets cost a sort and
sums over a group: no subset is drawn. These are a few operations on B numbers, which plain PyTorch computes in float64
on any device, without a synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels.ops._checks import check_floating, check_number, values_are_free
from r1kernels.ops.group_advantages import check_finite, checked_groups, groups_of


def _choose(n: Tensor, k: int) -> Tensor:
    """log C(n, k); -inf where n < k."""
    valid = (n >= k) & (k >= 0)
    safe = torch.where(valid, n, k).double()
    log = torch.lgamma(safe + 1) - torch.lgamma(safe - k + 1) - torch.lgamma(torch.full_like(safe, k + 1.0))
    return torch.where(valid, log, -torch.inf)


def _sums_after(values: Tensor, groups: Tensor, position: Tensor, largest: int) -> Tensor:
    """The sum of the values after each one in its group of at most `largest`. Groups are consecutive, and do not share
    partial sums, so that the others do not change the bits of a group."""
    total, step = values, 1
    while step < largest:
        ahead = position + step
        inside = ahead < len(values)
        ahead = torch.where(inside, ahead, position)
        total = total + torch.where(inside & (groups[ahead] == groups), total[ahead], 0)
        step *= 2
    return total - values


def _last_of_equals(r: Tensor, groups: Tensor, position: Tensor) -> Tensor:
    """The position of the last equal reward of the group, so that equal rewards get the same bits."""
    changes = (r[1:] != r[:-1]) | (groups[1:] != groups[:-1])
    runs = torch.nn.functional.pad(changes, (1, 0))[: len(r)].cumsum(0)
    return torch.zeros_like(position).scatter_reduce(0, runs, position, "amax")[runs]


def reference(rewards: Tensor, group_ids: Tensor | None, group_size: int, k: int, eps: float) -> Tensor:
    """The advantages (B,) in float64."""
    check_finite(rewards)
    groups, count = groups_of(rewards, group_ids, group_size)
    order = rewards.double().argsort(stable=True)  # NaN comes last
    order = order[groups[order].argsort(stable=True)]
    groups, r, position = groups[order], rewards.double()[order], torch.arange(len(rewards), device=rewards.device)
    scorable, zeros = ~r.isnan(), r.new_zeros(count)

    def of_group(values: Tensor) -> Tensor:
        return zeros.index_add(0, groups, values)[groups]

    n = of_group(scorable.double())
    first = torch.full_like(groups, len(rewards)).scatter_reduce(0, groups, position, "amin")[groups]
    rank = position - first + 1  # 1 for the smallest reward of the group
    last = (first + n.long() - 1).clamp(min=0)
    # The smallest possible best answer. If it equals the largest, then every subset has the same best reward. With at
    # most k scorable answers, both are the last one.
    flat = r[torch.minimum(first + k - 1, last)] == r[last]
    counts = scorable & ~flat
    r = torch.where(counts, r - r[first], 0)  # from the smallest reward: equal rewards are exactly 0

    def expected(values: Tensor) -> Tensor:
        """The mean over the best answers of all subsets."""
        chance = (_choose(rank - 1, k - 1) - _choose(n, k)).exp()
        return of_group(torch.where(counts, chance * values, 0))

    mean = expected(r)
    std = expected((r - mean).square()).sqrt()
    with_it = _choose(n - 1, k - 1)
    later = torch.where(counts, (_choose(rank - 2, k - 2) - with_it).exp() * r, 0)
    best = (_choose(rank - 1, k - 1) - with_it).exp() * r + _sums_after(
        later, groups, position, len(r) if group_ids is not None else group_size)
    best = best[_last_of_equals(r, groups, position)]
    advantages = torch.where(counts, (best - mean) / (torch.where(counts, std, 1) + eps), 0)
    return torch.empty_like(advantages).scatter(0, order, advantages)


def pass_at_k_advantages(
    rewards: Tensor,
    k: int,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantage of each answer for the best reward among k answers to the same prompt (pass@k training).

        A_i = (E[max_S r | i in S] - E[max_S r]) / (std[max_S r] + eps), S = all subsets of k answers of the group

    With rewards 0 and 1 these are the closed formulas of the paper; with k = 1, `group_advantages` with ddof 0.

    Args:
        rewards: (B,), float. NaN marks an unscorable answer, which is in no subset and gets 0. (P, G) is read as P
            groups of G when neither `group_size` nor `group_ids` is given.
        k: answers of a subset, >= 1 and less than `group_size`, or, on CPUs, than the size of the largest group.
        group_size: G; answers of one prompt are consecutive. Must divide B.
        group_ids: (B,), int64 or int32, instead of `group_size`. Groups may differ in size and be in any order.
        eps: added to the std, >= 0.

    Returns:
        The advantages, in the shape of rewards; float32 (float64 for float64 rewards), not differentiable. They are
        exactly 0 in a group where every subset has the same best reward, and in a group of at most k scorable answers.

    Raises:
        TypeError: wrong dtype.
        ValueError: k out of range, G does not divide B, both or neither of `group_size` and `group_ids`, an infinite
            reward.

    Memory: about 300 bytes an answer.

    Equivalent to: the mean, over all subsets that have the answer, of their largest reward, minus the mean over all
    subsets, divided by the standard deviation over all subsets (ddof 0) + eps.
    Source: arXiv 2508.10751 for rewards 0 and 1. (verl's "grpo_passk" is arXiv 2503.19595: only the best
    of all G answers gets an advantage.)
    """
    check_floating("rewards", rewards)
    eps = check_number("eps", eps, minimum=0.0)
    group_ids, group_size = checked_groups(rewards, tuple(rewards.shape), group_size, group_ids)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or (group_size is not None and k >= group_size):
        limit = "" if group_size is None else f" and < group_size = {group_size}"
        raise ValueError(f"k is {k!r}, expected an integer >= 1{limit}")
    if group_ids is not None and len(group_ids) and values_are_free(group_ids):
        largest = int(group_ids.unique(return_counts=True)[1].max())
        if k >= largest:
            raise ValueError(f"k is {k}, expected fewer than the {largest} answers of the largest group of group_ids")
    result = reference(rewards.detach().reshape(-1), group_ids, group_size or 1, k, eps)
    return result.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32).reshape(rewards.shape)
