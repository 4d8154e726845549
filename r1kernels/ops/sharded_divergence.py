r"""Divergence of a student from a teacher whose vocabularies are sharded in the same way over the ranks of a group.

From the log-sum-exps of all ranks follow the shares a_r of the student's probability and b_r of the teacher's. With the
divergence D_r between the distributions inside a rank's rows, the chain rule gives

    forward_kl  sum_r b_r (D_r + log b_r - log a_r)
    reverse_kl  sum_r a_r (D_r + log a_r - log b_r)

so one all-gather of five float64 numbers a token is enough. The mixture of jsd has another weight in each shard: once
the log-sum-exps are known, each rank adds up the terms of its own rows in float64, and a second all-gather exchanges
two numbers. With the global statistics, the gradient kernel gives the gradient of a rank's own logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.ops import divergence
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops.divergence import Statistics
from r1kernels.ops.shards import Layout, Shard, all_gathered, merged_entropy, shares
from r1kernels.ops.token_stats import row_blocks


def statistics(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float, shard: Shard
) -> Statistics:
    """Statistics of the whole vocabulary from this rank's logits (n, V_rank). Rows where `mask` is False give 0."""
    if len(student) == 0:  # on all ranks
        return _of_no_rows(student)
    if student.shape[1] == 0:
        local = _of_no_rows(student)
    else:
        local = divergence.statistics(
            student, teacher, mask, "reverse_kl" if kind == "reverse_kl" else "forward_kl", beta, temperature
        )
    group = shard.layout.group
    inner, *lse, of_student, of_teacher = all_gathered(
        group, torch.stack([local.inner, local.lse_student, local.lse_teacher, *local[4:]])
    ).unbind(1)
    totals, log_shares = zip(*(shares(value) for value in lse), strict=True)
    entropies = [merged_entropy(*pair) for pair in zip(lse, (of_student, of_teacher), strict=True)]
    if kind == "jsd":
        parts = _jsd_terms(student, teacher, *totals, beta, temperature)
        value, inner = all_gathered(group, parts).sum(0).unbind(0)
    else:
        # Of an undefined row, all of `totals` are NaN, and so are its shares.
        value = inner = _chain_rule(inner, *(log_shares if kind == "reverse_kl" else reversed(log_shares)))
    results = Statistics(value.to(local.value.dtype), *totals, inner, *entropies)
    return results if mask is None else Statistics(*(torch.where(mask, part, 0) for part in results))


def _of_no_rows(student: Tensor) -> Statistics:
    """Of a rank without a row of the vocabulary."""
    zeros = torch.zeros(len(student), dtype=torch.float64, device=student.device)
    nothing = torch.full_like(zeros, -torch.inf)
    value = zeros.to(torch.float64 if student.dtype == torch.float64 else torch.float32)
    return Statistics(value, nothing, nothing, zeros, zeros, zeros)


def _chain_rule(within: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a||b) over all outcomes (n,), from that within each rank's outcomes and the logs of its shares (ranks, n)."""
    a, b = log_a.exp(), log_b.exp()
    # a log(a / b) + b - a is at least 0: a divergence near 0 keeps its relative accuracy.
    terms = torch.where(a == 0, b, a * (log_a - log_b) + b - a)
    inside = torch.where((a == 0) | (log_b == -torch.inf), 0, a * within)
    return (terms + inside).sum(0)


def _jsd_terms(
    student: Tensor, teacher: Tensor, lse_student: Tensor, lse_teacher: Tensor, beta: float, temperature: float
) -> Tensor:
    """(2, n) float64: the parts of jsd and of KL(p||m) that belong to this rank's rows."""
    sums = torch.zeros(2, len(student), dtype=torch.float64, device=student.device)
    for rows in row_blocks(student, elements=1 << 20):  # about ten float64 tensors of 8 MiB
        log_p, log_q = (
            logits[rows].double() / temperature - lse[rows, None]
            for logits, lse in ((student, lse_student), (teacher, lse_teacher))
        )
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        m = log_m.exp()
        # p log(p / m) + m - p is at least 0.
        of_student, of_teacher = (
            torch.where(x == 0, m, x * (log_x - log_m) + m - x).sum(-1) for x, log_x in ((p, log_p), (q, log_q))
        )
        sums[0, rows] = beta * of_teacher + (1 - beta) * of_student
        sums[1, rows] = of_student
    return sums


class _ShardedDivergence(torch.autograd.Function):
    """Of logits (N, V), of which the first `layout.size` entries count."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float,
        layout: Layout, shard: Shard | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = layout.size
        arguments = student[:, :size], teacher[:, :size], mask, kind, beta, temperature
        found = divergence.statistics(*arguments) if shard is None else statistics(*arguments, shard)
        ctx.save_for_backward(student, teacher, *found[1:4])
        ctx.arguments, ctx.size = (kind, beta, temperature), size
        entropies = tuple(part.to(found.value.dtype) for part in found[4:])
        ctx.mark_non_differentiable(*entropies)
        return found.value, *entropies

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, *found = ctx.saved_tensors
        out = _library.empty(*student.shape, dtype=student.dtype, device=student.device)
        out[:, ctx.size :] = 0
        if ctx.size > 0:
            given = Statistics(grad, *found, grad, grad)  # the gradient reads only what was saved
            divergence.gradient_into(
                out[:, : ctx.size], student[:, : ctx.size], teacher[:, : ctx.size], given, grad.contiguous(),
                *ctx.arguments, 0.0,
            )
        return out, *[None] * 7


def sharded_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float, layout: Layout,
    shard: Shard | None,
) -> tuple[Tensor, ...]:
    """(divergence, student's entropy, teacher's entropy) of checked logits (..., V_rank) with padding."""
    shape, flat = student.shape[:-1], None if mask is None else mask.reshape(-1)
    pair = (logits.reshape(shape.numel(), logits.shape[-1]) for logits in (student, teacher.detach()))
    results = _ShardedDivergence.apply(*pair, flat, kind, beta, temperature, layout, shard)
    return tuple(part.reshape(shape) for part in results)
