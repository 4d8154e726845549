"""`python -m r1kernels` prints versions, devices, and which implementation serves each operation, and why.

With arguments it is the command `r1kernels`, so that `python -m r1kernels train RECIPE` trains.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import r1kernels
from r1kernels import _library
from r1kernels._dispatch import OPS, TABLE, explain, faster_in_cuda, requested
from r1kernels._origin import sources_hash
from r1kernels._schemas import CUDA_OPERATORS
from r1kernels.ops import grpo_step
from r1kernels.ops.linear.gemm import route
from r1kernels.triton.sources import kernel_sources_hash

PUBLIC_OPS = {
    "token_stats": "token_logprobs, token_logprobs_and_entropy, cross_entropy; linear_* = products + token_stats",
    "policy_loss": "policy_loss; grpo_loss and linear_grpo_loss = token_stats + policy_loss (CUDA: grpo_step)",
    "group_advantages": "group_advantages",
    "kl_estimate": "kl_estimate",
    "divergence": "distillation_loss",
    "token_statistics": "token_statistics; linear_token_statistics = products + token_statistics",
}


PAIRS = {
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.float16, torch.float16): "fp16",
    (torch.float32, torch.float32): "fp32",
    (torch.bfloat16, torch.float32): "bf16 with fp32",
    (torch.float16, torch.float32): "fp16 with fp32",
}

# What a CPU multiplies bfloat16 with, by instruction set and pair; the others convert it to float32.
UNITS = {
    ("avx512_bf16", "bf16"): ", bfloat16 dot-product instructions",
    ("avx512_bf16_fma", "bf16"): ", converted to float32, because dot-product instructions are slower here",
    ("amx_bf16", "bf16"): ", matrix tiles (AMX)",
    ("amx_bf16", "bf16 with fp32"): ", matrix tiles (AMX), float32 in three bfloat16 parts",
}


def _products() -> list[str]:
    """How the linear_* functions multiply matrices of each dtype."""
    about = {choice.implementation: choice.reason for choice, _ in TABLE["product"]}
    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtypes, name in PAIRS.items():
            if explain("kernels", device, dtypes[0]).implementation == "error":
                continue  # the lines above show the error
            chosen = route(*(torch.empty(0, dtype=dtype, device=device) for dtype in dtypes))
            unit = UNITS.get((_library.extension.cpu_isa(), name), "") if chosen == "native" else ""
            lines.append(f"{'products':<18}{device:<8}{name:<16}{chosen:<12}{about[chosen]}{unit}")
    return lines


def _table() -> list[str]:
    """The implementations of each operation in the order in which they are tried, and every reason against them."""
    lines = ["served by the first of these that no reason keeps from it"]
    for operation, servers in TABLE.items():
        if operation in OPS:
            cuda = "where it was measured to be faster, or without Triton" if operation in CUDA_OPERATORS else (
                "has no kernel")
            lines.append(f"{operation:<21}as kernels; CUDA {cuda}")
            continue
        for choice, unless in servers:
            about = choice.reason or "plain PyTorch"
            lines.append(f"{operation:<21}{choice.implementation:<12}{about}{', unless' if unless else ''}")
            lines += [f"{'':<20}{reason}" for reason, _ in unless]
    lines.append("the fused kernel of grpo_step reads the logits twice if")
    return lines + [f"{'':<20}{reason}" for reason in grpo_step.PASSES.values()]


def _triton() -> str:
    missing = _library.triton_missing("cuda")
    versions = [importlib.metadata.version(name) for name in ("triton", "pytorch-triton") if _installed(name)]
    return missing or f"{' '.join(versions[:1])}, for devices of torch's type 'cuda'"


def _cuda() -> str:
    """The compiled GPU kernels: the architectures they were built for, or why they cannot run here."""
    extension = _library.extension
    missing = _library.cuda_missing("cuda")
    architectures = [] if extension is None else extension.cuda_architectures()
    if extension is None or not architectures:
        return missing
    built = f"built for {', '.join(architectures)}"
    if not torch.cuda.is_available():
        missing = extension.cuda_missing(0)
    return f"{built}; {missing}" if missing else built


def _faster_in_cuda(device: str) -> str:
    """The operators for which CUDA kernels replace Triton's on a device."""
    names = ", ".join(faster_in_cuda(device))
    return f"CUDA where it was measured to be faster: {names}" if names else "CUDA: nothing measured yet"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return devices


def results_folder() -> Path:
    """The directory in a source tree for the results of its benchmarks."""
    return Path(r1kernels.__file__).parents[1] / "benchmarks" / "results"


def _csrc_tree(root: Path) -> str:
    """The version of csrc/ in the last commit, or "" if git cannot tell."""
    try:
        completed = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD:csrc"], capture_output=True, text=True)
    except OSError:
        return ""
    return completed.stdout.strip() if completed.returncode == 0 else ""


def cuda_sources_hash(root: Path) -> str:
    """Sixteen digits of the SHA-256 of the names and texts of all sources of the CUDA kernels."""
    digest = hashlib.sha256()
    folders = (root / "csrc" / "common", root / "csrc" / "cuda")
    for path in sorted(path for folder in folders for path in folder.glob("*.*") if path.suffix != ".py"):
        digest.update(f"{path.relative_to(root).as_posix()}\n{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()[:16]


def _age(result: Any, kernels: str, csrc: str, cuda: str, *package: str) -> str:
    """Whether a result file names the hash of the current kernel sources. `sources` are those of operations and kernels
    in results of `r1kernels bench`, with the trainer in results of recipes, and those of the Triton kernels in what was
    compiled ahead of time."""
    named = result if isinstance(result, dict) else {}
    if compiled := named.get("kernels") or named.get("sources"):
        same = compiled in (kernels, f"{kernels}-{cuda}", *package)
    elif compiled := named.get("cuda_sources"):
        same = compiled == cuda
    elif not named.get("csrc_tree"):
        return "does not tell which kernels it measured"
    elif not csrc:
        return "cannot be compared without git"
    else:
        same = csrc.startswith(named["csrc_tree"])
    return "of these kernels" if same else "older than the kernels"


def _results() -> list[str]:
    """A line for each result file of a source tree."""
    folder = results_folder()
    paths = sorted((*folder.glob("*.json"), *folder.glob("*/*.json")))
    if not paths:
        return []
    root = folder.parents[1]
    hashes = (kernel_sources_hash(), _csrc_tree(root), cuda_sources_hash(root), sources_hash(),
              sources_hash(trainer=True))
    lines = []
    for path in paths:
        try:
            age = _age(json.loads(path.read_text()), *hashes)
        except ValueError:
            age = "is not JSON"
        lines.append(f"results      {path.relative_to(root)}: {age}")
    return ["", *lines]


def report() -> str:
    """The whole report as text."""
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
    lines += [f"Triton       {_triton()}", f"CUDA         {_cuda()}"]
    variable = os.environ.get("R1KERNELS_BACKEND")
    lines += [
        f"backend      {requested()}"
        + (f" (R1KERNELS_BACKEND={variable})" if variable else " (R1KERNELS_BACKEND is not set)"),
        "",
        f"{'operation':<18}{'device':<8}{'dtype':<16}{'served by':<12}why",
    ]
    rows = [("cpu", torch.float32, "fp32 bf16 fp16"), ("cpu", torch.float64, "fp64")]
    if torch.cuda.is_available():
        rows.append(("cuda", torch.float32, "fp32 bf16 fp16"))
    for op in OPS:
        for device, dtype, name in rows:
            choice = explain(op, device, dtype)
            lines.append(f"{op:<18}{device:<8}{name:<16}{choice.implementation:<12}{choice.reason}")
    if torch.cuda.is_available():
        choice = explain("kernels", "cuda", torch.bfloat16)
        if choice.implementation == "triton":
            lines.append(f"{'linear_statistics':<18}{'cuda':<8}{'bf16 fp16':<16}{'triton':<12}log-probs without logits")
            lines.append(f"{'':<54}{_faster_in_cuda(torch.cuda.get_device_name(0))}")
    lines += _products()
    lines += ["", *(f"{op:<18}serves {names}" for op, names in PUBLIC_OPS.items())]
    lines += ["", *_table()]
    lines += _results()
    if importlib.util.find_spec("transformers") is None:
        lines += ["", "trainer      transformers is missing; in a clone of the repository: pip install '.[train]'"]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        from r1kernels._command import main

        main()
    print(report())
