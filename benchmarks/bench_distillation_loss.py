"""Divergence from a teacher's bfloat16 logits, from its 64 likeliest tokens, and from the hidden states of both."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from conftest import SHAPES, Batch, quietly
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


def step(run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], None]:
    """Forward and backward."""

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        run().backward()

    return both


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def bench_distillation_loss(
    kind: str, shape: str, batches: Callable[[str], Batch], in_turns: Callable[..., object]
) -> None:
    batch = batches(shape)
    teacher = make_teacher(batch)
    candidates: dict[str, Callable[[], None]] = {}
    for name, make in IMPLEMENTATIONS.items():
        implementation = make()
        check(implementation, batch.logits, teacher, kind)
        candidates[name] = step(partial(implementation, batch.logits, teacher, kind), [batch.logits])
    if kind == "forward_kl":
        candidates[f"r1kernels, top {K} of the teacher"] = topk_step(batch.logits, teacher)
    slow = {name: 2 for name in IMPLEMENTATIONS if name != "r1kernels"}
    in_turns(candidates, op=f"distillation_loss, {kind}", shape=shape, rounds=5, slow=slow)


def topk_ours(student: Tensor, token_ids: Tensor, logprobs: Tensor) -> Tensor:
    return r1kernels.distillation_loss(student, teacher_token_ids=token_ids, teacher_logprobs=logprobs).loss


def topk_eager(student: Tensor, token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """Forward KL over the listed tokens and one that stands for all the others."""
    log_p = student.log_softmax(-1)
    log_p_rest = log_p.scatter(-1, token_ids, -math.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([log_p.gather(-1, token_ids), log_p_rest], -1)
    log_q = torch.cat([logprobs, torch.log1p(-logprobs.exp().sum(-1, keepdim=True))], -1)
    return torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="sum") / log_p[..., 0].numel()


def topk_step(student: Tensor, teacher: Tensor) -> Callable[[], None]:
    top = teacher.float().log_softmax(-1).topk(K)
    student_rows, *listed = (x[:1, :8].detach() for x in (student, top.indices, top.values))
    exact = topk_eager(student_rows.double(), listed[0], listed[1].double())
    torch.testing.assert_close(topk_ours(student_rows, *listed).double(), exact, rtol=1e-5, atol=0)
    return step(partial(topk_ours, student, top.indices, top.values), [student])


# ---- from hidden states -------------------------------------------------------------------------------------

WIDTHS = 1024, 2048  # of student and teacher


class Models(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def make_models(shape: str) -> Models:
    """bfloat16 hidden states and heads whose logits have a standard deviation of 3."""
    b, t, vocab = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, width: int, size: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, generator=generator) * size).bfloat16()

    tensors = [x for width in WIDTHS for x in (normal(b * t, width), normal(vocab, width, 3 / math.sqrt(width)))]
    for student in tensors[:2]:
        student.requires_grad_()
    return Models(*tensors)


def linear_ours(models: Models) -> Tensor:
    return r1kernels.linear_distillation_loss(*models, divergence="jsd").loss


def linear_dense(models: Models) -> Tensor:
    """As trainers write it, logits in the dtype of the models."""
    hidden, weight, teacher_hidden, teacher_weight = models
    return eager(hidden @ weight.T, teacher_hidden @ teacher_weight.T, "jsd")


def liger() -> Callable[[Models], Tensor] | None:
    chunked = quietly(lambda: importlib.import_module("liger_kernel.chunked_loss"))
    if chunked is None:
        return None
    loss = chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    return lambda models: loss(*models, torch.zeros(len(models.student_hidden), dtype=torch.int64))


LINEAR: dict[str, tuple[Callable[[], Callable[[Models], Tensor] | None], float]] = {  # and the loss's tolerance
    "r1kernels": (lambda: linear_ours, 1e-5),
    "torch eager": (lambda: linear_dense, 1e-2),
    "Liger 0.8.5": (liger, 1e-2),  # its divergence is computed in bfloat16
}


def bench_linear_distillation_loss(in_turns: Callable[..., object]) -> None:
    shape = next(iter(SHAPES))
    models = make_models(shape)
    hidden, weight, *teacher = (x.detach() for x in models)
    few = Models(hidden[:8], weight, teacher[0][:8], teacher[1])
    exact = linear_dense(Models(*(x.double() for x in few)))
    candidates: dict[str, Callable[[], None]] = {}
    for name, (make, tolerance) in LINEAR.items():
        if (implementation := make()) is not None:
            torch.testing.assert_close(implementation(few).double(), exact, rtol=tolerance, atol=0)
            candidates[name] = step(partial(implementation, models), models[:2])
    in_turns(candidates, op="linear_distillation_loss, jsd", shape=shape, rounds=3)
