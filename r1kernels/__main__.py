"""`python -m r1kernels`: versions, devices, and which implementation serves each operation and why."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

import r1kernels
from r1kernels import _library
from r1kernels.ops.gemm import route

PUBLIC_OPS = {
    "token_stats": "token_logprobs, token_logprobs_and_entropy, cross_entropy; linear_* = products + token_stats",
    "policy_loss": "policy_loss; grpo_loss and linear_grpo_loss = token_stats + policy_loss",
    "group_advantages": "group_advantages",
    "kl_estimate": "kl_estimate",
}


PRODUCTS = {
    "native": "our kernel",
    "onednn": "oneDNN on matrix tiles (AMX)",
    "out_dtype": "the device's library, float32 result",
    "copies": "torch, float32 copies block by block",
    "torch": "torch",
}


def _products() -> list[str]:
    """How the linear_* functions multiply matrices of each dtype."""
    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
            chosen = route(torch.empty(0, dtype=dtype, device=device))
            how = PRODUCTS[chosen]
            if chosen == "native" and dtype == torch.bfloat16 and _library.extension.has_bf16_dot():
                how += ", bfloat16 dot-product instructions"
            lines.append(f"{'products':<18}{device:<8}{name:<16}{chosen:<12}{how}")
    return lines


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return devices


def report() -> str:
    """The whole page as text."""
    extension = _library.extension
    lines = [
        f"r1kernels {r1kernels.__version__}   torch {torch.__version__}   python {platform.python_version()}   "
        f"{platform.system()} {platform.machine()}",
        f"devices      {', '.join(_devices())}",
        f"threads      {torch.get_num_threads()}",
    ]
    if extension is None:
        lines += [f"extension    missing: {_library.extension_error}", f"             {_library.HOW_TO_BUILD}"]
    else:
        lines += [f"extension    {extension.__file__}", f"CPU kernels  {extension.cpu_isa()} instruction set"]
    requested = os.environ.get("R1KERNELS_BACKEND")
    lines += [
        f"backend      {_library.requested()}"
        + (f" (R1KERNELS_BACKEND={requested})" if requested else " (R1KERNELS_BACKEND is not set)"),
        "",
        f"{'operation':<18}{'device':<8}{'dtype':<16}{'served by':<12}why",
    ]
    rows = [("cpu", torch.float32, "fp32 bf16 fp16"), ("cpu", torch.float64, "fp64")]
    if torch.cuda.is_available():
        rows.append(("cuda", torch.float32, "fp32 bf16 fp16"))
    for op in _library.OPS:
        for device, dtype, name in rows:
            choice = _library.explain(device, dtype)
            lines.append(f"{op:<18}{device:<8}{name:<16}{choice.implementation:<12}{choice.reason}")
    if extension is not None or _library.requested() != "cpu":
        lines += _products()
    lines += ["", *(f"{op:<18}serves {names}" for op, names in PUBLIC_OPS.items())]
    if importlib.util.find_spec("transformers") is None:
        lines += ["", "trainer      transformers is missing: pip install 'r1kernels[train]'"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
