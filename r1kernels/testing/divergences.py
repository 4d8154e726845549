"""Oracles of the divergences in float64. Gradients are written out, and no code is shared with `r1kernels.ops`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.testing.budget import EPS32, Expected
from r1kernels.testing.inputs import generator, random_logits

TINY32 = torch.finfo(torch.float32).tiny


def random_topk(logits: Tensor, k: int, temperature: float = 1.0, shuffled: bool = True) -> tuple[Tensor, Tensor]:
    """(ids, log-probs) of the k likeliest tokens of each row, as an inference engine returns them."""
    top = (logits.double() / temperature).log_softmax(-1).topk(k)
    order = torch.randperm(k, generator=generator(7)) if shuffled else torch.arange(k)
    return top.indices[..., order], top.values[..., order].float()


def random_pair(
    *shape: int, dtype: torch.dtype = torch.float32, distance: float = 1.0, scale: float = 4.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits. `distance` is the standard deviation of their difference."""
    student = random_logits(*shape, dtype=dtype, scale=scale, seed=seed)
    noise = torch.randn(shape, generator=generator(seed + 1000))
    return student, (student.float() + distance * noise).to(dtype)


class DivergenceExpected(NamedTuple):
    value: Expected  # (...)
    grad: Expected  # (..., V): gradient of the value with respect to the student's logits
    student_entropy: Tensor
    teacher_entropy: Tensor


class _Logs(NamedTuple):
    log_p: Tensor
    lse: Tensor
    entropy: Tensor


def _logs(logits: Tensor, temperature: float) -> _Logs:
    z = logits.detach().double() / temperature
    lse = z.logsumexp(-1, keepdim=True)
    log_p = z - lse
    return _Logs(log_p, lse, -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p).sum(-1))


def _kl_terms(a: Tensor, o: Tensor, log_ratio: Tensor) -> Tensor:
    """a log(a/o) - a + o = a (e^-r + r - 1) with r = log(a/o), by its series where that cancels."""
    r = torch.where(log_ratio.abs() < 0.1, log_ratio, 0)
    series = sum((-r) ** n / math.factorial(n) for n in range(2, 13))
    direct = torch.where(a == 0, 0, a * log_ratio) - a + o
    return torch.where(log_ratio.abs() < 0.1, a * series, direct)


def divergence(
    student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5, temperature: float = 1.0
) -> DivergenceExpected:
    """Value and gradient of D(teacher, student) for every row; q: teacher, p: student, m = beta q + (1 - beta) p."""
    s, t = _logs(student, temperature), _logs(teacher, temperature)
    p, q = s.log_p.exp(), t.log_p.exp()
    nothing = (s.log_p == -math.inf) & (t.log_p == -math.inf)
    # Not log q - log p: both are large where their difference is small.
    difference = (teacher.detach().double() - student.detach().double()) / temperature
    d = torch.where(nothing, 0, difference - (t.lse - s.lse))
    if kind == "forward_kl":
        terms = _kl_terms(q, p, d)
        terms = torch.where((p == 0) & (d == math.inf), math.inf, terms)
        value = terms.sum(-1)
        grad, grad_terms = p - q, p + q
    elif kind == "reverse_kl":
        terms = _kl_terms(p, q, -d)
        terms = torch.where(d == -math.inf, math.inf, terms)
        value = terms.sum(-1)
        log_ratio = torch.where((p == 0) | value.isinf().unsqueeze(-1), 0, -d)
        inner = torch.where(value.isinf(), 0, value).unsqueeze(-1)
        grad = torch.where(value.isinf().unsqueeze(-1), 0, p * (log_ratio - inner))
        grad_terms = p * (log_ratio.abs() + inner + 1)
    else:
        # log(q/m) = -log(beta + (1 - beta) e^-d) and log(p/m) = -log((1 - beta) + beta e^d)
        q_over_m = -torch.where(d < -30, math.log1p(-beta) - d, torch.log1p((1 - beta) * torch.expm1(-d)))
        p_over_m = -torch.where(d > 30, math.log(beta) + d, torch.log1p(beta * torch.expm1(d)))
        m = beta * q + (1 - beta) * p
        of_student = _kl_terms(p, m, p_over_m).sum(-1)
        value = beta * _kl_terms(q, m, q_over_m).sum(-1) + (1 - beta) * of_student
        log_ratio, inner = torch.where(p == 0, 0, p_over_m), of_student.unsqueeze(-1)
        grad = (1 - beta) * p * (log_ratio - inner)
        grad_terms = (1 - beta) * p * (log_ratio.abs() + inner + 1)
    # The effect of a float64 rounding of the log-sum-exps, and of probabilities below the smallest normal fp32 number.
    magnitude = 1 + sum(
        torch.where(x.isfinite(), x.detach().double(), 0).abs().amax(-1, keepdim=True) for x in (student, teacher)
    ) / temperature
    if kind != "forward_kl":
        grad_terms = grad_terms * torch.where(p < q, 1.5, 1.0)  # p is then a product of two exponentials
    grad_terms = grad_terms + (p + q) * magnitude * torch.finfo(torch.float64).eps / EPS32
    grad_terms = grad_terms + TINY32 / EPS32 * (1 + torch.where(d.isfinite(), d.abs(), 0))
    # Each of a term's three factors is rounded; the log-sum-exps' errors enter squared.
    slack = 3 * value + EPS32 + magnitude.squeeze(-1) ** 2 * torch.finfo(torch.float64).eps ** 2 / EPS32
    return DivergenceExpected(
        Expected(value, slack), Expected(grad / temperature, grad_terms / temperature), s.entropy, t.entropy
    )


def topk_divergence(
    student: Tensor, token_ids: Tensor, logprobs: Tensor, kind: str, beta: float = 0.5, temperature: float = 1.0
) -> DivergenceExpected:
    """The same over K + 1 outcomes, row by row; -inf marks an absent entry; teacher_entropy is the teacher's tail."""
    flat, vocab = student.detach().double().reshape(-1, student.shape[-1]), student.shape[-1]
    log_p = (flat / temperature).log_softmax(-1)
    values, grads, terms, tails = [], [], [], []
    for row, ids, given in zip(log_p, token_ids.reshape(-1, token_ids.shape[-1]).tolist(),
                               logprobs.double().reshape(-1, logprobs.shape[-1]).tolist(), strict=True):
        listed = {token: min(logp, 0.0) for token, logp in zip(ids, given, strict=True) if logp > -math.inf}
        tokens = list(listed)
        inside = torch.zeros(vocab, dtype=torch.bool)
        inside[tokens] = True
        log_p_top, log_p_rest = row[tokens], row[~inside].logsumexp(0) if (~inside).any() else torch.tensor(-math.inf)
        log_q_top = torch.tensor(list(listed.values()), dtype=torch.float64)
        total = log_q_top.exp().sum()
        # If the student has a tail, the teacher's is at least 1e-7; if not, a tail below 1e-3 counts as 0.
        most, within = (1.0, 1e-3) if log_p_rest == -math.inf else (1 - 1e-7, 1e-7)
        if total > 1 - within:
            log_q_top, total = log_q_top - total.log() + math.log(most), torch.tensor(most, dtype=torch.float64)
        outcomes_p = torch.cat([log_p_top, log_p_rest.double().reshape(1)])
        outcomes_q = torch.cat([log_q_top, (1 - total).log().reshape(1)])
        exact = divergence(outcomes_p.unsqueeze(0), outcomes_q.unsqueeze(0), kind, beta)
        values.append(exact.value.value)
        tails.append(1 - total)
        for source, collected in ((exact.grad.value, grads), (exact.grad.terms, terms)):
            # The tail's gradient is distributed in proportion to the student's probabilities within the tail.
            share = torch.where(inside | (row == -math.inf), 0, (row - log_p_rest).exp())
            full = share * source[0, -1]
            full[tokens] = source[0, :-1]
            collected.append(full / temperature)
    lead = student.shape[:-1]
    value = torch.cat(values).reshape(lead) if values else torch.empty(lead, dtype=torch.float64)
    magnitude = 1 + torch.where(flat.isfinite(), flat, 0).abs().amax(-1) / temperature
    # log p has the error of one rounding of its sums; so has the teacher's.
    slack = 3 * value + EPS32 + magnitude.reshape(lead) * torch.finfo(torch.float64).eps / EPS32
    entropy = _logs(student, temperature).entropy
    return DivergenceExpected(
        Expected(value, slack),
        Expected(torch.stack(grads).reshape(student.shape), torch.stack(terms).reshape(student.shape) + TINY32 / EPS32),
        entropy,
        torch.stack(tails).reshape(lead),
    )
