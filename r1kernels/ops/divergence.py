r"""Divergence of a student p = softmax(x / T) from a teacher q = softmax(y / T), row by row, and its gradient.

    forward_kl  KL(q||p) = sum_j q_j (log q_j - log p_j)        dL/dx_j = g (p_j - q_j) / T
    reverse_kl  KL(p||q) = sum_j p_j (log p_j - log q_j)        dL/dx_j = g p_j (log p_j - log q_j - KL) / T
    jsd         beta KL(q||m) + (1 - beta) KL(p||m),            dL/dx_j = g (1 - beta) p_j (log(p_j/m_j) - KL(p||m)) / T
                m = beta q + (1 - beta) p

The kernels add terms that cannot be negative (q_j log(q_j / p_j) + p_j - q_j and the like), so a divergence near 0 is
as accurate, relatively, as a large one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.token_stats import row_blocks

KINDS = ("forward_kl", "reverse_kl", "jsd")  # in the order of `enum Divergence` in csrc/cpu/divergence.h


def _logs(beta: float, like: Tensor) -> tuple[Any, Any]:
    """log beta and log(1 - beta), as tensors in a compiled graph, where they have to be variables."""
    if not torch.compiler.is_compiling():
        return math.log(beta), math.log1p(-beta)
    variable = _library.as_tensor(beta, torch.float64, like.device)
    return variable.log(), torch.log1p(-variable)


def of_log_probs(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """Divergence over the last dimension, differentiable with respect to log_p.

    -inf means probability 0, and 0 log 0 is 0, in the gradient too. An infinite reverse KL has gradient 0: it stays
    infinite under any finite change of p.
    """
    finite_p, finite_q = (torch.where(x == -torch.inf, 0, x) for x in (log_p, log_q))
    no_p, no_q = log_p == -torch.inf, log_q == -torch.inf
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return torch.where(no_q, 0, q * (finite_q - log_p)).sum(-1)
    if kind == "reverse_kl":
        value = torch.where(no_p, 0, p * (finite_p - finite_q)).sum(-1)
        return torch.where((~no_p & no_q).any(-1), torch.inf, value)
    nowhere = no_p & no_q  # logaddexp(-inf, -inf) has no gradient
    of_q, of_p = _logs(beta, log_p)
    log_m = torch.logaddexp(torch.where(nowhere, 0, log_q) + of_q, torch.where(nowhere, 0, log_p) + of_p)
    of_teacher = torch.where(no_q, 0, q * (finite_q - log_m)).sum(-1)
    of_student = torch.where(no_p, 0, p * (finite_p - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


def log_gradient(log_p: Tensor, log_q: Tensor, kind: str, beta: float, inner: Tensor | None = None) -> Tensor:
    """w_i = P_i (h_i - sum_k P_k h_k) with h = dD/dP: the gradient through a softmax over the outcomes. `inner` (n, 1)
    is the sum, if some outcomes are elsewhere."""
    p = log_p.exp()
    if kind == "forward_kl":
        return p - log_q.exp()
    log_ratio, infinite = _log_ratio(log_p, log_q, kind, beta)
    if inner is None:
        inner = (p * log_ratio).sum(-1, keepdim=True)
    else:
        infinite = infinite | (inner == torch.inf)
    weights = torch.where(infinite, 0, p * (log_ratio - torch.where(infinite, 0, inner)))
    return (1 - beta if kind == "jsd" else 1) * weights


def truncated_gradient(log_p: Tensor, log_p_rest: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """(n, K + 1): the gradient of `of_log_probs` of K outcomes with respect to the log P of all outcomes, the rest
    last, through a softmax over all of them. P_i dD/dP_i = s_i gives w_i = s_i - P_i sum_k s_k."""
    p = log_p.exp()
    if kind == "forward_kl":
        slopes = -log_q.exp()
    else:
        log_ratio, infinite = _log_ratio(log_p, log_q, kind, beta)
        slopes = p * (log_ratio + 1) if kind == "reverse_kl" else (1 - beta) * p * log_ratio
        slopes = torch.where(infinite, 0, slopes)
    all_p = torch.cat([p, log_p_rest.exp().unsqueeze(-1)], -1)
    return torch.nn.functional.pad(slopes, (0, 1)) - all_p * slopes.sum(-1, keepdim=True)


def _log_ratio(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """log P - log Q, or log P - log M, where it counts; and in which rows it is infinite."""
    log_other = log_q
    if kind == "jsd":
        of_q, of_p = _logs(beta, log_p)
        log_other = torch.logaddexp(log_q + of_q, log_p + of_p)
    # 0 * inf = 0; an infinite reverse KL has gradient 0, as in `of_log_probs`.
    infinite = ((log_p > -torch.inf) & (log_other == -torch.inf)).any(-1, keepdim=True)
    return torch.where((log_p.exp() == 0) | infinite, 0, log_p - log_other), infinite


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)


def reference(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence, student's entropy, teacher's entropy) in plain differentiable PyTorch, 0 behind the mask."""
    dtype = torch.promote_types(accumulator_dtype(student.dtype), accumulator_dtype(teacher.dtype))

    def log_probs(logits: Tensor) -> Tensor:
        z = logits.to(dtype) / temperature
        return (z if mask is None else torch.where(mask.unsqueeze(-1), z, 0)).log_softmax(-1)

    log_p, log_q = log_probs(student), log_probs(teacher.detach())
    rows = of_log_probs(log_p, log_q, kind, beta), entropy(log_p.detach()), entropy(log_q)
    return rows if mask is None else tuple(torch.where(mask, row, 0) for row in rows)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, kind: int, beta: float, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, lse_student, lse_teacher, inner, student_entropy, teacher_entropy = _library.call(
            torch.ops.r1kernels.divergence.default, student, teacher, mask, kind, beta, temperature
        )
        ctx.save_for_backward(student, teacher, lse_student, lse_teacher, inner)
        ctx.arguments = kind, beta, temperature
        student_entropy, teacher_entropy = student_entropy.float(), teacher_entropy.float()
        ctx.mark_non_differentiable(student_entropy, teacher_entropy)
        return value, student_entropy, teacher_entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, *statistics = ctx.saved_tensors
        grad_student = _library.empty(*student.shape, dtype=student.dtype, device=student.device)
        _library.run(
            torch.ops.r1kernels.divergence_backward.default, student, *statistics, grad.contiguous(), *ctx.arguments,
            grad_student,
        )
        return grad_student, None, None, None, None, None


# ---- values and gradients from two matrices of logits, without autograd: for losses that work chunk by chunk


class Statistics(NamedTuple):
    """Each is (N,): the divergence, and in float64 both log-sum-exps, the gradient's constant and both entropies."""

    value: Tensor
    lse_student: Tensor
    lse_teacher: Tensor
    inner: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


def _block(logits: Tensor, rows: slice, dtype: torch.dtype, temperature: float) -> Tensor:
    return logits[rows].to(dtype) / temperature


def statistics(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float
) -> Statistics:
    """Statistics of (N, V) logits. Rows where `mask` is False give 0."""
    if _dispatch.select(student, "divergence", teacher) != "reference":
        return Statistics(*torch.ops.r1kernels.divergence.default(
            student, teacher, mask, KINDS.index(kind), beta, temperature
        ))
    dtype = torch.promote_types(accumulator_dtype(student.dtype), accumulator_dtype(teacher.dtype))
    value = torch.zeros(len(student), dtype=dtype, device=student.device)
    results = Statistics(value, *(value.new_zeros(value.shape, dtype=torch.float64) for _ in range(5)))
    for rows in row_blocks(student):
        log_p, log_q = (_block(logits, rows, dtype, temperature).log_softmax(-1) for logits in (student, teacher))
        lse = [_block(logits, rows, torch.float64, temperature).logsumexp(-1) for logits in (student, teacher)]
        value = of_log_probs(log_p, log_q, kind, beta)
        inner = value
        if kind == "jsd":
            inner = (log_p.exp() * _log_ratio(log_p, log_q, kind, beta)[0]).sum(-1)
        block = value, *lse, inner, entropy(log_p), entropy(log_q)
        for result, part in zip(results, block, strict=True):
            result[rows] = (part if mask is None else torch.where(mask[rows], part, 0)).to(result.dtype)
    return results


def gradient_into(
    out: Tensor, student: Tensor, teacher: Tensor, given: Statistics, grad: Tensor, kind: str, beta: float,
    temperature: float, softcap: float,
) -> Tensor:
    """sum_t grad_t D_t differentiated by the student's logits (N, V), written to `out`: see `divergence_backward`."""
    if _dispatch.select(student, "divergence", teacher) != "reference":
        torch.ops.r1kernels.divergence_backward.default(
            student, teacher, given.lse_student, given.lse_teacher, given.inner, grad, KINDS.index(kind), beta,
            temperature, out, softcap,
        )
        return out
    for rows in row_blocks(student):  # in float64, because log-probs minus `inner` cancel
        log_p, log_q = (
            _block(logits, rows, torch.float64, temperature) - lse[rows, None]
            for logits, lse in ((student, given.lse_student), (teacher, given.lse_teacher))
        )
        g = grad[rows, None].double()
        result = g * log_gradient(log_p, log_q, kind, beta, given.inner[rows, None]) / temperature
        if softcap > 0:
            tanh = student[rows].double() / softcap
            result = result * (1 - tanh) * (1 + tanh)
        out[rows] = torch.where(g == 0, 0, result).to(out.dtype)
    return out


def divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence, student's entropy, teacher's entropy) of checked logits, 0 where `mask` is False.

    The caller sends gradient 0 to masked tokens, so neither forward nor backward reads their rows.
    """
    if _dispatch.select(student, "divergence", teacher) == "reference":
        return reference(student, teacher, mask, kind, beta, temperature)
    return _Divergence.apply(student, teacher.detach(), mask, KINDS.index(kind), beta, temperature)
