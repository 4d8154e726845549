r"""Divergence of a student from a teacher of which only the K likeliest tokens are known.

The divergence is taken over K + 1 outcomes: the K tokens, and one outcome for all other tokens together,

    q_rest = max(1e-7, 1 - sum_k q_k),    p_rest = sum of p_j over the tokens that are not listed.

Log-probs in float32 cannot tell a smaller tail from no tail: those of a confident teacher add up to 1 except for
rounding, and rounding must not decide whether reverse KL is infinite. Where the floor takes effect, the q_k are scaled
to add up to 1 - 1e-7, so that the outcomes stay a distribution and the divergence stays at least 0.

Merging outcomes cannot increase a divergence (log-sum inequality). So, except for the floor, the result is a lower
bound of the full divergence, and 0 does not mean that the tails agree. With z = x / T, a divergence D of the outcomes'
probabilities P_i, and w_i the gradient of D with respect to log P_i (of a normalised P),

    dD/dx_j = w_j / T  for a listed j,        dD/dx_j = w_rest softmax_j(z over the tail) / T  for the others.

So the gradient kernel of `token_stats` runs on a copy of the logits in which the listed ones are -inf, and then K
entries of each row are overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops import divergence, token_stats
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype, values_are_free

SCRATCH_BYTES = 8 << 20  # size of the copy of the logits of one chunk of rows; it should fit in the caches
ROUNDING = 1e-3  # how far above 0 a log-prob may be; a teacher's tail below this may count as 0
TAIL_FLOOR = 1e-7  # the smallest tail of a teacher if the student has a tail
TOO_MUCH = 1.01  # log-probs in bfloat16 can add up to a little more than 1


class Teacher(NamedTuple):
    """K tokens a row: ids in [0, V) and log-probs in float64, -inf for absent entries (whose ids are ignored).

    Absent entries carry the id of the row's first present one, or 0 in rows without any.
    """

    token_ids: Tensor  # (..., K)
    logprobs: Tensor  # (..., K)

    def present(self) -> Tensor:
        return self.logprobs > -torch.inf


def _position(bad: Tensor) -> tuple[int, ...]:
    return tuple(bad.nonzero()[0].tolist())


def check_values(token_ids: Tensor, logprobs: Tensor, vocab: int, mask: Tensor | None) -> None:
    """Raises ValueError for values that no teacher returns. It checks only if that costs no synchronisation."""
    if not values_are_free(token_ids):
        return
    active = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(token_ids)
    bad = active & ~(logprobs <= ROUNDING)
    if bad.any():
        at = _position(bad)
        raise ValueError(f"teacher_logprobs{list(at)} is {float(logprobs[at])}, expected a log-prob <= 0 (or -inf)")
    active = active & (logprobs > -torch.inf)
    bad = active & ((token_ids < 0) | (token_ids >= vocab))
    if bad.any():
        at = _position(bad)
        raise ValueError(f"teacher_token_ids{list(at)} is {int(token_ids[at])}, expected an id in [0, {vocab})")
    # Absent entries get distinct numbers that are not ids.
    absent = -1 - torch.arange(token_ids.shape[-1], device=token_ids.device)
    ordered = torch.where(active, token_ids, absent).sort(-1).values
    bad = ordered[..., 1:] == ordered[..., :-1]
    if bad.any():
        at = _position(bad)
        raise ValueError(
            f"teacher_token_ids{list(at[:-1])} holds {int(ordered[at])} twice, expected distinct ids "
            "(-inf in teacher_logprobs marks an entry as absent)"
        )
    total = torch.where(active, logprobs.double(), -torch.inf).exp().sum(-1)
    bad = total > TOO_MUCH
    if bad.any():
        at = _position(bad)
        raise ValueError(
            f"teacher_logprobs{list(at)} add up to a probability of {float(total[at]):.4g}, expected at most 1"
        )


def make_teacher(token_ids: Tensor, logprobs: Tensor, mask: Tensor | None) -> Teacher:
    """Replaces absent entries and all values behind the mask by harmless values."""
    present = logprobs > -torch.inf
    if mask is not None:
        present = present & mask.unsqueeze(-1)
    first = torch.where(present, token_ids, 0).gather(-1, present.to(torch.int8).argmax(-1, keepdim=True))
    logprobs = torch.where(present, logprobs.detach().double().clamp(max=0), -torch.inf)
    # A total above 1 is due to rounding: it is scaled down.
    total = logprobs.exp().sum(-1, keepdim=True)
    logprobs = torch.where(total > 1, logprobs - total.log(), logprobs)
    return Teacher(torch.where(present, token_ids, first), logprobs)


def teacher_outcomes(teacher: Teacher, log_p_rest: Tensor) -> Tensor:
    """Log-probabilities (..., K + 1) of the teacher's outcomes, the tail last.

    The teacher's tail is at least `TAIL_FLOOR`. If the student has no tail (for example, K = V), a teacher's tail
    within rounding counts as 0 too: otherwise the teacher would be infinitely far away.
    """
    total = teacher.logprobs.exp().sum(-1)
    no_tail = log_p_rest == -torch.inf
    none, least = no_tail & (total > 1 - ROUNDING), ~no_tail & (total > 1 - TAIL_FLOOR)
    log_rest = torch.where(least, math.log(TAIL_FLOOR), torch.log1p(-total.clamp(max=1)))
    log_rest = torch.where(none, -torch.inf, log_rest)
    # The listed probabilities are scaled so that they and the tail add up to 1.
    to_one = -total.log()
    shift = torch.where(least, to_one + math.log1p(-TAIL_FLOOR), torch.where(none, to_one, 0))
    return torch.cat([teacher.logprobs + shift.unsqueeze(-1), log_rest.unsqueeze(-1)], -1)


def reference(
    student: Tensor, teacher: Teacher, mask: Tensor | None, kind: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergence, student's entropy, teacher's tail, student's tail) in plain differentiable PyTorch."""
    z = student.to(accumulator_dtype(student.dtype)) / temperature
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
    log_p, present = z.log_softmax(-1), teacher.present()
    listed = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, teacher.token_ids, True)
    listed = listed & present.any(-1, keepdim=True)
    log_top = torch.where(present, log_p.gather(-1, teacher.token_ids), -torch.inf)
    # logsumexp over no entries has no gradient.
    empty = (listed | (log_p == -torch.inf)).all(-1, keepdim=True)
    rest = torch.where(listed, -torch.inf, log_p)
    log_rest = torch.where(empty, -torch.inf, torch.where(empty, 0, rest).logsumexp(-1, keepdim=True))
    outcomes = torch.cat([log_top, log_rest], -1)
    log_q = teacher_outcomes(teacher, log_rest.squeeze(-1)).to(log_p.dtype)
    value = divergence.of_log_probs(outcomes, log_q, kind, beta)
    rows = value, divergence.entropy(log_p.detach()), log_q[..., -1].exp(), log_rest.detach().squeeze(-1).exp()
    return rows if mask is None else tuple(torch.where(mask, row, 0) for row in rows)


class ChunkStatistics(NamedTuple):
    value: Tensor  # (n,), float64 like the rest
    weights: Tensor  # (n, K + 1): w
    lse_rest: Tensor  # (n,)
    student_entropy: Tensor
    teacher_tail: Tensor
    student_tail: Tensor


def hide_listed(logits: Tensor, teacher: Teacher) -> None:
    """Sets the listed logits of (n, V) rows to -inf, in place."""
    some = teacher.present().any(-1, keepdim=True)
    hidden = torch.where(some, -torch.inf, logits.gather(-1, teacher.token_ids)).to(logits.dtype)
    logits.scatter_(-1, teacher.token_ids, hidden)


class Outcomes(NamedTuple):
    """The outcomes of (n, V) rows before they are normalised, in float64; of a shard, those of its rows."""

    z: Tensor  # (n, K): of listed tokens, -inf for absent ones
    lse_rest: Tensor  # (n,), of the others
    entropy_rest: Tensor  # (n,), within the others; NaN where there are none


def chunk_outcomes(logits: Tensor, teacher: Teacher, mask: Tensor | None, temperature: float) -> Outcomes:
    """Outcomes of (n, V) rows. Hides the listed logits in place, as `chunk_gradient_into` expects."""
    if logits.shape[-1] == 0:
        nothing = torch.full(teacher.logprobs.shape, -torch.inf, dtype=torch.float64, device=logits.device)
        return Outcomes(nothing, nothing.new_full(nothing.shape[:1], -torch.inf), nothing.new_zeros(nothing.shape[:1]))
    z = torch.where(teacher.present(), logits.gather(-1, teacher.token_ids).double() / temperature, -torch.inf)
    hide_listed(logits, teacher)
    _, lse_rest, entropy_rest = token_stats.statistics(
        logits, teacher.token_ids[:, 0].contiguous(), mask, temperature, None
    )
    return Outcomes(z, lse_rest, entropy_rest)


def statistics_of(outcomes: Outcomes, teacher: Teacher, mask: Tensor | None, kind: str, beta: float) -> ChunkStatistics:
    z_top, lse_rest, entropy_rest = outcomes
    lse = torch.logaddexp(lse_rest, z_top.logsumexp(-1))
    log_p = torch.cat([z_top, lse_rest.unsqueeze(-1)], -1) - lse.unsqueeze(-1)
    p, log_p_rest = log_p.exp(), log_p[:, -1]
    log_q = teacher_outcomes(teacher, log_p_rest)
    value = divergence.of_log_probs(log_p, log_q, kind, beta)
    weights = divergence.log_gradient(log_p, log_q, kind, beta)
    empty = lse_rest == -torch.inf  # no finite logit could receive a gradient
    weights[:, -1] = torch.where(empty, 0, weights[:, -1])
    within = torch.where(empty, 0, p[:, -1] * entropy_rest)
    entropy = divergence.entropy(log_p) + within
    rows = value, weights, lse_rest, entropy, log_q[:, -1].exp(), p[:, -1]
    if mask is not None:
        rows = tuple(torch.where(mask if row.dim() == 1 else mask.unsqueeze(-1), row, 0) for row in rows)
    return ChunkStatistics(*rows)


def chunk_gradient_into(
    out: Tensor, hidden: Tensor, teacher: Teacher, weights: Tensor, lse_rest: Tensor, grad: Tensor, temperature: float,
    softcap: float = 0.0,
) -> Tensor:
    """Writes dL/dlogits (n, V) of rows whose listed logits are hidden to `out`: see `token_stats.gradient_into`.

    In a shard, the teacher's entries in other shards are absent, and `lse_rest` is that of all shards. Rows where
    `grad` is 0 are not read and give 0. With a `softcap`, the listed tokens' weights include its slope.
    """
    weights = torch.where(grad.unsqueeze(-1) == 0, 0, weights * grad.unsqueeze(-1))
    present = teacher.present()
    # The kernel treats the entry of its token differently. That is a listed token, so the entry is overwritten; or no
    # token of the row is listed here, and the entry is one of the others.
    ids = teacher.token_ids[:, 0].contiguous()
    given = (lse_rest, torch.zeros_like(lse_rest), -weights[:, -1].to(accumulator_dtype(hidden.dtype)), None)
    some = present.any(-1, keepdim=True)
    other = token_stats.target_gradient(hidden, ids, *given, temperature, None, softcap, some.squeeze(-1))
    token_stats.gradient_into(
        out, hidden, ids, *given, temperature=temperature, temperatures=None, softcap=softcap, rows=None
    )
    top = weights[:, :-1] / temperature
    # Absent entries repeat the first present one, id and value.
    first = top.gather(-1, present.to(torch.int8).argmax(-1, keepdim=True))
    top = torch.where(some, torch.where(present, top, first), other.unsqueeze(-1))
    return out.scatter_(-1, teacher.token_ids, top.to(out.dtype))


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Copies of consecutive rows of (..., V), within the scratch memory, and their positions among all rows."""
    vocab, count = logits.shape[-1], logits.shape[:-1].numel()
    logits = logits.unsqueeze(0) if logits.dim() == 1 else logits
    step = max(1, SCRATCH_BYTES // (vocab * logits.element_size()))
    for begin in range(0, count, step):
        rows = slice(begin, min(begin + step, count))
        if logits.dim() == 2:
            yield rows, logits[rows].clone(memory_format=torch.contiguous_format)
        elif logits.is_contiguous():
            yield rows, logits.view(count, vocab)[rows].clone()
        else:
            index = torch.arange(rows.start, rows.stop, device=logits.device)
            yield rows, logits[torch.unravel_index(index, logits.shape[:-1])].contiguous()


def parts(
    logits: Tensor, teacher: Teacher, mask: Tensor | None
) -> Iterator[tuple[Tensor, Teacher, Tensor | None]]:
    """`_chunks` with what belongs to their rows."""
    for rows, chunk in _chunks(logits):
        yield chunk, Teacher(*(part[rows] for part in teacher)), None if mask is None else mask[rows]


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, token_ids: Tensor, logprobs: Tensor, mask: Tensor | None, kind: str, beta: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lead, k = student.shape[:-1], token_ids.shape[-1]
        teacher = Teacher(token_ids.reshape(-1, k), logprobs.reshape(-1, k))
        flat_mask = None if mask is None else mask.reshape(-1)
        chunks = [
            statistics_of(chunk_outcomes(logits, part, kept, temperature), part, kept, kind, beta)
            for logits, part, kept in parts(student, teacher, flat_mask)
        ]
        if chunks:
            statistics = ChunkStatistics(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
        else:
            none = logprobs.new_empty(0)
            statistics = ChunkStatistics(none, logprobs.new_empty(0, k + 1), none, none, none, none)
        ctx.save_for_backward(student, *teacher, statistics.weights, statistics.lse_rest)
        ctx.temperature = temperature
        results = tuple(
            part.float().reshape(lead)
            for part in (statistics.value, statistics.student_entropy, statistics.teacher_tail, statistics.student_tail)
        )
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, token_ids, logprobs, weights, lse_rest = ctx.saved_tensors
        grad_student = _library.empty(*student.shape, dtype=student.dtype, device=student.device)
        by_row, teacher = grad_student.view(-1, student.shape[-1]), Teacher(token_ids, logprobs)
        write_gradient(by_row, student, teacher, weights, lse_rest, grad.reshape(-1), ctx.temperature)
        return grad_student, None, None, None, None, None, None


def write_gradient(
    out: Tensor, logits: Tensor, teacher: Teacher, weights: Tensor, lse_rest: Tensor, grad: Tensor, temperature: float
) -> None:
    """`chunk_gradient_into` of all rows of (..., V) logits."""
    for rows, chunk in _chunks(logits):
        part = Teacher(*(tensor[rows] for tensor in teacher))
        hide_listed(chunk, part)
        chunk_gradient_into(out[rows], chunk, part, weights[rows], lse_rest[rows], grad[rows], temperature)


def topk_divergence(
    student: Tensor, teacher: Teacher, mask: Tensor | None, kind: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergence, student's entropy, teacher's tail mass, student's tail mass) of checked inputs."""
    if _dispatch.select(student) == "reference":
        return reference(student, teacher, mask, kind, beta, temperature)
    return _TopKDivergence.apply(student, *teacher, mask, kind, beta, temperature)
