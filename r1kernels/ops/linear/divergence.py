r"""Divergence of a student from a teacher, both given by hidden states, in one walk over row chunks.

Student's and teacher's logits -> divergence -> d logits -> products with W and h. The student takes 3 units of 2 N H V
floating-point operations, the teacher takes 1, and each has a buffer of vocabulary width. A top-k teacher needs neither
its unit nor its buffer. On a CPU, d logits take the memory of the student's logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels.ops import divergence, sharded_divergence, sharded_topk, topk_divergence
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.linear.head import Chunk, Head, Needs
from r1kernels.ops.linear.precision import without_autocast
from r1kernels.ops.linear.rows import active_rows
from r1kernels.ops.linear.walk import Walk
from r1kernels.ops.shards import Shard
from r1kernels.ops.topk_divergence import Teacher


class LinearTeacher(NamedTuple):
    """Constants, in the order of the operator: hidden (..., H') and a head, or K tokens a row (N, K)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    logit_scale: float
    softcap: float
    token_ids: Tensor | None
    logprobs: Tensor | None

    def walk(self, student: Walk) -> Walk | None:
        """The chunks of the teacher that belong to the chunks of the student."""
        if self.hidden is None:
            return None
        head = student.head._replace(
            weight=self.weight, bias=self.bias, lora_a=self.lora_a, lora_b=self.lora_b, logit_scale=self.logit_scale,
            softcap=self.softcap, logits_dtype=accumulator_dtype(self.hidden.dtype),
        )
        return Walk(head, student.rows.of(self.hidden))


def measures(teacher: LinearTeacher) -> tuple[str, ...]:
    """The names of the measures of every token, after the divergence."""
    if teacher.hidden is None:
        return "student_entropy", "teacher_tail_mass", "student_tail_mass"
    return "student_entropy", "teacher_entropy"


def _left_of_scale(head: Head) -> float:
    """The scale that the logits of a chunk still need. With a soft cap, the scale was applied before the cap."""
    return 1.0 if head.softcap > 0 else head.logit_scale


class _Full:
    """A chunk with a teacher of the whole vocabulary."""

    def __init__(self, walk: Walk, chunk: Chunk, teacher: Walk, other: Chunk, kind: str, beta: float) -> None:
        self.walk, self.chunk, self.logits, self.settings = walk, chunk, other.logits, (kind, beta)
        # The temperature of the kernels includes the student's scale.
        scale = _left_of_scale(teacher.head) / _left_of_scale(walk.head)
        if scale != 1.0:
            self.logits.mul_(scale)
        arguments = (chunk.logits, self.logits, chunk.valid, *self.settings, walk.head.kernel_temperature)
        if walk.shard is None:
            self.statistics = divergence.statistics(*arguments)
        else:
            self.statistics = sharded_divergence.statistics(*arguments, walk.shard)

    def rows(self) -> tuple[Tensor, ...]:
        given = self.statistics
        return given.value, given.student_entropy, given.teacher_entropy

    def gradient_into(self, out: Tensor, grad: Tensor) -> Tensor:
        head = self.walk.head
        return divergence.gradient_into(
            out, self.chunk.logits, self.logits, self.statistics, grad, *self.settings, head.kernel_temperature,
            head.softcap,
        )


class _TopK:
    """A chunk with a teacher of K tokens."""

    def __init__(self, walk: Walk, chunk: Chunk, teacher: LinearTeacher, kind: str, beta: float) -> None:
        self.walk, self.chunk = walk, chunk
        whole = Teacher(teacher.token_ids[chunk.rows], teacher.logprobs[chunk.rows])
        self.teacher = whole if walk.shard is None else sharded_topk.local_teacher(whole, walk.shard.layout)
        capped = walk.head.softcap > 0 and not walk.is_empty
        self.listed = chunk.logits.gather(-1, self.teacher.token_ids) if capped else None
        outcomes = topk_divergence.chunk_outcomes(
            chunk.logits, self.teacher, chunk.valid, walk.head.kernel_temperature
        )
        if walk.shard is not None:
            outcomes = sharded_topk.merged(outcomes, walk.shard)
        self.statistics = topk_divergence.statistics_of(outcomes, whole, chunk.valid, kind, beta)

    def rows(self) -> tuple[Tensor, ...]:
        given = self.statistics
        return given.value, given.student_entropy, given.teacher_tail, given.student_tail

    def gradient_into(self, out: Tensor, grad: Tensor) -> Tensor:
        head, weights = self.walk.head, self.statistics.weights
        if self.listed is not None:
            weights[:, :-1] *= 1 - (self.listed.double() / head.softcap).square()
        return topk_divergence.chunk_gradient_into(
            out, self.chunk.logits, self.teacher, weights, self.statistics.lse_rest, grad, head.kernel_temperature,
            head.softcap,
        )


@without_autocast
def run_divergence(
    head: Head, hidden: Tensor, mask: Tensor | None, teacher: LinearTeacher, factor: Tensor, kind: str, beta: float,
    needs: Needs, shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    """Measurements and gradients in one walk.

    Args:
        shard: student and teacher have this rank's rows of the vocabulary. All ranks take the same chunks, and exchange
            statistics once a chunk.
        mask: (N,); rows where it is False are not computed and give 0.
        factor: 0-d; the gradients are those of factor * sum_t D_t.

    Returns:
        (M, N): the divergence and the `measures`; then the gradients.
    """
    walk = Walk(head, active_rows(hidden, mask, head.capacity), needs, shard=shard)
    other = teacher.walk(walk)
    dtype = walk.accumulator if other is None else torch.promote_types(walk.accumulator, other.accumulator)
    measured = torch.zeros(1 + len(measures(teacher)), walk.rows.padded, dtype=dtype, device=walk.device)
    others = None if other is None else other.chunks()
    for chunk in walk.chunks():
        if others is None:
            part = _TopK(walk, chunk, teacher, kind, beta)
        else:
            part = _Full(walk, chunk, other, next(others), kind, beta)
        measured[:, chunk.write] = torch.stack([row.to(dtype) for row in part.rows()])
        if not any(needs):
            continue
        if walk.is_empty:
            walk.sums.leave_out(chunk)
            continue
        grad = (factor.to(walk.accumulator) * head.kernel_scale).repeat(len(chunk.logits))
        if chunk.valid is not None:
            grad = torch.where(chunk.valid, grad, 0)
        grad_logits = part.gradient_into(walk.sums.memory(chunk.logits, len(grad)), grad)
        walk.sums.add(chunk, grad_logits, None, None)
    return measured[:, : walk.rows.total].contiguous(), *walk.gradients()


@torch.library.impl("r1kernels::linear_divergence", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    fields, after = len(Head._fields), len(Head._fields) + 1
    teacher = LinearTeacher(*args[after:-4])
    factor, kind, beta, needs = args[-4:]
    return run_divergence(
        Head(*args[:fields]), hidden, args[fields], teacher, factor, divergence.KINDS[kind], beta, Needs(*needs)
    )
