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

That is `tail="bucket"`. The other two compare the K tokens alone, by probabilities P_i (log P_i = z_i - lse):

    truncate     D = sum_k d(q_k, P_k),  d the term of a divergence;  w_i = s_i - P_i sum_k s_k,  s_i = P_i dd/dP_i
    renormalize  D of q_k / sum q and P_k / sum P;  w_rest = 0

A truncated sum is not a divergence: it can be negative, and a student can lower it by moving probability into its tail.

So the gradient kernel of `token_stats` runs on a copy of the logits in which the listed ones are -inf, and then K
entries of each row are overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops import divergence, token_stats
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.topk_teacher import Teacher, teacher_outcomes

SCRATCH_BYTES = 8 << 20  # size of the copy of the logits of one chunk of rows; it should fit in the caches


def measures(tail: str) -> tuple[str, ...]:
    """The names of the measures of every token, after the divergence. Renormalized log-probs have no tail."""
    names = ("student_entropy", "student_tail_mass", "teacher_tail_mass")
    return names[:2] if tail == "renormalize" else names


def _mass_is_zero(log_p: Tensor, log_q: Tensor, present: Tensor) -> Tensor:
    """The rows whose listed tokens have no probability in one of the distributions, so that nothing can be
    renormalized: their divergence is inf, and has gradient 0."""
    return ((log_p == -torch.inf).all(-1) | (log_q == -torch.inf).all(-1)) & present.any(-1)


def _renormalized(log_p: Tensor, zero: Tensor) -> Tensor:
    log_p = torch.where(zero.unsqueeze(-1), 0, log_p)
    return log_p - log_p.logsumexp(-1, keepdim=True)


def reference(
    student: Tensor, teacher: Teacher, mask: Tensor | None, kind: str, beta: float, temperature: float,
    tail: str = "bucket",
) -> tuple[Tensor, ...]:
    """The divergence and its `measures`, in plain differentiable PyTorch."""
    z = student.to(accumulator_dtype(student.dtype)) / temperature
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
    log_p, present = z.log_softmax(-1), teacher.present
    listed = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, teacher.token_ids, True)
    listed = listed & present.any(-1, keepdim=True)
    log_top = torch.where(present, log_p.gather(-1, teacher.token_ids), -torch.inf)
    # logsumexp over no entries has no gradient.
    empty = (listed | (log_p == -torch.inf)).all(-1, keepdim=True)
    rest = torch.where(listed, -torch.inf, log_p)
    log_rest = torch.where(empty, -torch.inf, torch.where(empty, 0, rest).logsumexp(-1, keepdim=True))
    log_rest = log_rest.squeeze(-1)
    if tail == "bucket":
        outcomes = torch.cat([log_top, log_rest.unsqueeze(-1)], -1)
        log_q = teacher_outcomes(teacher, log_rest).to(log_p.dtype)
        value = divergence.of_log_probs(outcomes, log_q, kind, beta)
        teacher_tail = log_q[..., -1].exp()
    else:
        value = _of_listed(log_top, teacher, kind, beta, tail)
        teacher_tail = teacher.tail_mass().to(value.dtype)
    rows = value, divergence.entropy(log_p.detach()), log_rest.detach().exp(), teacher_tail
    rows = rows[: 1 + len(measures(tail))]
    return rows if mask is None else tuple(torch.where(mask, row, 0) for row in rows)


def _of_listed(log_p: Tensor, teacher: Teacher, kind: str, beta: float, tail: str) -> Tensor:
    log_q = teacher.logprobs.to(log_p.dtype)
    if tail == "truncate":
        return divergence.of_log_probs(log_p, log_q, kind, beta)
    zero = _mass_is_zero(log_p, log_q, teacher.present)
    unlisted = zero | ~teacher.present.any(-1)
    value = divergence.of_log_probs(*(_renormalized(x, unlisted) for x in (log_p, log_q)), kind, beta)
    return torch.where(zero, torch.inf, torch.where(unlisted, 0, value))


class ChunkStatistics(NamedTuple):
    value: Tensor  # (n,), float64 like the rest
    weights: Tensor  # (n, K + 1): w
    lse_rest: Tensor  # (n,)
    student_entropy: Tensor
    student_tail: Tensor
    teacher_tail: Tensor

    def rows(self, tail: str) -> tuple[Tensor, ...]:
        """The divergence and its `measures`."""
        return (self.value, *self[3 : 3 + len(measures(tail))])


def hide_listed(logits: Tensor, teacher: Teacher) -> None:
    """Sets the listed logits of (n, V) rows to -inf, in place."""
    some = teacher.present.any(-1, keepdim=True)
    hidden = torch.where(some, -torch.inf, logits.gather(-1, teacher.token_ids)).to(logits.dtype)
    _write_entries(logits, teacher.token_ids, hidden)


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
    z = torch.where(teacher.present, logits.gather(-1, teacher.token_ids).double() / temperature, -torch.inf)
    hide_listed(logits, teacher)
    _, lse_rest, entropy_rest = token_stats.statistics(
        logits, teacher.token_ids[:, 0].contiguous(), mask, temperature, None
    )
    return Outcomes(z, lse_rest, entropy_rest)


def statistics_of(
    outcomes: Outcomes, teacher: Teacher, mask: Tensor | None, kind: str, beta: float, tail: str = "bucket"
) -> ChunkStatistics:
    z_top, lse_rest, entropy_rest = outcomes
    lse = torch.logaddexp(lse_rest, z_top.logsumexp(-1))
    log_p = torch.cat([z_top, lse_rest.unsqueeze(-1)], -1) - lse.unsqueeze(-1)
    log_p_rest = log_p[:, -1]
    if tail == "bucket":
        log_q = teacher_outcomes(teacher, log_p_rest)
        value = divergence.of_log_probs(log_p, log_q, kind, beta)
        weights = divergence.log_gradient(log_p, log_q, kind, beta)
        teacher_tail = log_q[:, -1].exp()
    else:
        listed, log_q = log_p[:, :-1], teacher.logprobs
        value = _of_listed(listed, teacher, kind, beta, tail)
        if tail == "truncate":
            weights = divergence.truncated_gradient(listed, log_p_rest, log_q, kind, beta)
        else:
            unlisted = _mass_is_zero(listed, log_q, teacher.present) | ~teacher.present.any(-1)
            inside = divergence.log_gradient(*(_renormalized(x, unlisted) for x in (listed, log_q)), kind, beta)
            weights = torch.nn.functional.pad(torch.where(unlisted.unsqueeze(-1), 0, inside), (0, 1))
        teacher_tail = teacher.tail_mass()
    empty = lse_rest == -torch.inf  # no finite logit could receive a gradient
    weights[:, -1] = torch.where(empty, 0, weights[:, -1])
    within = torch.where(empty, 0, log_p_rest.exp() * entropy_rest)
    entropy = divergence.entropy(log_p) + within
    rows = value, weights, lse_rest, entropy, log_p_rest.exp(), teacher_tail
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
    present = teacher.present
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
    _write_entries(out, teacher.token_ids, top.to(out.dtype))
    return out


def _write_entries(out: Tensor, ids: Tensor, values: Tensor) -> None:
    """out[n, ids[n]] = values[n]. On a CPU, torch's scatter of 16-bit numbers copies the whole matrix twice."""
    if out.device.type != "cpu" or out.dtype.itemsize != 2 or out.stride(-1) != 1 or len(out) == 0:
        out.scatter_(-1, ids, values)
        return
    flat = out.as_strided(((len(out) - 1) * out.stride(0) + out.shape[1],), (1,))
    at = ids + torch.arange(len(out), device=out.device).unsqueeze(-1) * out.stride(0)
    flat.index_copy_(0, at.reshape(-1), values.reshape(-1))


def chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
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
    """`chunks` with what belongs to their rows."""
    for rows, chunk in chunks(logits):
        yield chunk, teacher.rows(rows), None if mask is None else mask[rows]


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, token_ids: Tensor, logprobs: Tensor, present: Tensor, mask: Tensor | None, kind: str,
        beta: float, temperature: float, tail: str,
    ) -> tuple[Tensor, ...]:
        lead, k = student.shape[:-1], token_ids.shape[-1]
        teacher = Teacher(*(part.reshape(-1, k) for part in (token_ids, logprobs, present)))
        flat_mask = None if mask is None else mask.reshape(-1)
        found = [
            statistics_of(chunk_outcomes(logits, part, kept, temperature), part, kept, kind, beta, tail)
            for logits, part, kept in parts(student, teacher, flat_mask)
        ]
        if found:
            statistics = ChunkStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        else:
            none = logprobs.new_empty(0)
            statistics = ChunkStatistics(none, logprobs.new_empty(0, k + 1), none, none, none, none)
        ctx.save_for_backward(student, teacher.token_ids, teacher.present, statistics.weights, statistics.lse_rest)
        ctx.temperature = temperature
        results = tuple(part.float().reshape(lead) for part in statistics.rows(tail))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, token_ids, present, weights, lse_rest = ctx.saved_tensors
        grad_student = _library.empty(*student.shape, dtype=student.dtype, device=student.device)
        by_row, teacher = grad_student.view(-1, student.shape[-1]), Teacher(token_ids, None, present)
        write_gradient(by_row, student, teacher, weights, lse_rest, grad.reshape(-1), ctx.temperature)
        return grad_student, *[None] * 8


def write_gradient(
    out: Tensor, logits: Tensor, teacher: Teacher, weights: Tensor, lse_rest: Tensor, grad: Tensor, temperature: float
) -> None:
    """`chunk_gradient_into` of all rows of (..., V) logits."""
    for rows, chunk in chunks(logits):
        part = teacher.rows(rows)
        hide_listed(chunk, part)
        chunk_gradient_into(out[rows], chunk, part, weights[rows], lse_rest[rows], grad[rows], temperature)


def topk_divergence(
    student: Tensor, teacher: Teacher, mask: Tensor | None, kind: str, beta: float, temperature: float,
    tail: str = "bucket",
) -> tuple[Tensor, ...]:
    """The divergence of checked inputs, and its `measures`."""
    if _dispatch.select(student) == "reference":
        return reference(student, teacher, mask, kind, beta, temperature, tail)
    return _TopKDivergence.apply(student, *teacher, mask, kind, beta, temperature, tail)
