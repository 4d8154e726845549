"""Divergence from a teacher, forward and backward from the hidden states of both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

import r1kernels
from gpu import eager
from gpu.inputs import make_head
from gpu.losses import LossFunction, Problem, loss_case, with_eager
from gpu.setting import OURS, Case, Head, Setting, peers
from r1kernels.bench.peers import named

SHARED = 0.7  # of the student's hidden states in the teacher's


def ours(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, divergence: str
) -> Tensor:
    return r1kernels.linear_distillation_loss(
        student_hidden, student_weight, teacher_hidden, teacher_weight, divergence=divergence
    ).loss


def _liger() -> LossFunction:
    loss = named("liger_kernel.transformers.functional", "liger_fused_linear_jsd")
    return lambda student_hidden, student_weight, teacher_hidden, teacher_weight: loss(
        student_hidden, student_weight, teacher_hidden, teacher_weight, jsd_beta=0.5
    )


def cases(setting: Setting) -> Iterator[Case]:
    shape = Head(64, 32, 1_031) if setting.small else Head(4096, 2048, 151_936)
    hidden, weight = make_head(shape, setting.device)
    other_hidden, other_weight = make_head(shape, setting.device, seed=10)
    problem = Problem(
        {
            "student_hidden": hidden, "student_weight": weight,
            "teacher_hidden": (SHARED * hidden + SHARED * other_hidden).to(hidden.dtype),
            "teacher_weight": (SHARED * weight + SHARED * other_weight).to(weight.dtype),
        },
        leaves=("student_hidden", "student_weight"), rows=("student_hidden", "teacher_hidden"),
    )
    for kind in ("forward_kl", "jsd"):
        plain = partial(eager.linear_divergence, kind=kind)
        functions = {
            OURS: partial(ours, divergence=kind), **with_eager(plain, setting),
            **(peers(setting, {"Liger": _liger}) if kind == "jsd" else {}),
        }
        yield loss_case(
            "linear_distillation_loss", kind, shape, hidden.dtype, problem, functions, plain, few=16,
            flop=8 * shape.tokens * shape.width * shape.vocab,
            inherent_bytes=hidden.nbytes + weight.nbytes + 4 * weight.numel(),
        )
