r"""Log-probs and entropies over sets of ids from hidden states. Small sets need only their rows of the weight.

    z_e = h_n . w_j  for each entry e = (token n, id j),   dH_n = sum_e dz_e w_j,   dW_j = sum_e dz_e h_n

The logits of M entries are kept, so that the backward computes no product again. Entries are taken by ascending id: a
row of the weight is read once for thousands of tokens, and a row of its gradient is written once. Large sets, and empty
ones, which mean the whole vocabulary, take the walk over all of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.linear.gemm import matmul
from r1kernels.ops.linear.gradients import rounded
from r1kernels.ops.linear.head import Head, Needs
from r1kernels.ops.linear.passes import run_backward, run_statistics
from r1kernels.ops.linear.precision import without_autocast
from r1kernels.ops.linear.rows import active_rows
from r1kernels.ops.support import Index, Support, check_sets

_ops = torch.ops.r1kernels


class _Gathered:
    """The small sets of a call, whose tokens are where `small` (N,) is True.

    Attributes:
        rest: (N,), the other tokens that count, or None if there are none.
    """

    def __init__(
        self, head: Head, hidden: Tensor, counted: Tensor | None, support: Support, index: Index | None = None
    ) -> None:
        self.head, self.support = head, support
        vocab = len(head.weight)
        largest = vocab // _dispatch.SUPPORT_SHARE
        if index is None:  # before anything else, because it checks the sets
            index = Index.of(support, head.token_ids, counted, vocab, largest)
        self.index = index
        sizes = support.offsets.diff()
        small = (sizes > 0) & (sizes <= largest)
        rest = ~small
        if counted is not None:
            small, rest = small & counted, rest & counted
        self.small, self.rest = small, rest if bool(rest.any()) else None
        flat = hidden.reshape(-1, hidden.shape[-1])
        self.hidden = flat if flat.stride(1) == 1 else flat.contiguous()
        self.lora_b = None if head.lora_b is None else head.lora_b.t().contiguous()

    def _ones(self, rows: int) -> Tensor:
        return torch.ones(rows, 1, dtype=torch.float32, device=self.hidden.device)

    @property
    def lora_hidden(self) -> Tensor:
        """(N, R), rounded as in the walk."""
        out = torch.empty(len(self.hidden), self.head.lora_a.shape[1], device=self.hidden.device)
        lora_a = self.head.lora_a if 1 in self.head.lora_a.stride() else self.head.lora_a.contiguous()
        return matmul(self.hidden, lora_a, out, batch_invariant=self.head.batch_invariant).to(self.hidden.dtype)

    def logits(self) -> Tensor:
        """(M,) float32, -inf where a set has no entry."""
        head = self.head

        def add(hidden: Tensor, weight: Tensor, values: Tensor, accumulate: bool) -> Tensor:
            _ops.support_products.default(hidden, weight, *self.index[1:], values, accumulate)
            return values

        empty = torch.full(self.support.token_ids.shape, -torch.inf, device=self.hidden.device)
        values = add(self.hidden, head.weight, empty, False)
        if head.lora_a is not None:
            add(self.lora_hidden, self.lora_b, values, True)
        if head.bias is not None:
            add(self._ones(len(self.hidden)), head.bias[:, None], values, True)
        if head.softcap > 0:
            values.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
            ones = self._ones(len(self.hidden)), self._ones(len(head.weight))
            values.masked_fill_(add(*ones, torch.zeros_like(values), False) == 0, -torch.inf)
        return values

    def statistics(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.support_stats.default(
            values, self.support.offsets, self.index.targets, self.small, self.head.kernel_temperature,
            self.head.temperatures,
        )

    def gradient(self, values: Tensor, lse: Tensor, entropy: Tensor, g: Tensor, eta: Tensor | None) -> Tensor:
        """(M,) float32, d logits."""
        scaled = [
            None if slope is None else torch.where(self.small, slope * self.head.kernel_scale, 0) for slope in (g, eta)
        ]
        out = torch.empty_like(values)
        _ops.support_stats_backward.default(
            values, self.support.offsets, self.index.targets, lse, entropy, *scaled, self.head.kernel_temperature,
            self.head.temperatures, self.head.softcap, out,
        )
        return out

    def gradients(self, grad: Tensor, needs: Needs, weight: Tensor, accumulate: bool) -> list[Tensor | None]:
        """The gradients of (hidden (N, H), weight, bias, lora_a, lora_b) in float32, None for what is not needed. That
        of the weight is written, or added, to `weight`."""
        head, hidden = self.head, self.hidden
        results: list[Tensor | None] = [None] * 5

        def for_tokens(rows: Tensor) -> Tensor:
            out = torch.zeros(len(hidden), rows.shape[1], device=hidden.device)
            _ops.support_grad_hidden.default(grad, rows, *self.index[1:], out)
            return out

        def for_ids(rows: Tensor, out: Tensor | None = None) -> Tensor:
            out = torch.empty(len(head.weight), rows.shape[1], device=hidden.device) if out is None else out
            _ops.support_grad_weight.default(grad, rows, *self.index[1:], out, accumulate and out is weight)
            return out

        inner = None
        if head.lora_a is not None and (needs.hidden or needs.lora_a):
            inner = for_tokens(self.lora_b).to(hidden.dtype)
        if needs.hidden:
            results[0] = for_tokens(head.weight)
            if inner is not None:
                matmul(inner, head.lora_a.t(), results[0], accumulate=True)
        if needs.weight:
            results[1] = for_ids(hidden, weight)
        if needs.bias:
            results[2] = for_ids(self._ones(len(hidden))).squeeze(1)
        if needs.lora_a:  # what masked tokens hold must not meet their zeros
            rows = torch.where(self.small[:, None], hidden, 0)
            results[3] = matmul(rows.t(), inner, torch.empty(head.lora_a.shape, device=hidden.device))
        if needs.lora_b:
            results[4] = for_ids(self.lora_hidden).t().contiguous()
        return results


@without_autocast
def run_support_statistics(
    head: Head, hidden: Tensor, wanted: Tensor | None, support: Support
) -> tuple[Tensor, ...]:
    """(log-prob, log-sum-exp, entropy), each (N,), 0 where `wanted` is False; the logits (M,) and the index of small
    sets."""
    if _dispatch.choose("support", hidden, head).implementation == "walk":
        check_sets(support, head.token_ids, len(head.weight), wanted)
        values = torch.empty(support.token_ids.shape, dtype=torch.float32, device=hidden.device)
        index = Index.unused(support, head.token_ids, len(head.weight))
        return *run_statistics(head, hidden, wanted, support=support), values, *index
    if head.capacity >= 0:  # its check
        active_rows(hidden, wanted, head.capacity)
    gathered = _Gathered(head, hidden, wanted, support)
    values = gathered.logits()
    results = gathered.statistics(values)
    if gathered.rest is not None:
        others = run_statistics(head, hidden, gathered.rest, support=support)
        results = tuple(torch.where(gathered.rest, b, a) for a, b in zip(results, others, strict=True))
    return *results, values, *gathered.index


@without_autocast
def run_support_backward(
    head: Head, hidden: Tensor, lse: Tensor, entropy: Tensor, g: Tensor | None, eta: Tensor | None, support: Support,
    values: Tensor, index: Index, weight_dtype: torch.dtype, needs: Needs,
) -> tuple[Tensor, ...]:
    """The gradients of `run_backward`."""
    g = torch.zeros_like(eta) if g is None else g
    if _dispatch.choose("support", hidden, head).implementation == "walk":
        return run_backward(head, hidden, lse, entropy, g, eta, weight_dtype, needs, support=support)
    active = g != 0 if eta is None else (g != 0) | (eta != 0)
    gathered = _Gathered(head, hidden, active, support, index)
    others: tuple[Tensor, ...] | None = None
    if gathered.rest is None:
        weight = _library.empty(*head.weight.shape, dtype=weight_dtype, device=hidden.device) if needs.weight else None
    else:
        slopes = (None if slope is None else torch.where(gathered.rest, slope, 0) for slope in (g, eta))
        others = run_backward(
            head, hidden, lse, entropy, *slopes, accumulator_dtype(hidden.dtype), needs, support=support
        )
        weight = others[1]
    grad = gathered.gradient(values, lse, entropy, g, eta)
    results = gathered.gradients(grad, needs, weight, others is not None)
    if needs.hidden:
        results[0] = rounded(results[0], hidden.dtype)
    if others is not None:
        for place, other in enumerate(others):
            if not needs[place] or place == 1:
                continue
            if place == 0:
                results[0] = torch.where(gathered.rest[:, None], other, results[0])
            else:
                results[place] += other
        if needs.weight:
            results[1] = rounded(weight, weight_dtype)
    return tuple(torch.empty(0, device=hidden.device) if value is None else value for value in results)
