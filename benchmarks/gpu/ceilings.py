"""What the device can do: a copy of a large tensor, the three bare products of a head, and its weight gradient by rows.

Datasheets promise more; shares are of these two.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.inputs import make_head, normal
from gpu.setting import COPY, Candidate, Case, Setting, head_shape
from gpu.timing import Timed
from r1kernels.bench import ceilings
from r1kernels.ops.linear import gemm

PRODUCTS = ("h W^T", "dlogits W", "dlogits^T h")


def copy_of(tensor: Tensor) -> Candidate:
    return Candidate(Timed(ceilings.copy(tensor)))


def bare_products(hidden: Tensor, weight: Tensor) -> Candidate:
    """The three of a head, one after the other."""
    return Candidate(Timed(ceilings.all_products(hidden, weight)))


def copy_case(setting: Setting) -> Case:
    """Bytes are those read and those written."""
    size = 1 << 20 if setting.small else 1 << 32
    source = normal(size // 2, device=setting.device, dtype=torch.bfloat16)
    return Case(
        "ceiling", "copy", f"{size >> 20} MiB", source.dtype, {COPY: copy_of(source)}, bytes=2 * source.nbytes
    )


def product_cases(setting: Setting) -> Iterator[Case]:
    """On random data: products of zeros run faster. The first product gives the others their logits."""
    shape = head_shape(setting)
    hidden, weight = make_head(shape, setting.device)
    runs = ceilings.products(hidden, weight)
    runs[0]()
    candidates = {name: Candidate(Timed(run)) for name, run in zip(PRODUCTS, runs, strict=True)}
    yield Case(
        "ceiling", "bfloat16 products", str(shape), hidden.dtype, candidates,
        flop=2 * shape.tokens * shape.width * shape.vocab,
    )


def weight_gradient_cases(setting: Setting) -> Iterator[Case]:
    """dW of few and of many rows: added to a float32 sum, which is read and written, or rounded to 16 bits at once."""
    shape = head_shape(setting)
    for rows in (16, 64) if setting.small else (820, 2048, 8192):
        hidden = normal(rows, shape.width, device=setting.device, dtype=torch.bfloat16)
        grad_logits = normal(rows, shape.vocab, device=setting.device, dtype=torch.bfloat16, seed=1)
        total = torch.zeros(shape.vocab, shape.width, device=setting.device)
        rounded = torch.empty_like(total, dtype=torch.bfloat16)
        candidates = {
            "addmm to a float32 sum": partial(gemm.matmul, grad_logits.T, hidden, total, accumulate=True),
            "mm to float32": partial(gemm.matmul, grad_logits.T, hidden, total),
            "mm to bfloat16": partial(torch.mm, grad_logits.T, hidden, out=rounded),
        }
        yield Case(
            "ceiling", "weight gradient", str(shape._replace(tokens=rows)), hidden.dtype,
            {name: Candidate(Timed(run)) for name, run in candidates.items()},
            flop=2 * rows * shape.width * shape.vocab,
        )


def cases(setting: Setting) -> Iterator[Case]:
    yield copy_case(setting)
    yield from product_cases(setting)
