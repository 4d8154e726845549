r"""Divergence of a student from a teacher, both given by hidden states, in one walk over row chunks.

Student's and teacher's logits -> divergence -> d logits -> products with W and h. The student takes 3 units of 2 N H V
floating-point operations, the teacher takes 1, and each has a buffer of vocabulary width. If K log-probs of a row are
given, the teacher needs neither. On a CPU, d logits take the memory of the student's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels.ops import divergence, sharded_divergence, sharded_topk, topk_choice, topk_divergence
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.linear.head import Chunk, Head, Needs
from r1kernels.ops.linear.precision import without_autocast
from r1kernels.ops.linear.rows import active_rows
from r1kernels.ops.linear.walk import Walk
from r1kernels.ops.shards import Shard
from r1kernels.ops.teacher_mixture import mixed_logits
from r1kernels.ops.topk_choice import Scorer
from r1kernels.ops.topk_teacher import Teacher, make_teacher


class LinearTeacher(NamedTuple):
    """Constants, in the order of the operator: hidden (..., H') and a head, or K tokens a row (N, K); and how K tokens
    are chosen, if `top_k` is not 0."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float = 0.0
    token_ids: Tensor | None = None
    logprobs: Tensor | None = None
    top_k: int = 0
    top_k_of: str = "student"
    tail: str = "bucket"

    def walk(self, student: Walk) -> Walk | None:
        """The chunks of the teacher that belong to the chunks of the student."""
        if self.hidden is None:
            return None
        head = student.head._replace(
            weight=self.weight, bias=self.bias, lora_a=self.lora_a, lora_b=self.lora_b, logit_scale=self.logit_scale,
            softcap=self.softcap, logits_dtype=accumulator_dtype(self.hidden.dtype),
        )
        return Walk(head, student.rows.of(self.hidden))

    @property
    def has_list(self) -> bool:
        return self.top_k > 0 or self.hidden is None


def measures(teacher: LinearTeacher) -> tuple[str, ...]:
    """The names of the measures of every token, after the divergence."""
    if teacher.has_list:
        return topk_divergence.measures(teacher.tail)
    return "student_entropy", "teacher_entropy"


def _left_of_scale(head: Head) -> float:
    """The scale that the logits of a chunk still need. With a soft cap, the scale was applied before the cap."""
    return 1.0 if head.softcap > 0 else head.logit_scale


class Mixture(NamedTuple):
    """Teachers beside the first, and the weights (N, M) of all."""

    others: tuple[LinearTeacher, ...]
    coefs: Tensor


class _TeacherLogits:
    """Those of each chunk, for the temperature of the student's kernels, which includes the student's scale."""

    def __init__(self, walk: Walk, teacher: LinearTeacher, mixture: Mixture | None) -> None:
        self.walk, self.coefs = walk, None if mixture is None else mixture.coefs
        teachers = (teacher, *(() if mixture is None else mixture.others))
        self.walks = [each for each in (one.walk(walk) for one in teachers) if each is not None]
        self.chunks = [each.chunks() for each in self.walks]

    @property
    def dtype(self) -> torch.dtype:
        dtypes = [each.accumulator for each in (self.walk, *self.walks)]
        return torch.float64 if torch.float64 in dtypes else dtypes[0]

    def of(self, chunk: Chunk) -> Tensor | None:
        """None if the teacher has no logits."""
        logits = [self._scaled(*pair) for pair in zip(self.walks, self.chunks, strict=True)]
        if self.coefs is None:
            return logits[0] if logits else None
        if any(each.dtype == torch.float64 for each in logits):
            logits = [each.double() for each in logits]
        temperature = self.walk.head.kernel_temperature
        return mixed_logits(logits, self.coefs[chunk.rows], chunk.valid, temperature, in_place=True)

    def _scaled(self, walk: Walk, chunks: Iterator[Chunk]) -> Tensor:
        logits = next(chunks).logits
        scale = _left_of_scale(walk.head) / _left_of_scale(self.walk.head)
        return logits if scale == 1.0 else logits.mul_(scale)


class _Full:
    """A chunk with a teacher of the whole vocabulary."""

    def __init__(self, walk: Walk, chunk: Chunk, teacher: Tensor, kind: str, beta: float) -> None:
        self.walk, self.chunk, self.logits, self.settings = walk, chunk, teacher, (kind, beta)
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


def _listed(walk: Walk, chunk: Chunk, teacher: LinearTeacher, logits: Tensor | None, scorer: Scorer | None) -> Teacher:
    """The teacher at K tokens of each row of a chunk. `logits`: of the teacher, if there are any."""
    if teacher.token_ids is not None:
        logprobs = teacher.logprobs[chunk.rows]
        return Teacher(teacher.token_ids[chunk.rows], logprobs, logprobs > -torch.inf)
    ids, present = topk_choice.chosen_ids(chunk.logits, logits, teacher.top_k, teacher.top_k_of)
    if scorer is not None:
        rows = chunk.rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=ids.device)
        logprobs = topk_choice.scored(scorer, ids, rows, chunk.logits.shape[-1], chunk.valid)
    else:
        logprobs = topk_choice.logprobs_at(
            logits, ids, present, chunk.valid, walk.head.kernel_temperature, teacher.tail
        )
    return make_teacher(ids, logprobs, chunk.valid, present)


class _TopK:
    """A chunk with a teacher of K tokens."""

    def __init__(self, walk: Walk, chunk: Chunk, whole: Teacher, kind: str, beta: float, tail: str) -> None:
        self.walk, self.chunk, self.tail = walk, chunk, tail
        self.teacher = whole if walk.shard is None else sharded_topk.local_teacher(whole, walk.shard.layout)
        capped = walk.head.softcap > 0 and not walk.is_empty
        self.listed = chunk.logits.gather(-1, self.teacher.token_ids) if capped else None
        outcomes = topk_divergence.chunk_outcomes(
            chunk.logits, self.teacher, chunk.valid, walk.head.kernel_temperature
        )
        if walk.shard is not None:
            outcomes = sharded_topk.merged(outcomes, walk.shard)
        self.statistics = topk_divergence.statistics_of(outcomes, whole, chunk.valid, kind, beta, tail)

    def rows(self) -> tuple[Tensor, ...]:
        return self.statistics.rows(self.tail)

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
    needs: Needs, shard: Shard | None = None, scorer: Scorer | None = None, mixture: Mixture | None = None,
) -> tuple[Tensor, ...]:
    """Measurements and gradients in one walk.

    Args:
        shard: student and teacher have this rank's rows of the vocabulary. All ranks take the same chunks, and exchange
            statistics once a chunk.
        mask: (N,); rows where it is False are not computed and give 0.
        factor: 0-d; the gradients are those of factor * sum_t D_t.
        scorer: the teacher, as a function that is called once a chunk.
        mixture: the teacher is the first of several.

    Returns:
        (M, N): the divergence and the `measures`; then the gradients.
    """
    walk = Walk(head, active_rows(hidden, mask, head.capacity), needs, shard=shard)
    of_teacher = _TeacherLogits(walk, teacher, mixture)
    dtype = of_teacher.dtype
    measured = torch.zeros(1 + len(measures(teacher)), walk.rows.padded, dtype=dtype, device=walk.device)
    for chunk in walk.chunks():
        logits = of_teacher.of(chunk)
        if teacher.has_list:
            part = _TopK(walk, chunk, _listed(walk, chunk, teacher, logits, scorer), kind, beta, teacher.tail)
        else:
            part = _Full(walk, chunk, logits, kind, beta)
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
