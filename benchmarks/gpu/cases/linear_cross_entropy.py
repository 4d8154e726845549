"""Cross-entropy forward and backward from hidden states, beside its three bare products."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

import r1kernels
from gpu.ceilings import bare_products
from gpu.heads import CROSS_ENTROPY_HEADS
from gpu.inputs import make_head, sampled_ids
from gpu.losses import Problem, loss_case, with_eager
from gpu.setting import OURS, PRODUCTS, Case, Setting, cross_entropy_head_shapes, peers
from r1kernels.bench import eager


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return r1kernels.linear_cross_entropy(hidden, weight, targets)


def cases(setting: Setting) -> Iterator[Case]:
    for shape in cross_entropy_head_shapes(setting):
        hidden, weight = make_head(shape, setting.device)
        problem = Problem(
            {"hidden": hidden, "weight": weight, "targets": sampled_ids(hidden, weight)},
            leaves=("hidden", "weight"), rows=("hidden", "targets"),
        )
        functions = {
            OURS: ours, **peers(setting, CROSS_ENTROPY_HEADS), **with_eager(eager.linear_cross_entropy, setting),
        }
        yield loss_case(
            "linear_cross_entropy", "forward + backward", shape, hidden.dtype, problem, functions,
            eager.linear_cross_entropy, few=16, cuda=setting,
            extra={PRODUCTS: bare_products(hidden, weight)},
            flop=6 * shape.tokens * shape.width * shape.vocab, bytes=3 * (hidden.nbytes + weight.nbytes),
            inherent_bytes=hidden.nbytes + weight.nbytes + 4 * weight.numel(),
        )
