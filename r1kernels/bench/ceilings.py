"""What the device can do at most: bandwidth of a copy, and operations of matrix products in bfloat16 and float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels.bench.clock import Clock, Run
from r1kernels.bench.tasks import Setting, name_of

ROUNDS = 5


def copy(tensor: Tensor) -> Run:
    """One read and one write of a tensor, into memory that is already mapped."""
    target = torch.zeros_like(tensor)
    return lambda: target.copy_(tensor)


def products(hidden: Tensor, weight: Tensor) -> tuple[Run, Run, Run]:
    """h W^T, dlogits W and dlogits^T h of a head (N, H), (V, H): the least that an exact head does. The first one makes
    the logits that the others read. Results go into memory that is mapped after one run."""
    hidden = hidden.flatten(0, -2)
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return (
        lambda: torch.mm(hidden, weight.t(), out=logits),
        lambda: torch.mm(logits, weight, out=grad_hidden),
        lambda: torch.mm(logits.t(), hidden, out=grad_weight),
    )


def all_products(hidden: Tensor, weight: Tensor) -> Run:
    """The three products of a head, one after the other."""
    runs = products(hidden, weight)

    def run() -> None:
        for each in runs:
            each()

    return run


def best(run: Run, clock: Clock) -> float:
    """The shortest of a few times: a ceiling is what the device can do undisturbed."""
    run()
    return min(clock.seconds(run, 1) for _ in range(ROUNDS))


def measure(setting: Setting, clock: Clock) -> dict[str, Any]:
    size = setting.pick(32 << 20, 256 << 20, 4 << 30)
    source = torch.ones(size // 4, dtype=torch.float32, device=setting.device)
    found: dict[str, Any] = {"copy_bytes_per_s": 2 * size / best(copy(source), clock), "gemm_flops_per_s": {}}
    n, h, v = setting.pick((256, 512, 2048), (1024, 1024, 8192), (8192, 4096, 32_768))
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.ones(shape, dtype=dtype, device=setting.device) for shape in ((n, h), (h, v)))
        out = a.new_empty(n, v)
        seconds = best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), clock)
        found["gemm_flops_per_s"][name_of(dtype)] = 2 * n * h * v / seconds
    # A bfloat16 number is a float32 number: on some CPUs, products of float32 copies are faster.
    rates = found["gemm_flops_per_s"]
    rates["bfloat16"] = max(rates.values())
    return found


def text(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in found["gemm_flops_per_s"].items())
    return f"ceilings: copy {found['copy_bytes_per_s'] / 1e9:.3g} GB/s; products {rates}"
