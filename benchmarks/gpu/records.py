"""What a run leaves behind: JSON lines, each flushed as soon as it is written, and what the numbers were measured on.

Lines are of three kinds: "run" (device, versions, hash of the kernels), "started" (a case that may never end) and
"result" (a candidate of a case).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import r1kernels
from r1kernels import _dispatch

LINES = "results.jsonl"
ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def append(folder: Path, kind: str, record: Row) -> None:
    with (folder / LINES).open("a") as file:
        file.write(json.dumps({"kind": kind, **record}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Row]:
    """Every whole line; the last one may have been cut off."""
    path = folder / LINES
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def of_kind(records: Iterable[Row], kind: str) -> list[Row]:
    return [{name: value for name, value in record.items() if name != "kind"}
            for record in records if record["kind"] == kind]


def latest(results: Iterable[Row]) -> list[Row]:
    """One row for each candidate of a case: the last one measured."""
    by_place = {(row["op"], row["case"], row["shape"], row["dtype"], row["candidate"]): row for row in results}
    return list(by_place.values())


def driver() -> str:
    """Of the first device, as `nvidia-smi` tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (completed.stdout.splitlines() or ["unknown"])[0].strip()


def version_of(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except (ImportError, AttributeError):
        return None


def kernels_hash() -> str:
    from r1kernels.__main__ import cuda_sources_hash
    from r1kernels.triton.sources import kernel_sources_hash

    return f"{kernel_sources_hash()}-{cuda_sources_hash(ROOT)}"


def environment(device: torch.device, kernels: Callable[[], str] | None = None) -> Row:
    """Device, versions, and the hash of the kernel sources, those of Triton and those in CUDA C++."""
    kernels = kernels or kernels_hash
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"rehearsal on {platform.machine()}",
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "r1kernels": r1kernels.__version__,
        "kernels": kernels(),
        "backend": _dispatch.requested(),
    }
