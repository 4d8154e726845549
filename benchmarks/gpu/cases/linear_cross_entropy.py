"""Cross-entropy forward and backward from hidden states, beside its three bare products."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

import r1kernels
from gpu import eager
from gpu.cases.linear_grpo_loss import bare_products
from gpu.inputs import make_head, sampled_ids
from gpu.losses import LossFunction, Problem, loss_case, with_compiled
from gpu.setting import OURS, PRODUCTS, Candidate, Case, Setting, head_shape, peers
from gpu.timing import Timed


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return r1kernels.linear_cross_entropy(hidden, weight, targets)


def _liger() -> LossFunction:
    functional = __import__("liger_kernel.transformers.functional", fromlist=["functional"])
    return lambda hidden, weight, targets: functional.liger_fused_linear_cross_entropy(hidden, weight, targets)


def cases(setting: Setting) -> Iterator[Case]:
    shape = head_shape(setting)
    hidden, weight = make_head(shape, setting.device)
    problem = Problem(
        {"hidden": hidden, "weight": weight, "targets": sampled_ids(hidden, weight)},
        leaves=("hidden", "weight"), rows=("hidden", "targets"),
    )
    functions = {OURS: ours, **with_compiled(eager.linear_cross_entropy, False), **peers(Liger=_liger)}
    yield loss_case(
        "linear_cross_entropy", "forward + backward", shape, hidden.dtype, problem, functions,
        eager.linear_cross_entropy, few=16, extra={PRODUCTS: Candidate(Timed(bare_products(hidden, weight)))},
        flop=6 * shape.tokens * shape.width * shape.vocab, bytes=3 * (hidden.nbytes + weight.nbytes),
        inherent_bytes=hidden.nbytes + weight.nbytes + 4 * weight.numel(),
    )
