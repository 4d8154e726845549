"""Cross-entropies with label smoothing or z-loss from logits. The arithmetic is in `r1kernels.ops.target_terms`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.row_statistics import split_statistics
from r1kernels.ops.shards import Layout, Shard, Split
from r1kernels.ops.target_terms import TargetTerms
from r1kernels.ops.token_logprobs import split_arguments
from r1kernels.ops.token_stats import gradient_into


def _matrices(logits: Tensor, begin: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Views (n, V) of logits (..., V), in order, and their rows: `logits[:, :-1]` is not copied."""
    count = logits.shape[:-1].numel()
    try:
        yield slice(begin, begin + count), logits.view(count, logits.shape[-1])
    except RuntimeError:
        for part in logits:
            yield from _matrices(part, begin)
            begin += part.shape[:-1].numel()


class _TargetLosses(torch.autograd.Function):
    """Losses (N,), 0 where `mask` is False, from logits (..., V). Their first `layout.size` entries count."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, mask: Tensor, temperature: float, layout: Layout, shard: Shard | None,
        terms: TargetTerms,
    ) -> Tensor:
        parts = list(_matrices(logits[..., : layout.size]))
        statistics = [
            split_statistics(part, ids[rows], mask[rows], temperature, shard, terms.wanted, rows)
            for rows, part in parts
        ]
        logprobs, lse = (torch.cat([each[k] for each in statistics]) for k in (0, 1))
        mean = torch.cat([each.more[1] for each in statistics])
        losses = torch.where(mask, terms.losses(logprobs[:, None], lse, mean)[:, 0], 0)
        ctx.save_for_backward(logits, ids, lse)
        ctx.constants = temperature, layout, None if shard is None else shard.owned, terms
        return losses.to(accumulator_dtype(logits.dtype))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, lse = ctx.saved_tensors
        temperature, layout, owned, terms = ctx.constants
        grad_logits = _library.empty(*logits.shape, dtype=logits.dtype, device=logits.device)
        grad_logits[..., layout.size :] = 0
        out = grad_logits.view(len(ids), logits.shape[-1])[:, : layout.size]
        for rows, part in _matrices(logits[..., : layout.size]) if layout.size > 0 else ():
            slopes = terms.slopes(ids[rows, None], grads[rows, None], lse[rows], layout.vocab)
            slopes = slopes if owned is None else slopes.owned_by(owned[rows])
            entries = slopes.entries(part, lse[rows], temperature, None, 0.0)
            gradient_into(  # without an entropy
                out[rows], part, ids[rows], lse[rows], lse[rows], slopes.g, None, temperature=temperature,
                temperatures=None, softcap=0.0, rows=None, shift=slopes.shift,
            )
            entries.write(out[rows])
        return grad_logits, *[None] * 6


def target_losses(
    logits: Tensor, targets: Tensor, mask: Tensor, temperature: float, split: Split, terms: TargetTerms
) -> Tensor:
    """The loss of each target (...), after checks; 0 where `mask` is False. Callers send gradient 0 to these."""
    shape = targets.shape
    ids, mask, temperature, layout, shard = split_arguments(logits, targets, mask, temperature, split, tuple(terms))
    ids = torch.where(mask, ids if shard is None else shard.ids, 0)
    losses = _TargetLosses.apply(logits, ids, mask, temperature, layout, shard, terms)
    return losses.reshape(shape)
