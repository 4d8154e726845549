"""The policy loss in plain differentiable PyTorch: on any device, also in float64, and for callable objectives.

Masked tokens are replaced before any exponential, and clipped tokens are selected by predicates. So neither the loss
nor autograd's gradient computes inf * 0.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.objectives import Objective
from r1kernels.ops import kl_estimate
from r1kernels.ops._checks import check_positive, values_are_free
from r1kernels.ops.sequence_group import sum_over_ranks


class PolicyBatch(NamedTuple):
    """The inputs of a policy loss other than the log-probs; absent inputs are None.

    A custom objective receives it with `advantages` and `importance_weights` expanded to one per token. All values
    behind the mask are replaced by 0.
    """

    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    importance_weights: Tensor | None


class Sequences:
    """Gives the sequence of each token of the flattened batch, and sums over sequences. With a group, its ranks have
    other tokens of the same sequences."""

    def __init__(self, logprobs: Tensor, cu_seqlens: Tensor | None, group: Any = None) -> None:
        self.group = group
        self._lengths: Tensor | None = None
        n, device = logprobs.numel(), logprobs.device
        self.packed = cu_seqlens is not None
        if cu_seqlens is not None:
            _check_cu_seqlens(cu_seqlens, n)
            self.count = len(cu_seqlens) - 1
            self.index = torch.searchsorted(cu_seqlens[1:], torch.arange(n, device=device), right=True)
        else:
            length = logprobs.shape[-1]
            self.count = logprobs.shape[:-1].numel()
            self.index = torch.arange(n, device=device) // max(length, 1)

    def per_token(self, value: Tensor, shape: torch.Size) -> Tensor:
        """The values, flattened; a value per sequence is repeated. If S = N (packed), the values are per sequence."""
        given_per_token = value.shape == shape and not (self.packed and value.numel() == self.count)
        return value.reshape(-1) if given_per_token else value.reshape(-1)[self.index]

    def sum(self, per_token: Tensor) -> Tensor:
        return self.whole(per_token.new_zeros(self.count).index_add(0, self.index, per_token))

    def lengths(self, counts: Tensor) -> Tensor:
        """The number of counted tokens of each sequence, at least 1. `counts` is the same in all calls."""
        if self._lengths is None:
            self._lengths = self.sum(counts).clamp(min=1)
        return self._lengths

    def whole(self, value: Tensor) -> Tensor:
        """The sum of the values of all ranks that have these sequences."""
        return value if self.group is None else sum_over_ranks(value, self.group)


def _check_cu_seqlens(cu_seqlens: Tensor, n: int) -> None:
    if not values_are_free(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != n:
        raise ValueError(f"cu_seqlens runs from {values[0]} to {values[-1]}, expected 0 to N = {n}")
    for s, (a, b) in enumerate(itertools.pairwise(values)):
        if b < a:
            raise ValueError(f"cu_seqlens[{s + 1}] is {b}, expected no less than cu_seqlens[{s}] = {a}")


class _Surrogate(NamedTuple):
    loss: Tensor
    active: Tensor  # the surrogate has a gradient
    clipped_low: Tensor
    clipped_high: Tensor
    capped: Tensor


def _surrogate(objective: Objective, log_ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> _Surrogate:
    def variable(number: float) -> float | Tensor:
        """A tensor in a compiled graph, which keeps a number as a constant in `masked_fill` and `clamp`."""
        return _library.as_tensor(number, logprobs.dtype, logprobs.device) if torch.compiler.is_compiling() else number

    ratio = log_ratio.detach().exp()
    nonzero = advantages != 0
    never = torch.zeros_like(nonzero)
    high = variable(1 + objective.clip_high)
    if objective.surrogate == "clip":
        low = variable(1 - objective.clip_low)
        cap = variable(torch.inf if objective.ratio_cap is None else objective.ratio_cap)
        clipped_high = (advantages > 0) & (ratio > high)
        clipped_low = (advantages < 0) & (ratio < low)
        capped = (advantages < 0) & (ratio > cap)
        flows = nonzero & ~(clipped_high | clipped_low | capped)
        # Filled in the dtype of the ratio: a choice between two Python numbers would be rounded to float32.
        bound = torch.zeros_like(ratio).masked_fill(capped, cap).masked_fill(clipped_low, low)
        bound = bound.masked_fill(clipped_high, high)
        r = torch.where(flows, torch.where(flows, log_ratio, 0).exp(), bound)
        return _Surrogate(-r * advantages, flows, clipped_low, clipped_high, capped)
    if objective.surrogate == "cispo":
        clipped = nonzero & (ratio > high)
        weight = torch.where(nonzero, ratio.clamp(max=high), 0) * advantages
        loss = torch.where(weight == 0, 0, -weight * torch.where(weight == 0, 0, logprobs))
        return _Surrogate(loss, weight != 0, never, clipped, never)
    if objective.surrogate == "sapo":
        tau = torch.ones_like(ratio) * variable(objective.tau_neg)
        tau = tau.masked_fill(advantages > 0, variable(objective.tau_pos))
        gate = torch.sigmoid(tau * (log_ratio.clamp(max=80).exp() - 1))  # flat long before the clamp
        loss = torch.where(nonzero, -4 / tau * gate * advantages, 0)
        return _Surrogate(loss, nonzero & ((gate * (1 - gate)).detach() != 0), never, never, never)
    loss = torch.where(nonzero, -advantages * torch.where(nonzero, logprobs, 0), 0)
    return _Surrogate(loss, nonzero, never, never, never)


def reduction_weights(
    objective: Objective, counts: Tensor, sequences: Sequences, normalizer: Tensor | None
) -> Tensor:
    """Reduction weight of each counted token."""
    number = max(sequences.count, 1)
    if objective.aggregate == "token_mean":
        denominator = sequences.whole(counts.sum()).clamp(min=1) if normalizer is None else normalizer
        return counts / denominator
    if objective.aggregate == "constant":
        denominator = number * float(objective.max_length or 1) if normalizer is None else normalizer
        return counts / denominator
    return counts / (sequences.lengths(counts)[sequences.index] * (number if normalizer is None else normalizer))


def reference(
    logprobs: Tensor, batch: PolicyBatch, normalizer: Tensor | None, objective: Objective, group: Any = None
) -> tuple[Tensor, Tensor]:
    """(loss, metrics in the order of METRICS), computed with autograd in the dtype of logprobs. With a `group`, of this
    rank's tokens of sequences that are split over its ranks."""
    shape = logprobs.shape
    check_positive("normalizer", normalizer)
    sequences = Sequences(logprobs, batch.cu_seqlens, group)
    mask = torch.ones_like(logprobs, dtype=torch.bool) if batch.mask is None else batch.mask
    mask = mask.reshape(-1)
    counts = mask.to(logprobs.dtype)

    def counted(value: Tensor | None) -> Tensor | None:
        """The value flattened, 0 behind the mask."""
        return None if value is None else torch.where(mask, value.reshape(-1), 0)

    def repeated(value: Tensor | None) -> Tensor | None:
        """`counted` of values per token or per sequence."""
        return None if value is None else counted(sequences.per_token(value, shape))

    logp, entropy = counted(logprobs), counted(batch.entropy)
    old, ref = counted(batch.old_logprobs), counted(batch.ref_logprobs)
    advantages, importance = repeated(batch.advantages), repeated(batch.importance_weights)
    log_ratio = logp - (logp.detach() if old is None else old)
    if objective.ratio == "sequence":
        log_ratio = (sequences.sum(log_ratio) / sequences.lengths(counts))[sequences.index]

    if callable(objective.surrogate):
        tokens = {"advantages": advantages, "old_logprobs": old, "ref_logprobs": ref, "entropy": entropy}
        view = batch._replace(
            **{name: None if value is None else value.reshape(shape) for name, value in tokens.items()},
            importance_weights=None if importance is None else importance.reshape(shape),
        )
        loss = objective.surrogate(logp.reshape(shape), view)
        if not isinstance(loss, Tensor) or loss.shape != shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the custom objective returned {got}, expected a loss per token of shape {tuple(shape)}")
        never = torch.zeros_like(mask)
        terms = _Surrogate(torch.where(mask, loss.reshape(-1), 0), mask, never, never, never)
    else:
        if importance is not None:  # a weight of 0 rejects the token: its advantage becomes 0, to avoid 0 * inf
            advantages = torch.where(importance == 0, 0, advantages)
        terms = _surrogate(objective, log_ratio, advantages, logp)
    active = terms.active
    surrogate = terms.loss
    if importance is not None:
        surrogate = surrogate * importance
        active = active & (importance != 0)
    if objective.ratio == "sequence" and objective.surrogate != "cispo":
        active = (sequences.sum(active.to(logprobs.dtype)) > 0)[sequences.index]

    per_token = surrogate
    kl = None if ref is None else kl_estimate.reference(logp, ref, objective.kl)
    if objective.kl_coef != 0:
        per_token = per_token + objective.kl_coef * kl
        active = active | (ref != logp) if objective.kl != "k1" else torch.ones_like(active)
    if objective.entropy_coef != 0:
        per_token = per_token - objective.entropy_coef * entropy
        active = torch.ones_like(active)
    # `where` and not a product: a custom objective may return anything behind the mask.
    weights = reduction_weights(objective, counts, sequences, normalizer)
    loss = torch.where(mask, per_token * weights, 0).sum()

    with torch.no_grad():
        tokens = counts.sum()
        ratio = log_ratio.exp()

        def mean(value: Tensor) -> Tensor:
            return torch.where(mask, value, 0).sum() / tokens.clamp(min=1)

        def extreme(fill: float, reduce: str) -> Tensor:
            if mask.numel() == 0:
                return tokens + 1
            value = getattr(torch.where(mask, ratio, fill), reduce)()
            return torch.where(tokens > 0, value, 1)

        zero = torch.zeros_like(tokens)
        clipped = (terms.clipped_low, terms.clipped_high, terms.capped)
        fractions = [mean(flag.to(logprobs.dtype)) for flag in clipped]
        metrics = torch.stack([
            tokens,
            zero + sequences.count,
            torch.where(mask, surrogate * weights, 0).sum(),
            zero if kl is None else mean(kl),
            zero if entropy is None else mean(entropy),
            torch.where(tokens > 0, mean(ratio), 1),
            extreme(torch.inf, "amin"),
            extreme(-torch.inf, "amax"),
            mean(kl_estimate.reference(torch.zeros_like(log_ratio), log_ratio, "k3")),
            sum(fractions),
            *fractions,
            mean(active.to(logprobs.dtype)),
            (mask & ~per_token.isfinite()).sum().to(logprobs.dtype),
        ])
    return loss, metrics
