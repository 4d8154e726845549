r"""Importance weights: a correction of the gap between the policy that sampled and the one that is trained.

Inference engines round differently from trainers, and asynchronous ones sample from older weights. The surrogate of a
token, or of a sequence, is multiplied by pi / mu, where pi is the trainer's policy before its first update and mu is
the sampler's. Large weights are noise, so they are truncated, or what they weigh is left out.

These are a few operations on B x T numbers, which plain PyTorch computes in float64 on any device, without a
synchronisation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels.ops._checks import as_mask, check_floating, check_number, check_shape
from r1kernels.ops.policy_loss_reference import Sequences, sequences_of
from r1kernels.ops.shards import agree, all_gathered, checked_group, refusals

LEVELS = ("token", "sequence", "sequence_mean")
MODES = ("truncate", "mask")
LARGEST = 80.0  # log of the largest weight: its square is finite in float64, and itself in float32
LARGEST_GAP = 1e30  # of a token: sums over a sequence stay finite


class ImportanceWeights(NamedTuple):
    """`weights` of tokens or sequences, and `metrics`, 0-d float32 tensors on the device."""

    weights: Tensor
    metrics: dict[str, Tensor]


class _Sums(NamedTuple):
    """Numbers that add up over ranks, and in the last place one whose maximum counts."""

    tokens: Tensor
    gap: Tensor
    absolute_gap: Tensor
    k3: Tensor
    nan_tokens: Tensor
    counted: Tensor
    weights: Tensor
    squares: Tensor
    outside: Tensor
    largest_gap: Tensor


def _over_ranks(sums: _Sums, group: Any) -> _Sums:
    if group is None:
        return sums
    ranks = all_gathered(group, torch.stack(list(sums)))
    return _Sums(*ranks[:, :-1].sum(0).unbind(), largest_gap=ranks[:, -1].amax())


def _metrics(sums: _Sums) -> dict[str, Tensor]:
    tokens, count = sums.tokens.clamp(min=1), sums.counted.clamp(min=1)
    metrics = {
        "importance_mean": sums.weights / count,
        "importance_cut": sums.outside / count,
        "importance_ess": sums.weights.square() / torch.where(sums.squares > 0, count * sums.squares, 1),
        "logprob_gap_mean": sums.absolute_gap / tokens,
        "logprob_gap_max": sums.largest_gap,
        "rollout_kl_k1": -sums.gap / tokens,
        "rollout_kl_k3": sums.k3 / tokens,
        "nan_tokens": sums.nan_tokens,
    }
    return {name: value.float() for name, value in metrics.items()}


def importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    level: str = "token",
    mode: str = "truncate",
    floor: float = 0.0,
    cap: float = 2.0,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> ImportanceWeights:
    r"""Weights pi / mu that make samples of the sampler's policy mu count as those of the trainer's policy pi.

    d_t = old_logprobs_t - sampler_logprobs_t;  w = exp(d_t) ("token"), exp(sum_t d_t) ("sequence"), or
    exp(mean_t d_t) ("sequence_mean": the geometric mean of the token weights)
    "truncate": min(max(w, floor), cap);  "mask": w if floor <= w <= cap, else 0

    Args:
        old_logprobs: (B, T), or packed (N,), float: log-probs by the trainer's policy before its updates, in nats, as
            `policy_loss` gets them.
        sampler_logprobs: the same shape: log-probs by the policy that sampled, at the same temperature.
        mask: (B, T) or (N,), True or nonzero = counts. No value behind it matters.
        level: "token" (low variance, biased), "sequence" (the exact weight, of high variance) or "sequence_mean".
        mode: "truncate" (TIS), or "mask" (MIS, IcePop), which leaves out what is outside of [floor, cap].
        floor: smallest weight, >= 0.
        cap: largest weight, > 0 and >= floor; inf for no limit.
        normalize: divide by the mean weight of all counted tokens, or of all sequences with a counted token, after
            `mode`: a weight may then exceed `cap`.
        cu_seqlens: (S + 1,), int64 or int32, of packed tokens; required for weights of sequences.
        process_group: ranks with other sequences, over which `normalize` and the metrics go; all must call.

    Returns:
        `weights`: float32, no gradient, never NaN or inf: (B, T) or (N,) of tokens, 0 behind the mask; (B,) or (S,) of
        sequences, 1 for one without a counted token. `policy_loss` takes either. Equal log-probs weigh exactly 1
        before `normalize`, also if both are -inf. Logs of weights above 80 count as 80. A log-prob that is NaN or
        +inf makes the weight of its token, or sequence, 0.
        `metrics`, before `normalize`: "importance_mean"; "importance_cut", the share outside of [floor, cap];
        "importance_ess", the effective sample size (sum w)^2 / (n sum w^2), 0 if all are 0; "logprob_gap_mean" and
        "logprob_gap_max" of abs(d); "rollout_kl_k1" and "rollout_kl_k3", estimates of KL(mu || pi); "nan_tokens",
        those with NaN or +inf. They are 0 if nothing counts. A log-prob of -inf makes the gap's 1e30 or infinite.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: about 80 bytes a token for a moment. With a process group, two all-gathers of 80 and 96 bytes.

    Equivalent to: for tokens, `(old_logprobs - sampler_logprobs).exp().clamp(floor, cap)`.
    Source: truncation: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
    masks: Liu et al. 2025, "When speed kills stability", and IcePop, arXiv 2510.18855; the geometric mean:
    arXiv 2507.18071.
    """
    group = checked_group("process_group", process_group)
    with refusals(group, old_logprobs):
        floor, cap = _checked_options(level, mode, floor, cap, normalize)
        check_floating("old_logprobs", old_logprobs)
        check_floating("sampler_logprobs", sampler_logprobs, old_logprobs)
        shape = tuple(old_logprobs.shape)
        if shape == ():
            raise ValueError("old_logprobs is 0-d, expected (B, T) or (N,)")
        check_shape("sampler_logprobs", sampler_logprobs, shape, "one log-prob per token")
        counts = as_mask(mask, old_logprobs, shape)
        sequences = _sequences(old_logprobs, cu_seqlens, level)
    if group is not None:
        options = {"level": level, "mode": mode, "floor": floor, "cap": cap, "normalize": normalize}
        agree(group, "process_group", options, old_logprobs.device)

    old, sampler = (value.detach().double().reshape(-1) for value in (old_logprobs, sampler_logprobs))
    counts = torch.ones_like(old, dtype=torch.bool) if counts is None else counts.reshape(-1)
    gap = torch.where(counts & (old != sampler), old - sampler, 0)
    bad = gap.isnan() | (counts & ((old == torch.inf) | (sampler == torch.inf)))  # no log of a probability is +inf
    gap = torch.where(bad, 0, gap).clamp(max=LARGEST_GAP)
    measured = counts & ~bad

    if sequences is None:
        log_weights, counted, broken = gap, counts, bad
    else:
        lengths = sequences.sum(counts.double())
        log_weights = sequences.sum(gap) / (lengths.clamp(min=1) if level == "sequence_mean" else 1)
        counted, broken = lengths > 0, sequences.sum(bad.double()) > 0
    weights = log_weights.clamp(max=LARGEST).exp()
    inside = (weights >= floor) & (weights <= cap) & ~broken
    weights = weights.clamp(floor, cap) if mode == "truncate" else torch.where(inside, weights, 0)
    weights = torch.where(broken, 0, weights)

    used = torch.where(counted, weights, 0)
    sums = _over_ranks(_Sums(
        tokens=measured.double().sum(), gap=gap.sum(), absolute_gap=gap.abs().sum(), k3=(gap.expm1() - gap).sum(),
        nan_tokens=bad.double().sum(), counted=counted.double().sum(), weights=used.sum(), squares=used.square().sum(),
        outside=(counted & ~inside).double().sum(),
        largest_gap=torch.nn.functional.pad(gap.abs(), (0, 1)).amax(),
    ), group)
    if normalize:
        used = used / torch.where(sums.weights > 0, sums.weights, 1) * sums.counted  # quotients are at most 1
    if sequences is not None:
        used = torch.where(counted, used, 1)
    result_shape = shape if sequences is None else shape[:-1] if cu_seqlens is None else (sequences.count,)
    return ImportanceWeights(used.float().reshape(result_shape), _metrics(sums))


def _checked_options(level: Any, mode: Any, floor: Any, cap: Any, normalize: Any) -> tuple[float, float]:
    for name, value, known in (("level", level, LEVELS), ("mode", mode, MODES)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize is {normalize!r}, expected True or False")
    floor = check_number("floor", floor, minimum=0.0)
    cap = math.inf if isinstance(cap, float) and cap == math.inf else check_number("cap", cap, minimum=0.0, strict=True)
    if floor > min(cap, math.exp(LARGEST)):
        raise ValueError(f"floor is {floor}, expected at most cap = {cap} and e^{LARGEST:g}")
    return floor, cap


def _sequences(logprobs: Tensor, cu_seqlens: Any, level: str) -> Sequences | None:
    """The sequences of the tokens, or None for weights of tokens."""
    if level == "token" and cu_seqlens is None:
        return None
    sequences = sequences_of("old_logprobs", logprobs, cu_seqlens, f"weights of level {level!r}")
    return None if level == "token" else sequences
