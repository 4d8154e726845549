"""The walks over a head that losses use: statistics, gradients from given slopes, and both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops.linear.gradients import rounded
from r1kernels.ops.linear.head import Chunk, Head, Needs
from r1kernels.ops.linear.precision import without_autocast
from r1kernels.ops.linear.rows import active_rows
from r1kernels.ops.linear.walk import Walk
from r1kernels.ops.row_statistics import RowStatistics, Selected, Slopes, merged
from r1kernels.ops.shards import Shard
from r1kernels.ops.support import Support


@without_autocast
def run_statistics(
    head: Head, hidden: Tensor, wanted: Tensor | None, shard: Shard | None = None, support: Support | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, log-sum-exp, entropy), each (N,), 0 where `wanted` is False."""
    walk = Walk(head, active_rows(hidden, wanted, head.capacity), shard=shard, support=support)
    results, _ = _walk_statistics(walk, None, None)
    if shard is None:
        return results
    logprobs, lse, entropy = (
        value if wanted is None else torch.where(wanted, value, 0) for value in shard.merged(*results)
    )
    return logprobs.to(walk.accumulator), lse, entropy


@without_autocast
def run_token_statistics(
    head: Head, hidden: Tensor, counted: Tensor | None, wanted: int, selected: Selected | None,
    shard: Shard | None = None,
) -> tuple[RowStatistics, Tensor | None]:
    """Statistics (N,), and log-probs (N, K) of selected ids, 0 where `counted` is False."""
    walk = Walk(head, active_rows(hidden, counted, head.capacity), shard=shard)
    results, chosen = _walk_statistics(walk, wanted, selected)
    rows = RowStatistics(*results)
    if shard is None:
        return rows, chosen
    rows = merged(shard, rows, counted, wanted)
    if chosen is not None:
        chosen = selected.merged(chosen, rows.lse)
        chosen = chosen if counted is None else torch.where(counted[:, None], chosen, 0)
    return rows._replace(logprobs=rows.logprobs.to(walk.accumulator)), chosen


def _walk_statistics(
    walk: Walk, wanted: int | None, selected: Selected | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The results of `Walk.statistics` and `Walk.selected` of all rows."""
    hidden, head = walk.rows.hidden, walk.head
    results = [
        walk.per_token(walk.accumulator if walk.shard is None else torch.float64), walk.per_token(torch.float64),
        walk.per_token(torch.float64),
    ]
    if wanted is not None:
        results.append(walk.per_token(torch.float64, 4))
    chosen = None
    if selected is not None:
        chosen = torch.zeros(walk.rows.padded, selected.ids.shape[1], dtype=torch.float64, device=walk.device)
    has_more = bool(wanted) or selected is not None
    choice = _dispatch.choose("linear_statistics", hidden, head, has_more, walk.support)
    without_logits = choice.implementation == "fused"
    for chunk in walk.blocks() if without_logits else walk.chunks():
        values = _fused_statistics(head, chunk) if without_logits else walk.statistics(chunk, wanted)
        for result, value in zip(results, values, strict=not without_logits):
            result[..., chunk.write] = value
        if chosen is not None:
            chosen[chunk.write] = walk.selected(chunk, *selected.at(chunk.rows), values[1])
    return tuple(walk.trim(result) for result in results), None if chosen is None else chosen[: walk.rows.total]


def _fused_statistics(head: Head, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    return _library.call(
        torch.ops.r1kernels.linear_statistics.default, chunk.hidden, head.weight, head.bias, chunk.token_ids,
        chunk.valid, head.temperature, chunk.temperatures, head.logit_scale, head.softcap, head.batch_invariant,
    )


@without_autocast
def run_backward(
    head: Head, hidden: Tensor, lse: Tensor, entropy: Tensor, g: Tensor | None, eta: Tensor | None,
    weight_dtype: torch.dtype, needs: Needs, shard: Shard | None = None, support: Support | None = None,
) -> tuple[Tensor, ...]:
    """Gradients from statistics, dL/dlogprob and dL/dentropy (N,). Recomputes the logits of rows with a gradient.

    No factor follows, so the weight's gradient is rounded here to `weight_dtype`: once, from its float32 sum.
    """
    if g is None:
        g = torch.zeros_like(eta)
    active = g != 0 if eta is None else (g != 0) | (eta != 0)
    walk = Walk(head, active_rows(hidden, active, head.capacity), needs, weight_dtype, shard, support)
    for chunk in walk.chunks():
        rows = chunk.rows
        walk.backward(chunk, lse[rows], entropy[rows], g[rows], None if eta is None else eta[rows], sparse=False)
    return _with_rounded_weight(walk.gradients(), weight_dtype, needs)


@without_autocast
def run_token_statistics_backward(
    head: Head, hidden: Tensor, lse: Tensor, entropy: Tensor, sum_sq: Tensor | None, selected: Selected | None,
    slopes: Slopes, weight_dtype: torch.dtype, needs: Needs, shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    """`run_backward` for all statistics that have a derivative."""
    walk = Walk(head, active_rows(hidden, slopes.active, head.capacity), needs, weight_dtype, shard)
    for chunk in walk.chunks():
        rows = chunk.rows
        of_chunk = slopes.map(lambda slope, rows=rows: slope[rows])
        ids, owned = (None, None) if selected is None else selected.at(rows)
        walk.backward_of_statistics(
            chunk, lse[rows], entropy[rows], None if sum_sq is None else sum_sq[rows], of_chunk, ids, owned
        )
    return _with_rounded_weight(walk.gradients(), weight_dtype, needs)


def _with_rounded_weight(gradients: tuple[Tensor, ...], dtype: torch.dtype, needs: Needs) -> tuple[Tensor, ...]:
    grad_hidden, grad_weight, *others = gradients
    return grad_hidden, rounded(grad_weight, dtype) if needs.weight else grad_weight, *others


Scalars = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@without_autocast
def run_one_pass(
    head: Head, hidden: Tensor, wanted: Tensor | None, scalars: Scalars, needs: Needs, *, sparse: bool,
    shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    """Log-probs, entropies and gradients in one walk, for losses whose slope at a token depends only on that token.

    Args:
        scalars: (rows, logprobs, entropy) of a chunk -> (g, eta), each (n,).
        sparse: whether g and eta of a token may be 0.
        shard: all ranks take the same chunks, and exchange statistics once a chunk.

    Returns:
        (log-prob, entropy), each (N,) and 0 where `wanted` is False, and the gradients.
    """
    walk = Walk(head, active_rows(hidden, wanted, head.capacity), needs, shard=shard)
    logprobs, entropies = walk.per_token(walk.accumulator), walk.per_token(walk.accumulator)
    for chunk in walk.chunks():
        logprob, lse, entropy = walk.statistics(chunk)
        if shard is not None:
            logprob, lse, entropy = shard.merged(logprob, lse, entropy, chunk.rows)
            logprob = logprob.to(walk.accumulator)
        logprobs[chunk.write], entropies[chunk.write] = logprob, entropy.to(walk.accumulator)
        g, eta = scalars(chunk.rows, logprob, entropy.to(walk.accumulator))
        walk.backward(chunk, lse, entropy, g, eta, sparse=sparse)
    return walk.trim(logprobs), walk.trim(entropies), *walk.gradients()
