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
from r1kernels.ops.shards import Shard
from r1kernels.ops.support import Support


@without_autocast
def run_statistics(
    head: Head, hidden: Tensor, wanted: Tensor | None, shard: Shard | None = None, support: Support | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, log-sum-exp, entropy), each (N,), 0 where `wanted` is False."""
    walk = Walk(head, active_rows(hidden, wanted, head.capacity), shard=shard, support=support)
    results = (
        walk.per_token(walk.accumulator if shard is None else torch.float64), walk.per_token(torch.float64),
        walk.per_token(torch.float64),
    )
    without_logits = _dispatch.choose("linear_statistics", hidden, walk.head, support).implementation == "fused"
    for chunk in walk.blocks() if without_logits else walk.chunks():
        values = _fused_statistics(walk.head, chunk) if without_logits else walk.statistics(chunk)
        for result, value in zip(results, values, strict=True):
            result[chunk.write] = value
    results = tuple(walk.trim(result) for result in results)
    if shard is None:
        return results
    logprobs, lse, entropy = (
        value if wanted is None else torch.where(wanted, value, 0) for value in shard.merged(*results)
    )
    return logprobs.to(walk.accumulator), lse, entropy


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
    grad_hidden, grad_weight, *others = walk.gradients()
    return grad_hidden, rounded(grad_weight, weight_dtype) if needs.weight else grad_weight, *others


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
