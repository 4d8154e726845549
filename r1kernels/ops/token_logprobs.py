r"""Log-probs and entropies from logits; those of a sharded or padded vocabulary, too.

    l = z_y - lse,  H = -sum_j p_j log p_j,  z = logits / T

The arithmetic is in `r1kernels.ops.token_stats`, and how ranks put their shards together in `r1kernels.ops.shards`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype, check_ids_in_range
from r1kernels.ops.row_statistics import split_statistics
from r1kernels.ops.shards import (
    NOT_SHARDED,
    Facts,
    Layout,
    Shard,
    Split,
    agreed_layout,
    checksum,
    correct_substitutes,
    layout_of,
    refusals,
)
from r1kernels.ops.support import checked_support
from r1kernels.ops.support_stats import support_stats
from r1kernels.ops.token_stats import checked, gradient_into, target_gradient, token_stats


class _SplitTokenStats(torch.autograd.Function):
    """Statistics of logits (N, V). Their first `layout.size` entries count: all of the vocabulary, or a shard."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, layout: Layout,
        shard: Shard | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulator_dtype(logits.dtype)
        logprobs, lse, entropy, _ = split_statistics(logits[:, : layout.size], token_ids, mask, temperature, shard)
        ctx.save_for_backward(logits, token_ids, lse, entropy)
        ctx.temperature, ctx.size, ctx.owned = temperature, layout.size, None if shard is None else shard.owned
        ctx.set_materialize_grads(False)
        return logprobs.to(dtype), entropy.to(dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor | None, eta: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None and eta is None:
            return (None,) * 6
        logits, token_ids, lse, entropy = ctx.saved_tensors
        grad_logits = _library.empty(*logits.shape, dtype=logits.dtype, device=logits.device)
        grad_logits[:, ctx.size :] = 0
        if ctx.size > 0:
            g = torch.zeros_like(lse) if g is None else g.contiguous()
            given = (logits[:, : ctx.size], token_ids, lse, entropy, g, None if eta is None else eta.contiguous())
            out = gradient_into(
                grad_logits[:, : ctx.size], *given, temperature=ctx.temperature, temperatures=None, softcap=0.0,
                rows=None,
            )
            if ctx.owned is not None:
                exact = target_gradient(*given, ctx.temperature, None, 0.0, ctx.owned)
                correct_substitutes(out, token_ids, ctx.owned, exact)
        return grad_logits, *[None] * 5


def split_arguments(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, split: Split,
    options: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor | None, float, Layout, Shard | None]:
    """token_ids and mask (N,), the temperature, the layout of the vocabulary and this rank's shard, after checks.

    options: other facts that must be the same on all ranks.
    """
    group, vocab_size = split.checked()
    with refusals(group, logits):
        token_ids, temperature = checked(logits, token_ids, temperature, sharded=group is not None)
    ids, mask = token_ids.reshape(-1), None if mask is None else mask.reshape(-1)
    if group is None:
        layout = layout_of((logits.shape[-1],), vocab_size)
    else:
        count = ids.numel() if mask is None else mask.sum()
        facts = Facts(
            "token_stats", ids.numel(), count, checksum(ids, mask), 0, vocab_size or -1, (logits.dtype,), temperature,
            (), options,
        )
        layout = agreed_layout(group, logits.shape[-1], facts, logits.device)
    check_ids_in_range("token_ids", ids, layout.vocab, mask)
    return ids, mask, temperature, layout, None if group is None else Shard(layout, ids, mask)


def _split_token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, split: Split
) -> tuple[Tensor, Tensor]:
    shape = token_ids.shape
    ids, mask, temperature, layout, shard = split_arguments(logits, token_ids, mask, temperature, split)
    flat = logits.reshape(ids.numel(), logits.shape[-1])
    results = _SplitTokenStats.apply(flat, ids if shard is None else shard.ids, mask, temperature, layout, shard)
    logprobs, entropy = (value.reshape(shape) for value in results)
    return logprobs, entropy


def logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, split: Split, support: Any = None
) -> tuple[Tensor, Tensor]:
    """`token_stats`, of a sharded or padded vocabulary too, and over sets of ids (the argument `support`)."""
    if support is not None:
        group, vocab_size = split.checked()
        with refusals(group, logits):
            token_ids, temperature = checked(logits, token_ids, temperature, sharded=group is not None)
            sets = checked_support(support, logits, token_ids.numel(), group)
            assert sets is not None
        if vocab_size is not None:
            logits = logits[..., : layout_of((logits.shape[-1],), vocab_size).size]
        return support_stats(logits, token_ids, mask, temperature, sets)
    if split == NOT_SHARDED:
        return token_stats(logits, token_ids, mask, temperature)
    return _split_token_stats(logits, token_ids, mask, temperature, split)


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    support: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Log-probability of each token under softmax(logits / temperature).

        l = z_y - log sum_j e^{z_j},  z = logits / temperature

    Args:
        logits: (..., V), float32, bfloat16 or float16; float64 runs on the reference. Any strides: rows are read
            in place. -inf entries are allowed. Row t scores token t: shift before the call.
        token_ids: (...), int64 or int32, in [0, V).
        temperature: Python number > 0. Gradients need |logit| / temperature < 1e10.
        process_group: the vocabulary is sharded over these ranks: logits (..., V_rank) are this rank's part, in the
            order of the ranks, of any size. All other arguments are the same on all ranks; token ids are those of the
            whole vocabulary. Results have the same bits on all ranks. See docs/parallel.md, and `LinearOptions`.
        vocab_size: V without padding. Entries (over all ranks) from this one on are not read, and get gradient 0.
        support: (token_ids (M,), offsets (N + 1,)), int32 or int64, for N tokens in the order of token_ids.flatten().
            Row n is scored over the set token_ids[offsets[n] : offsets[n + 1]], in any order: the ids that top-p, top-k
            or min-p sampling kept. A set has its token, and an id that it has twice counts once. An empty set means the
            whole vocabulary. All other entries of the row have probability 0, and get gradient 0. See
            docs/objectives.md.

    Returns:
        (...), float32 (float64 for float64 logits), nats. Differentiable once with respect to logits; the
        gradient has the dtype of logits.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, temperature <= 0, an id outside [0, V).

    Memory: 24 bytes a token forward (two statistics are kept in float64); the gradient is the only buffer of
    vocabulary width.

    Equivalent to: `(logits.float() / temperature).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]`
    """
    return logprobs_and_entropy(logits, token_ids, None, temperature, Split(process_group, vocab_size), support)[0]


def token_logprobs_and_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    support: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of each token and entropy of each row, in one read of the logits.

        l = z_y - lse,  H = -sum_j p_j log p_j,  with 0 log 0 = 0; both differentiable.

    Args, errors and memory are those of `token_logprobs`.

    Returns:
        (logprobs, entropy), each (...), float32, nats.

    Equivalent to: `token_logprobs` and `torch.distributions.Categorical(logits=logits / temperature).entropy()`
    """
    return logprobs_and_entropy(logits, token_ids, None, temperature, Split(process_group, vocab_size), support)
