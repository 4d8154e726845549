"""The policy loss in plain differentiable PyTorch: on any device, also in float64, and for callable objectives.

Masked tokens are replaced before any exponential, and clipped tokens are selected by predicates. So neither the loss
nor autograd's gradient computes inf * 0.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.objectives import Objective
from r1kernels.ops import kl_estimate, token_local
from r1kernels.ops._checks import check_positive, ids_int64, values_are_free
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
        self.packed: bool = cu_seqlens is not None
        if cu_seqlens is not None:
            _check_cu_seqlens(cu_seqlens, n)
            self.count = len(cu_seqlens) - 1
            self.index = torch.searchsorted(cu_seqlens[1:], torch.arange(n, device=device), right=True)
        else:
            self.count: int = logprobs.shape[:-1].numel()
            # Repeated, because dividing the integers below n takes ten times as long.
            self.index: Tensor = torch.arange(self.count, device=device).unsqueeze(1).expand(
                self.count, logprobs.shape[-1]).reshape(-1)

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


def sequences_of(name: str, tokens: Tensor, cu_seqlens: Any, why: str, group: Any = None) -> Sequences:
    """The sequences of the argument `name`, (B, T), or packed (N,) with cu_seqlens. `why` says what needs them."""
    if cu_seqlens is None:
        if tokens.dim() < 2:
            raise ValueError(f"cu_seqlens is None for packed tokens of shape {tuple(tokens.shape)}, expected (S + 1,): "
                             f"{why} need sequences (or give (B, T))")
        return Sequences(tokens, None, group)
    if tokens.dim() != 1:
        raise ValueError(f"cu_seqlens was given with {name} of shape {tuple(tokens.shape)}, expected packed (N,)")
    cu_seqlens = ids_int64("cu_seqlens", cu_seqlens, tokens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (S + 1,)")
    return Sequences(tokens, cu_seqlens, group)


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
    high, low = variable(1 + objective.clip_high), variable(1 - objective.clip_low)
    largest = torch.inf if objective.ratio_cap is None else objective.ratio_cap
    if objective.surrogate == "clip":
        up, down = variable(min(1 + objective.clip_high, largest)), variable(max(1 + objective.clip_high, largest))
        clipped_high = (advantages > 0) & (ratio > up)
        clipped_low = (advantages < 0) & (ratio < low)
        capped = (advantages < 0) & (ratio > down)
        flows = nonzero & ~(clipped_high | clipped_low | capped)
        # Filled in the dtype of the ratio: a choice between two Python numbers would be rounded to float32.
        bound = torch.zeros_like(ratio).masked_fill(capped, down).masked_fill(clipped_low, low)
        bound = bound.masked_fill(clipped_high, up)
        r = torch.where(flows, torch.where(flows, log_ratio, 0).exp(), bound)
        return _Surrogate(-r * advantages, flows, clipped_low, clipped_high, capped)
    if objective.surrogate == "gmpo":  # -s A
        r = torch.where(nonzero, torch.where(nonzero, log_ratio, 0).exp(), 0)
        return _Surrogate(-r * advantages, nonzero, never, never, never)
    if objective.surrogate == "cispo":
        clipped_high, clipped_low = nonzero & (ratio > high), nonzero & (ratio < low)
        weight = torch.where(nonzero, ratio.clamp(min=low, max=high), 0) * advantages
        return _weighted_logprob(weight, logprobs, clipped_low, clipped_high & ~clipped_low, never)
    if objective.surrogate in ("dppo_tv", "dppo_kl", "ipo"):
        old = (logprobs - log_ratio).detach()
        up = logprobs.detach().exp() - old.exp()
        if objective.surrogate == "ipo":
            clipped_high, clipped_low = nonzero & (up > objective.clip_high), nonzero & (up < -objective.clip_low)
            flows = nonzero & ~(clipped_high | clipped_low)
            gain = torch.where(flows, torch.where(flows, log_ratio, 0).exp() * advantages, 0)
            tau = torch.ones_like(ratio) * variable(objective.tau_neg)
            tau = tau.masked_fill(advantages > 0, variable(objective.tau_pos))
            pulled = torch.where(tau == 0, 0, log_ratio)
            moves = flows | (pulled.detach() != 0)
            return _Surrogate(tau * pulled.square() - gain, moves, clipped_low, clipped_high, never)
        moved = up.abs() if objective.surrogate == "dppo_tv" else _binary_kl(logprobs.detach(), old)
        clipped_high = (advantages > 0) & (up > 0) & (moved > objective.clip_high)
        clipped_low = (advantages < 0) & (up < 0) & (moved > objective.clip_low)
        kept = nonzero & ~(clipped_high | clipped_low)
        weight = torch.where(kept, ratio.clamp(max=variable(largest)), 0) * advantages
        return _weighted_logprob(weight, logprobs, clipped_low, clipped_high, kept & (ratio > largest))
    if objective.surrogate == "vespo":
        positive = advantages > 0
        tau = torch.ones_like(ratio).masked_fill(positive, objective.tau_pos).masked_fill(~positive, objective.tau_neg)
        power = torch.ones_like(ratio).masked_fill(positive, objective.power_pos)
        power = power.masked_fill(~positive, objective.power_neg)
        log_w = log_ratio.detach().clamp(min=math.log(1e-8), max=20.0)
        weight = (tau + power * log_w - tau * log_w.exp()).exp() * advantages
        return _weighted_logprob(torch.where(nonzero, weight, 0), logprobs, never, never, never)
    if objective.surrogate == "sapo":
        tau = torch.ones_like(ratio) * variable(objective.tau_neg)
        tau = tau.masked_fill(advantages > 0, variable(objective.tau_pos))
        gate = torch.sigmoid(tau * (log_ratio.clamp(max=80).exp() - 1))  # flat long before the clamp
        loss = torch.where(nonzero, -4 / tau * gate * advantages, 0)
        return _Surrogate(loss, nonzero & ((gate * (1 - gate)).detach() != 0), never, never, never)
    loss = torch.where(nonzero, -advantages * torch.where(nonzero, logprobs, 0), 0)
    return _Surrogate(loss, nonzero, never, never, never)


def _weighted_logprob(
    weight: Tensor, logprobs: Tensor, clipped_low: Tensor, clipped_high: Tensor, capped: Tensor
) -> _Surrogate:
    """-weight l with a constant weight; 0 where the weight is 0, whatever l is."""
    loss = torch.where(weight == 0, 0, -weight * torch.where(weight == 0, 0, logprobs))
    return _Surrogate(loss, weight != 0, clipped_low, clipped_high, capped)


def _binary_kl(logprobs: Tensor, old: Tensor) -> Tensor:
    """KL(Bernoulli(p_old) || Bernoulli(p)), from l and l_old."""
    p_old, rest, rest_old = old.exp(), (-logprobs.expm1()).clamp(min=0), -old.expm1()
    of_rest = torch.where(rest_old <= 0, 0, rest_old * (rest_old.log() - rest.log()))
    return torch.where(p_old == 0, 0, p_old * (old - logprobs)) + of_rest


def _moves_kl(objective: Objective, logp: Tensor, ref: Tensor, per_sequence: Any) -> Tensor:
    """Tokens whose KL term has a gradient."""
    d = ref - logp
    if not objective.kl_ratio:
        return d != 0 if objective.kl != "k1" else torch.ones_like(d, dtype=torch.bool)
    if objective.ratio == "sequence":
        return per_sequence(kl_estimate.reference(logp, ref, objective.kl)) != 0
    return {"k1": 1 - d, "k2": d * (d / 2 - 1), "k3": -d}[objective.kl] != 0


def _derivatives(loss: Tensor, *sources: Tensor | None) -> list[Tensor] | None:
    """Of a callable's loss, by each source (N,); None if they cannot be known."""
    wanted = [source for source in sources if source is not None and source.requires_grad]
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and loss.requires_grad and wanted):
        return None
    return list(torch.autograd.grad(loss.sum(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True))


def _of_callable(loss: Tensor, mask: Tensor, derivatives: list[Tensor] | None) -> _Surrogate:
    never = torch.zeros_like(mask)
    if derivatives is None:
        return _Surrogate(loss, mask, never, never, never)
    moves = torch.stack([grad != 0 for grad in derivatives]).any(0)
    return _Surrogate(loss, moves, never, never, never)


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
    if objective.ratio == "sequence_product":
        log_ratio = sequences.sum(log_ratio)[sequences.index]
    elif objective.ratio != "token":
        if objective.surrogate == "gmpo":  # tokens are clipped before the mean, so a clipped one has no gradient
            held_high = (advantages > 0) & (log_ratio > objective.clip_high)
            held_low = (advantages < 0) & (log_ratio < -objective.clip_low)
            log_ratio = log_ratio.masked_fill(held_high, objective.clip_high)
            log_ratio = log_ratio.masked_fill(held_low, -objective.clip_low)
        mean = (sequences.sum(log_ratio) / sequences.lengths(counts))[sequences.index]
        log_ratio = mean if objective.ratio == "sequence" else mean.detach() + (logp - logp.detach())

    known, derivatives = True, None  # which tokens have a gradient; those of a callable
    if objective.is_token_local:
        tokens = PolicyBatch(advantages, old, ref, None, None, None, importance)
        loss = token_local.loss_of(objective.surrogate, logp, entropy, tokens, mask)
        derivatives = _derivatives(loss, logp, entropy)
        token_local.check_derivatives(objective.surrogate, derivatives or [], [logp, entropy], importance, mask)
        terms, known = _of_callable(loss, mask, derivatives), derivatives is not None
    elif callable(objective.surrogate):
        tokens = {"advantages": advantages, "old_logprobs": old, "ref_logprobs": ref, "entropy": entropy}
        view = batch._replace(
            **{name: None if value is None else value.reshape(shape) for name, value in tokens.items()},
            importance_weights=None if importance is None else importance.reshape(shape),
        )
        loss = objective.surrogate(logp.reshape(shape), view)
        if not isinstance(loss, Tensor) or loss.shape != shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the custom objective returned {got}, expected a loss per token of shape {tuple(shape)}")
        loss = torch.where(mask, loss.reshape(-1), 0)
        derivatives = _derivatives(loss, logp, entropy)
        terms, known = _of_callable(loss, mask, derivatives), derivatives is not None
    else:
        if importance is not None:  # a weight of 0 rejects the token: its advantage becomes 0, to avoid 0 * inf
            advantages = torch.where(importance == 0, 0, advantages)
        terms = _surrogate(objective, log_ratio, advantages, logp)
        if objective.surrogate == "gmpo":
            terms = terms._replace(clipped_low=held_low, clipped_high=held_high)
    active = terms.active
    surrogate = terms.loss
    if importance is not None:
        surrogate = surrogate * importance
        active = active & (importance != 0)
    if objective.ratio == "sequence" and objective.surrogate in ("clip", "sapo", "gmpo"):
        active = (sequences.sum(active.to(logprobs.dtype)) > 0)[sequences.index]
        active = active & ~(terms.clipped_low | terms.clipped_high) if objective.surrogate == "gmpo" else active

    per_token = surrogate
    kl = None if ref is None else kl_estimate.reference(logp, ref, objective.kl)
    if kl is not None and objective.kl_ratio:
        kl = kl_estimate.times_ratio(kl, log_ratio)
    if objective.kl_coef != 0:
        per_token = per_token + objective.kl_coef * kl
        moved = _moves_kl(objective, logp.detach(), ref, lambda value: sequences.sum(value)[sequences.index])
        active = active | moved
    if objective.entropy_coef != 0:
        per_token = per_token - objective.entropy_coef * entropy
        active, known = torch.ones_like(active), True
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

        finite = per_token.isfinite()
        for grad in derivatives or []:
            finite = finite & grad.isfinite()
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
            mean(active.to(logprobs.dtype)) if known else zero + torch.nan,
            (mask & ~finite).sum().to(logprobs.dtype),
        ])
    return loss, metrics
