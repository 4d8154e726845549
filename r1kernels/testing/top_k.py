"""Oracle of the divergence over K tokens that are chosen from logits, in float64, row by row.

No code is shared with `r1kernels.ops`: ids are sorted in Python, and gradients come from autograd of the formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.testing.budget import EPS32, Expected


class TopKExpected(NamedTuple):
    value: Expected  # (...)
    grad: Expected  # (..., V): gradient of the value with respect to the student's logits
    ids: list[list[int]]  # of each row
    student_tail: Tensor  # (...)
    teacher_tail: Tensor


def largest(row: Tensor, k: int) -> list[int]:
    """The ids of the k largest entries; of equal ones, the smaller id is first."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[:k]


def chosen(student: Tensor, teacher: Tensor, k: int, of: str) -> list[int]:
    ours, theirs = largest(student, k), largest(teacher, k)
    return {"student": ours, "teacher": theirs, "union": ours + [j for j in theirs if j not in ours]}[of]


def top_k_divergence(
    student: Tensor, teacher: Tensor, k: int, of: str = "student", tail: str = "bucket", kind: str = "reverse_kl",
    beta: float = 0.5, temperature: float = 1.0,
) -> TopKExpected:
    """Of (..., V) logits whose entries are finite."""
    vocab, lead = student.shape[-1], student.shape[:-1]
    rows = [_row(*pair, k, of, tail, kind, beta, temperature) for pair in zip(
        student.detach().double().reshape(-1, vocab), teacher.detach().double().reshape(-1, vocab), strict=True
    )]
    values, slacks, grads, terms, ids, *tails = zip(*rows, strict=True)
    value = Expected(torch.stack(values).reshape(lead), torch.stack(slacks).reshape(lead))
    grad = Expected(torch.stack(grads).reshape(student.shape), torch.stack(terms).reshape(student.shape))
    return TopKExpected(value, grad, list(ids), *(torch.stack(each).reshape(lead) for each in tails))


def _row(
    student: Tensor, teacher: Tensor, k: int, of: str, tail: str, kind: str, beta: float, temperature: float
) -> tuple:
    ids = chosen(student, teacher, k, of)
    x = student.clone().requires_grad_()
    others = torch.ones(len(x), dtype=torch.bool)
    others[ids] = False
    p_all, q_all = (x / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    p, q, p_rest, q_rest = p_all[ids], q_all[ids], p_all[others].sum(), q_all[others].sum()
    tails = p_rest.detach(), q_rest
    if tail == "bucket" and others.any():
        if q_rest < 1e-7:
            q, q_rest = q / q.sum() * (1 - 1e-7), torch.tensor(1e-7, dtype=torch.float64)
        p, q = torch.cat([p, p_rest.reshape(1)]), torch.cat([q, q_rest.reshape(1)])
    elif tail == "renormalize":
        p, q = p / p.sum(), q / q.sum()
    m = beta * q + (1 - beta) * p
    parts = {
        "forward_kl": q * (q / p).log(), "reverse_kl": p * (p / q).log(),
        "jsd": beta * q * (q / m).log() + (1 - beta) * p * (p / m).log(),
    }[kind]
    value = parts.sum()
    (grad,) = torch.autograd.grad(value, x)
    # Each log-prob has the error of a rounded log-sum-exp, and each term is a product of rounded factors.
    distance = ((p / q).log().abs() * (p + q)).sum().detach() + value.detach().abs() + 1
    magnitude = 1 + (student.abs().max() + teacher.abs().max()) / temperature * torch.finfo(torch.float64).eps / EPS32
    slack = (parts.abs().sum().detach() + EPS32 + (p + q).sum().detach()) * magnitude
    terms = p_all.detach() + q_all
    if tail == "bucket" and others.any():  # the rest gets its share of the slope of one outcome
        terms = torch.where(others, p_all.detach() / tails[0] * (tails[0] + q_rest), terms)
    terms = terms * distance * magnitude / temperature
    listed = torch.zeros_like(terms)
    listed[ids] = (p_all.detach() + q_all)[ids] * (p_all.detach() / q_all).log().abs()[ids] / temperature
    if tail == "renormalize":
        scale = 1 / min(float(1 - tails[0]), float(1 - q_rest)) if len(ids) < len(x) else 1.0
        terms, listed = terms * scale, listed * scale
    return value.detach(), slack, grad, terms + listed + math.ulp(0.0), ids, *tails
