"""Kinds of divergence, and the kernels against the float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels import backend, testing
from r1kernels.ops import divergence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = list(divergence.KINDS)
BETAS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.01), ("jsd", 0.99)]


def check(
    student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5, temperature: float = 1.0
) -> None:
    """Values, entropies, and the gradient of a random weight on each row, from the kernels."""
    g = torch.randn(student.shape[:-1], generator=testing.generator(1))
    source = student.detach().requires_grad_()
    expected = testing.divergence(student, teacher, kind, beta, temperature)
    with backend(testing.KERNELS):
        value, student_entropy, teacher_entropy = divergence.divergence(
            source, teacher, None, kind, beta, temperature
        )
    (grad,) = torch.autograd.grad(value, source, g)
    assert grad.dtype == student.dtype and value.dtype == torch.float32
    testing.assert_within(value, expected.value)
    weight = g.double().unsqueeze(-1)
    testing.assert_within(
        grad, testing.Expected(weight * expected.grad.value, weight.abs() * expected.grad.terms)
    )
    testing.assert_within(student_entropy, expected.student_entropy, 4e-6)
    testing.assert_within(teacher_entropy, expected.teacher_entropy, 4e-6)
