"""Cross-entropy forward and backward from logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import r1kernels
from gpu.cases.token_stats import GRADIENT_FLOP, STATISTICS_FLOP
from gpu.inputs import make_logits, uniform_ids
from gpu.losses import LossFunction, Problem, loss_case, with_eager
from gpu.setting import OURS, Case, Setting, logits_shapes, peers
from r1kernels.bench import eager
from r1kernels.bench.peers import liger_cross_entropy


def ours(logits: Tensor, targets: Tensor) -> Tensor:
    return r1kernels.cross_entropy(logits, targets)


def _liger() -> LossFunction:
    """Writes the gradient over its logits: a copy keeps them."""
    loss = liger_cross_entropy()
    return lambda logits, targets: loss(logits.clone(), targets)


def cases(setting: Setting) -> Iterator[Case]:
    for shape in logits_shapes(setting)[:1]:
        logits = make_logits(shape, torch.bfloat16, setting.device)
        targets = uniform_ids(shape.tokens, shape.vocab, setting.device)
        problem = Problem({"logits": logits, "targets": targets}, leaves=("logits",), rows=("logits", "targets"))
        functions = {
            OURS: ours, **with_eager(eager.cross_entropy, setting, also_compiled=True),
            **peers(setting, {"Liger (copies the logits)": _liger}),
        }
        yield loss_case(
            "cross_entropy", "forward + backward", shape, logits.dtype, problem, functions, eager.cross_entropy, few=8,
            bytes=3 * logits.nbytes, flop=(STATISTICS_FLOP + GRADIENT_FLOP) * logits.numel(),
            inherent_bytes=logits.nbytes,
        )
