r"""Filters of tokens and sequences: statistics of the whole batch decide what a policy loss trains on.

Each function returns importance weights, 1 for what is kept and 0 for what is dropped, for the `importance_weights` of
a policy loss. Filters, and `importance_weights`, are combined by multiplication. What is dropped loses its surrogate,
but still counts in the denominator of the loss, and keeps its KL and entropy terms.

From hidden states this takes two steps: statistics of all tokens, without a gradient (1 unit of 2 N H V floating-point
operations), then the loss. Without KL and entropy terms, presets with the ratio of single tokens compute only the kept
share k (3 k units), except for IPO; those with the ratio of sequences compute the sequences that keep a token.
`Objective.token_local` computes every log-prob, and backward products of what is kept (1 + 2 k units); callables
measure every token, too.

The statistics are those of all tokens that are given, and of the ranks of `process_group`: with several micro-batches,
concatenate their values, and split the result. These are a few operations on [tokens], in float64, on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels.ops._checks import as_mask, check_floating, check_number, check_shape, check_tensor
from r1kernels.ops.policy_loss_reference import sequences_of
from r1kernels.ops.sequence_group import checked_sequence_group
from r1kernels.ops.shards import agree, all_gathered, checked_group, refusals

LARGEST_GAP = 1e30  # of a token: sums over a sequence stay finite


def _checked(tokens: dict[str, Any], mask: Any) -> Tensor:
    """Checks tensors with one value per token, and returns the mask, flattened."""
    (name, first), *others = tokens.items()
    check_floating(name, first)
    if first.dim() == 0:
        raise ValueError(f"{name} is 0-d, expected (B, T) or (N,)")
    for other, value in others:
        check_floating(other, value, first)
        check_shape(other, value, first.shape, f"one value per token, like {name}")
    counts = as_mask(mask, first, tuple(first.shape))
    return torch.ones_like(first, dtype=torch.bool).reshape(-1) if counts is None else counts.reshape(-1)


def _of_all_ranks(values: Tensor, group: Any) -> Tensor:
    """(n,): the values (N,) of this rank and of the others, padded with NaN. It synchronises once, to learn how many
    each rank has."""
    if group is None:
        return values
    count = torch.tensor([len(values)], device=values.device)
    longest = max(all_gathered(group, count).flatten().tolist())
    return all_gathered(group, torch.nn.functional.pad(values, (0, longest - len(values)), value=torch.nan)).flatten()


def _sorted(values: Tensor) -> Tensor:
    """The values in ascending order, and at least one NaN behind them."""
    return torch.nn.functional.pad(values, (0, 1), value=torch.nan).sort().values


def high_entropy_filter(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    top: float = 0.2,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Weights that keep the tokens of highest entropy: the forking tokens, at which a text may go on in several ways.

        keep_t = H_t >= quantile(H of all counted tokens, 1 - top)

    Args:
        entropy: (B, T) or packed (N,), float, nats: of `linear_token_logprobs_and_entropy`, for example.
        mask: (B, T) or (N,), True or nonzero = counts. No value behind it matters.
        top: the share of tokens to keep, in (0, 1]. Tokens of equal entropy at the quantile are all kept.
        process_group: ranks with other tokens, over which the quantile goes; all must call.

    Returns:
        Importance weights in the shape of entropy, float32, 1 or 0; 0 behind the mask and where the entropy is NaN.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: 40 bytes a token for a moment, and with a process group 16 bytes for each token of all ranks.

    Equivalent to: `(entropy >= entropy[mask].quantile(1 - top)) & mask`, with the quantile interpolated linearly.
    Source: arXiv 2506.01939 (top 0.2); TRL's `top_entropy_quantile`, whose denominator counts all tokens, too. TRL
    takes the quantile of one micro-batch of all ranks.
    """
    group = checked_group("process_group", process_group)
    with refusals(group, entropy):
        top = check_number("top", top, minimum=0.0, strict=True)
        if top > 1:
            raise ValueError(f"top is {top}, expected a share in (0, 1]")
        counts = _checked({"entropy": entropy}, mask)
    if group is not None:
        agree(group, "process_group", {"top": top}, entropy.device)
    values = torch.where(counts, entropy.detach().double().reshape(-1), torch.nan)
    ordered = _sorted(_of_all_ranks(values, group))
    place = (1 - top) * ((~ordered.isnan()).sum() - 1).clamp(min=0).double()  # a number times integers is float32
    place = torch.where((place - place.round()).abs() < 1e-9 * (1 + place), place.round(), place)  # 1 - top is rounded
    # No value lies between the two neighbours of the quantile, so the upper one is the limit, also if it is inf.
    kept = values >= ordered.gather(0, place.ceil().long()[None])
    return kept.float().reshape(entropy.shape)


def off_policy_filter(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
    sequence_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Weights that drop sequences of negative advantage from which the policy has moved too far away.

        drop = A < 0 and mean_t(l_old - l) > threshold

    Args:
        logprobs: (B, T) or packed (N,), float: log-probs by the policy that is trained, in nats; no gradient.
        old_logprobs: the same shape: log-probs by the policy that sampled.
        advantages: (B,) or (S,) per sequence, or one per token.
        mask: (B, T) or (N,), True or nonzero = counts. No value behind it matters.
        threshold: delta, in nats, >= 0.
        cu_seqlens: (S + 1,), int64 or int32; required for packed tokens.
        sequence_group: as in `policy_loss`: ranks with other tokens of the same sequences.

    Returns:
        Importance weights in the shape of advantages, float32, 1 or 0. A sequence without counted tokens is kept. A
        difference that is NaN counts as 0: it is no evidence.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: about 60 bytes a token for a moment.

    Equivalent to: `(advantages >= 0) | ((old_logprobs - logprobs).mean(1) <= threshold)`.
    Source: DeepSeek-V3.2, arXiv 2512.02556, eq. 9; TRL's `off_policy_mask_threshold`.
    """
    group = checked_sequence_group(sequence_group)
    with refusals(group, logprobs):
        threshold = check_number("threshold", threshold, minimum=0.0)
        counts = _checked({"logprobs": logprobs, "old_logprobs": old_logprobs}, mask)
        sequences = sequences_of("logprobs", logprobs, cu_seqlens, "means over sequences", group)
        check_floating("advantages", advantages, logprobs)
        of_sequences = tuple(logprobs.shape[:-1]) if cu_seqlens is None else (sequences.count,)
        if advantages.shape not in (of_sequences, logprobs.shape):
            raise ValueError(f"advantages has shape {tuple(advantages.shape)}, expected {of_sequences} (one per "
                             f"sequence) or {tuple(logprobs.shape)} (one per token)")
    if group is not None:
        agree(group, "sequence_group", {"threshold": threshold, "sequences": sequences.count}, logprobs.device)
    gap = (old_logprobs.detach().double() - logprobs.detach().double()).reshape(-1)
    gap = torch.where(counts & ~gap.isnan(), gap.clamp(-LARGEST_GAP, LARGEST_GAP), 0)
    near = sequences.sum(gap) / sequences.lengths(counts.double()) <= threshold
    near = (near if advantages.shape == of_sequences else near[sequences.index]).reshape(advantages.shape)
    return ((advantages.detach() >= 0) | near).float()


def clip_cov_filter(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Weights that drop a few of the tokens by which an update would lower the entropy most (Clip-Cov).

    cov_t = (l_t - mean l) (A_t - mean A); of the tokens with low < cov_t < high, max(floor(share n), 1) are dropped,
    drawn at random, or all if there are fewer; n is the number of counted tokens. A token whose log-prob or advantage
    is not finite has no covariance: it is kept, and counts neither in the means nor in n.

    Args:
        logprobs: (B, T) or packed (N,), float, nats; no gradient.
        advantages: the same shape: one per token (`advantages[:, None].expand_as(logprobs)` for those of sequences).
        mask: (B, T) or (N,), True or nonzero = counts. No value behind it matters.
        share: of the counted tokens, in (0, 1].
        low, high: bounds of the covariance; low < high. high may be inf.
        generator: draws on the device of logprobs; None for torch's own. Ranks need different seeds.
        process_group: ranks with other tokens, over which means and the draw go; all must call.

    Returns:
        Importance weights in the shape of logprobs, float32, 1 or 0; 1 behind the mask.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: about 80 bytes a token for a moment, and with a process group 16 bytes for each token of all ranks.

    Source: arXiv 2505.22617, eq. 11; verl's "clip_cov", which also leaves out tokens that the clip of the ratio holds.
    """
    group = checked_group("process_group", process_group)
    with refusals(group, logprobs):
        share, low = check_number("share", share, minimum=0.0, strict=True), check_number("low", low)
        if share > 1:
            raise ValueError(f"share is {share}, expected one in (0, 1]")
        if isinstance(high, bool) or not isinstance(high, (int, float)) or not high > low:
            raise ValueError(f"high is {high!r}, expected a number > low = {low}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is {generator!r}, expected a torch.Generator")
        check_tensor("advantages", advantages)
        counts = _checked({"logprobs": logprobs, "advantages": advantages}, mask)
        counts = counts & (logprobs.isfinite() & advantages.isfinite()).reshape(-1)
    if group is not None:
        agree(group, "process_group", {"share": share, "low": low, "high": float(high)}, logprobs.device)
    flat = [torch.where(counts, value.detach().double().reshape(-1), 0) for value in (logprobs, advantages)]
    sums = torch.stack([counts.double().sum(), *(value.sum() for value in flat)])
    if group is not None:
        sums = all_gathered(group, sums).sum(0)
    n, *totals = sums.unbind()
    covariance = torch.ones_like(flat[0])
    for value, total in zip(flat, totals, strict=True):
        covariance = covariance * (value - total / n.clamp(min=1))
    candidate = counts & (covariance > low) & (covariance < high)
    drawn = torch.rand(candidate.shape, dtype=torch.float64, device=candidate.device, generator=generator)
    drawn = torch.where(candidate, drawn, torch.inf)
    ordered = _sorted(_of_all_ranks(drawn, group))
    last = ((share * n).floor().clamp(min=1).long() - 1).clamp(max=len(ordered) - 1)
    return (~candidate | (drawn > ordered.gather(0, last[None]))).float().reshape(logprobs.shape)
