"""What the device can do at most: bandwidth of a copy, and operations of matrix products in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from r1kernels.bench.clock import Clock
from r1kernels.bench.tasks import Setting, name_of

ROUNDS = 5


def best(run: Callable[[], object], clock: Clock) -> float:
    """The shortest of a few times: a ceiling is what the device can do undisturbed."""
    run()
    return min(clock.seconds(run, 1) for _ in range(ROUNDS))


def measure(setting: Setting, clock: Clock) -> dict[str, Any]:
    size = setting.pick(32 << 20, 256 << 20, 4 << 30)
    source = torch.ones(size // 4, dtype=torch.float32, device=setting.device)
    target = torch.zeros_like(source)
    found: dict[str, Any] = {
        "copy_bytes_per_s": 2 * size / best(lambda: target.copy_(source), clock), "gemm_flops_per_s": {}}
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
    products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in found["gemm_flops_per_s"].items())
    return f"ceilings: copy {found['copy_bytes_per_s'] / 1e9:.3g} GB/s; products {products}"
