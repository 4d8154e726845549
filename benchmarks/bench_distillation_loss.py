"""Divergence from a teacher's bfloat16 logits, forward and backward, and from its 64 likeliest tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import SHAPES, Batch
from torch import Tensor

import r1kernels

KINDS = ("forward_kl", "reverse_kl", "jsd")
K = 64
Implementation = Callable[[Tensor, Tensor, str], Tensor]


def ours(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    return r1kernels.distillation_loss(student, teacher, divergence=kind).loss


def eager(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """As trainers write it: log-softmaxes in float32 and `kl_div`."""
    kl = torch.nn.functional.kl_div
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (x.to(dtype).log_softmax(-1).flatten(0, -2) for x in (student, teacher))
    if kind == "forward_kl":
        return kl(log_p, log_q, log_target=True, reduction="batchmean")
    if kind == "reverse_kl":
        return kl(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum(kl(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q)) / 2


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {
    "r1kernels": lambda: ours,
    "torch eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager),
}


def make_teacher(batch: Batch) -> Tensor:
    """Logits as wide apart from the student's as two models' may be."""
    return (batch.logits.detach() * 0.7 + batch.logits.detach().roll(1, 0) * 0.7).contiguous()


def check(implementation: Implementation, student: Tensor, teacher: Tensor, kind: str) -> None:
    """No number without the equality check: a few rows against float64."""
    student, teacher = student[:1, :8].detach(), teacher[:1, :8]
    exact = eager(student.double(), teacher.double(), kind)
    torch.testing.assert_close(implementation(student, teacher, kind).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def bench_distillation_loss(
    name: str, kind: str, shape: str, batches: Callable[[str], Batch], measure: Callable[..., None]
) -> None:
    implementation, batch = IMPLEMENTATIONS[name](), batches(shape)
    teacher = make_teacher(batch)
    check(implementation, batch.logits, teacher, kind)

    def run() -> None:
        batch.logits.grad = None
        implementation(batch.logits, teacher, kind).backward()

    rounds = 11 if name == "r1kernels" else 3
    measure(run, rounds=rounds, op=f"distillation_loss, {kind}", shape=shape, implementation=name)


@pytest.mark.parametrize("shape", SHAPES)
def bench_topk_teacher(shape: str, batches: Callable[[str], Batch], measure: Callable[..., None]) -> None:
    batch = batches(shape)
    top = make_teacher(batch).float().log_softmax(-1).topk(K)

    def run() -> None:
        batch.logits.grad = None
        loss, _ = r1kernels.distillation_loss(
            batch.logits, teacher_token_ids=top.indices, teacher_logprobs=top.values
        )
        loss.backward()

    measure(run, rounds=11, op=f"distillation_loss, top {K}", shape=shape, implementation="r1kernels")
