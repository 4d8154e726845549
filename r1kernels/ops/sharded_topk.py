"""Divergence from a top-k teacher over a sharded vocabulary: see `topk_divergence`.

The owner of a listed token knows its logit, and each rank the log-sum-exp and the entropy of its other rows. One
all-gather of these K + 2 float64 numbers a token gives all ranks the same K + 1 outcomes, values and weights. In the
gradient of a rank's logits, the entries of the teacher that other ranks have are absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.shards import Layout, Shard, all_gathered, merged_entropy, shares
from r1kernels.ops.topk_divergence import Outcomes, chunk_outcomes, parts, statistics_of, write_gradient
from r1kernels.ops.topk_teacher import Teacher


def local_teacher(teacher: Teacher, layout: Layout) -> Teacher:
    """The entries (n, K) among this rank's rows, with ids in them. The others are absent."""
    ids = teacher.token_ids - layout.start
    here = teacher.present & (ids >= 0) & (ids < layout.size)
    ids = torch.where(here, ids, 0)
    first = ids.gather(-1, here.to(torch.int8).argmax(-1, keepdim=True))
    return Teacher(torch.where(here, ids, first), torch.where(here, teacher.logprobs, -torch.inf), here)


def merged(outcomes: Outcomes, shard: Shard) -> Outcomes:
    """The outcomes over the whole vocabulary, from those of this rank's rows."""
    if len(outcomes.z) == 0:  # on all ranks
        return outcomes
    values = all_gathered(shard.layout.group, torch.cat([outcomes.z.t(), torch.stack(outcomes[1:])]))
    lse, entropy = values[:, -2], values[:, -1]
    empty = (lse == -torch.inf).all(0)
    lse = torch.where(empty, 0, lse)  # a log-sum-exp of nothing is NaN
    return Outcomes(
        values[:, :-2].amax(0).t(),  # all but the owner have -inf
        torch.where(empty, -torch.inf, shares(lse)[0]),
        torch.where(empty, 0, merged_entropy(lse, entropy)),
    )


class _ShardedTopK(torch.autograd.Function):
    """Of logits (N, V), of which the first `layout.size` entries count."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, token_ids: Tensor, logprobs: Tensor, present: Tensor, mask: Tensor | None, kind: str,
        beta: float, temperature: float, tail: str, shard: Shard,
    ) -> tuple[Tensor, ...]:
        teacher, size = Teacher(token_ids, logprobs, present), shard.layout.size
        local = local_teacher(teacher, shard.layout)
        if size == 0 or len(student) == 0:
            found = chunk_outcomes(student[:, :0], local, mask, temperature)
        else:
            chunks = [chunk_outcomes(*chunk, temperature) for chunk in parts(student[:, :size], local, mask)]
            found = Outcomes(*(torch.cat(part) for part in zip(*chunks, strict=True)))
        statistics = statistics_of(merged(found, shard), teacher, mask, kind, beta, tail)
        ctx.save_for_backward(student, local.token_ids, local.present, statistics.weights, statistics.lse_rest)
        ctx.temperature, ctx.size = temperature, size
        value, *measures = (part.to(accumulator_dtype(student.dtype)) for part in statistics.rows(tail))
        ctx.mark_non_differentiable(*measures)
        return value, *measures

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, token_ids, present, weights, lse_rest = ctx.saved_tensors
        out = _library.empty(*student.shape, dtype=student.dtype, device=student.device)
        out[:, ctx.size :] = 0
        if ctx.size > 0 and len(student) > 0:
            local, kept = Teacher(token_ids, None, present), slice(0, ctx.size)
            write_gradient(out[:, kept], student[:, kept], local, weights, lse_rest, grad, ctx.temperature)
        return out, *[None] * 9


def sharded_topk(
    student: Tensor, teacher: Teacher, mask: Tensor | None, kind: str, beta: float, temperature: float, tail: str,
    shard: Shard,
) -> tuple[Tensor, ...]:
    """The divergence of checked logits (..., V_rank), and its `measures`."""
    shape, k = student.shape[:-1], teacher.token_ids.shape[-1]
    flat = (student.reshape(shape.numel(), student.shape[-1]), *(part.reshape(-1, k) for part in teacher))
    settings = kind, beta, temperature, tail
    results = _ShardedTopK.apply(*flat, None if mask is None else mask.reshape(-1), *settings, shard)
    return tuple(part.reshape(shape) for part in results)
