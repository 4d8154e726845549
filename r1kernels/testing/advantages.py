"""Oracles of advantages, in exact fractions, and of importance weights, in Python floats. They share no code with
`r1kernels.ops`: subsets are enumerated, and tokens are visited in a loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def _moments(values: Sequence[Fraction], ddof: int) -> tuple[Fraction, float]:
    mean = Fraction(sum(values), max(len(values), 1))
    return mean, math.sqrt(Fraction(sum((r - mean) ** 2 for r in values), max(len(values) - ddof, 1)))


def _scorable(rewards: Tensor, group_ids: Tensor) -> tuple[dict[int, Fraction], dict[int, list[int]]]:
    """The rewards that are not NaN, by answer, and the answers of each group that have one."""
    values, members = {}, {}
    for i, (reward, group) in enumerate(zip(rewards.double().tolist(), group_ids.tolist(), strict=True)):
        if not math.isnan(reward):
            values[i] = Fraction(reward)
            members.setdefault(group, []).append(i)
    return values, members


def group_advantages(
    rewards: Tensor, group_ids: Tensor, scale: str = "group_std", ddof: int = 1, eps: float = 1e-4,
    baseline: str = "mean", lengths: Tensor | None = None,
) -> Tensor:
    """(r - baseline) / (std + eps) with exact baselines: a constant group has exactly the baseline r and std 0."""
    values, members = _scorable(rewards, group_ids)
    batch_std = _moments(list(values.values()), ddof)[1]
    result = torch.zeros(len(rewards), dtype=torch.float64)
    for group in members.values():
        std = _moments([values[j] for j in group], ddof)[1]
        for i in group:
            weights = dict.fromkeys(group, Fraction(1))
            if baseline == "leave_one_out" and len(group) > 1:
                del weights[i]
            elif lengths is not None:
                weights = {j: Fraction(lengths[j].item()) for j in group}
                if sum(weights.values()) == 0:  # 0 is the baseline, unless all rewards are equal
                    weights = dict.fromkeys(group, Fraction(len({values[j] for j in group}) == 1))
            total = sum(weights.values()) or 1
            centred = float(values[i] - sum(w * values[j] for j, w in weights.items()) / total)
            denominator = {"group_std": std + eps, "batch_std": batch_std + eps, "none": 1.0}[scale]
            result[i] = centred / denominator if centred else 0.0
    return result


def multi_reward_advantages(
    rewards: Tensor, group_ids: Tensor, weights: Sequence[float], ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """The weighted sum of each reward's advantages, normalised over the answers that have any reward."""
    columns = [group_advantages(column, group_ids, ddof=ddof, eps=eps) for column in rewards.unbind(1)]
    total = sum(weight * column for weight, column in zip(weights, columns, strict=True))
    total = torch.where(rewards.isnan().all(1), math.nan, total)
    return group_advantages(total, torch.zeros_like(group_ids), ddof=ddof, eps=eps)


def pass_at_k_advantages(rewards: Tensor, group_ids: Tensor, k: int, eps: float = 1e-4) -> Tensor:
    """The mean over all subsets with an answer minus the mean over all subsets, over their std + eps."""
    values, members = _scorable(rewards, group_ids)
    result = torch.zeros(len(rewards), dtype=torch.float64)
    for group in members.values():
        best = {subset: max(values[j] for j in subset) for subset in itertools.combinations(group, k)}
        mean, std = _moments(list(best.values()), 0)
        for i in group if best else ():
            having = [value for subset, value in best.items() if i in subset]
            centred = float(_moments(having, 0)[0] - mean)
            result[i] = centred / (std + eps) if centred else 0.0
    return result


def importance_weights(
    old: Tensor, sampler: Tensor, mask: Tensor, sequences: Sequence[Sequence[int]], level: str, mode: str, floor: float,
    cap: float, normalize: bool = False,
) -> tuple[list[float], dict[str, float]]:
    """The weights of all tokens, or of all sequences, given by their flat positions; and the metrics."""
    places = mask.flatten().nonzero().flatten().tolist()
    gap = {t: old.flatten()[t].item() - sampler.flatten()[t].item() for t in places}
    counted = [[t for t in tokens if t in gap] for tokens in sequences]
    if level == "token":
        logs = [gap.get(t) for t in range(mask.numel())]
    else:
        sums = [math.fsum(gap[t] for t in tokens) if tokens else None for tokens in counted]
        logs = [d if d is None or level == "sequence" else d / len(tokens)
                for d, tokens in zip(sums, counted, strict=True)]
    raw = [None if d is None else math.exp(d) for d in logs]
    clipped = {"truncate": lambda w: min(max(w, floor), cap), "mask": lambda w: w if floor <= w <= cap else 0.0}[mode]
    used = [clipped(w) for w in raw if w is not None]
    metrics = {
        "importance_mean": math.fsum(used) / len(used),
        "importance_cut": sum(not floor <= w <= cap for w in raw if w is not None) / len(used),
        "importance_ess": math.fsum(used) ** 2 / math.fsum(w * w for w in used) / len(used),
        "logprob_gap_mean": math.fsum(map(abs, gap.values())) / len(gap),
        "logprob_gap_max": max(map(abs, gap.values())),
        "rollout_kl_k1": -math.fsum(gap.values()) / len(gap),
        "rollout_kl_k3": math.fsum(math.expm1(d) - d for d in gap.values()) / len(gap),
        "nan_tokens": 0.0,
    }
    factor = 1 / metrics["importance_mean"] if normalize else 1.0
    absent = 0.0 if level == "token" else 1.0
    return [absent if w is None else clipped(w) * factor for w in raw], metrics
