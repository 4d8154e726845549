"""Divergence from a teacher's logits, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import r1kernels
from gpu.inputs import make_logits
from gpu.losses import LossFunction, Problem, loss_case, with_eager
from gpu.setting import OURS, Case, Logits, Setting, peers
from r1kernels.bench import eager
from r1kernels.bench.peers import named

KINDS = ("forward_kl", "reverse_kl", "jsd")
FLOP = 20  # of an entry, forward and backward


def ours(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    return r1kernels.distillation_loss(student, teacher, divergence=divergence).loss


def _liger() -> LossFunction:
    """Takes log-probs of both and gives KL(second || first) / rows at beta 0; so do trainers that use it."""
    loss = named("liger_kernel.transformers.functional", "liger_jsd")
    return lambda student, teacher: loss(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), beta=0.5
    )


def cases(setting: Setting) -> Iterator[Case]:
    shape = Logits(64, 1_031) if setting.small else Logits(4096, 151_936)
    student = make_logits(shape, torch.bfloat16, setting.device)
    teacher = (student * 0.7 + 0.7 * make_logits(shape, torch.bfloat16, setting.device, seed=1)).to(student.dtype)
    problem = Problem({"student": student, "teacher": teacher}, leaves=("student",), rows=("student", "teacher"))
    for kind in KINDS:
        plain = partial(eager.divergence, kind=kind)
        functions = {
            OURS: partial(ours, divergence=kind),
            **with_eager(plain, setting, kind == "forward_kl"),
            **(peers(setting, {"Liger": _liger}) if kind == "jsd" else {}),
        }
        yield loss_case(
            "distillation_loss", kind, shape, student.dtype, problem, functions, plain, few=8,
            bytes=5 * student.nbytes, flop=FLOP * student.numel(), inherent_bytes=student.nbytes,
        )
