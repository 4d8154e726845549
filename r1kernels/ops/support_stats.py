"""Log-probs and entropies over sets of ids, from logits.

Forward reads the entries of the sets, and backward writes them and zeros. Rows of empty sets, which mean the whole
vocabulary, are those of `token_stats`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops import token_stats
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops.support import Index, Support, check_sets, outside_of

_ops = torch.ops.r1kernels


def _select(logits: Tensor, tokens: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The place of entries in logits (..., V), whose leading dimensions no view may be able to flatten."""
    places = [ids]
    for size in reversed(logits.shape[:-1]):
        places.insert(0, tokens % size)
        tokens = tokens // size
    return tuple(places)


def _entries(index: Index, support: Support, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    entries, tokens, valid = index.listed()
    return entries, tokens, support.token_ids[entries].clamp(0, vocab - 1), valid


@torch.library.impl("r1kernels::support_token_stats", "CompositeExplicitAutograd")
def _(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, support_ids: Tensor, offsets: Tensor
) -> tuple[Tensor, ...]:
    support, vocab, shape = Support(support_ids, offsets), logits.shape[-1], logits.shape[:-1]
    flat = None if mask is None else mask.reshape(-1)
    index = Index.of(support, token_ids.reshape(-1), flat, vocab, vocab)
    entries, tokens, ids, valid = _entries(index, support, vocab)
    values = torch.full(support_ids.shape, -torch.inf, device=logits.device)
    picked = logits[_select(logits, tokens, ids)].float()
    values[entries] = picked if valid is None else torch.where(valid, picked, -torch.inf)
    limited = offsets.diff() > 0
    whole = (~limited if flat is None else ~limited & flat).reshape(shape)
    small = limited if flat is None else limited & flat
    results = _ops.support_stats.default(values, offsets, index.targets, small, temperature, None)
    others = _ops.token_stats.default(logits, token_ids, whole, temperature)
    return *(torch.where(whole, b, a.reshape(shape)) for a, b in zip(results, others, strict=True)), values, *index


@torch.library.impl("r1kernels::support_token_stats_backward", "CompositeExplicitAutograd")
def _(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, g: Tensor | None, eta: Tensor | None,
    temperature: float, support_ids: Tensor, offsets: Tensor, values: Tensor, *index: Tensor,
) -> Tensor:
    support, found, vocab = Support(support_ids, offsets), Index(*index), logits.shape[-1]
    limited = (offsets.diff() > 0).reshape(token_ids.shape)

    def where(chosen: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if slope is None else torch.where(chosen, slope, 0) for slope in (g, eta))

    # Rows without a gradient become zeros.
    out = _ops.token_stats_backward.default(logits, token_ids, lse, entropy, *where(~limited), temperature)
    grad = torch.empty_like(values)
    flat = [None if value is None else value.reshape(-1) for value in (lse, entropy, *where(limited))]
    _ops.support_stats_backward.default(values, offsets, found.targets, *flat, temperature, None, 0.0, grad)
    entries, tokens, ids, valid = _entries(found, support, vocab)
    picked, places = grad[entries].to(out.dtype), _select(out, tokens, ids)
    if valid is None:
        out[places] = picked
    else:  # what is no entry is 0, and may be anywhere
        out.index_put_(places, torch.where(valid, picked, 0), accumulate=True)
    return out


class _SupportStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, support: Support
    ) -> tuple[Tensor, Tensor]:
        logprobs, lse, entropy, *kept = _library.call(
            _ops.support_token_stats.default, logits, token_ids, mask, temperature, *support
        )
        ctx.save_for_backward(logits, token_ids, lse, entropy, *support, *kept)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy.float()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor | None, eta: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None and eta is None:
            return (None,) * 5
        logits, token_ids, lse, entropy, *sets = ctx.saved_tensors
        slopes = (None if slope is None else slope.contiguous() for slope in (g, eta))
        grad = _library.run(
            _ops.support_token_stats_backward.default, logits, token_ids, lse, entropy, *slopes, ctx.temperature, *sets
        )
        return grad, None, None, None, None


def support_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, support: Support
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy), each (...), from logits (..., V); 0 where `mask` is False. Differentiable."""
    if _dispatch.choose("support_logits", logits).implementation == "entries":
        return _SupportStats.apply(logits, token_ids, mask, temperature, support)
    check_sets(support, token_ids.reshape(-1), logits.shape[-1], None if mask is None else mask.reshape(-1))
    outside = outside_of(support, logits.shape[-1]).reshape(logits.shape)
    return token_stats.token_stats(logits.masked_fill(outside, -torch.inf), token_ids, mask, temperature)
