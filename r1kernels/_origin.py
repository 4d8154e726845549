"""What a result came from: versions, sources, device, and the content of files. Benchmarks and runs of the trainer
write it into their results."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import r1kernels
from r1kernels import _library

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent  # of a source tree
CPUINFO = Path("/proc/cpuinfo")
KERNELS, TRAINER = ("ops", "triton"), ("train", "rewards")
HASHED_SIZE = 2**24  # larger files count by their size and the time of their last change


def in_source_tree() -> bool:
    return (ROOT / "csrc").is_dir() and (ROOT / "pyproject.toml").is_file()


def sources_hash(trainer: bool = False) -> str:
    """Sixteen digits of the SHA-256 over what a measurement runs: the operations, their kernels, and csrc/ in a source
    tree; with `trainer`, the trainer and the rewards too. An installed package has no csrc/: there, its compiled
    extension takes part instead."""
    rooms = (*KERNELS, *(TRAINER if trainer else ()))
    found = [*PACKAGE.glob("*.py"), *(path for room in rooms for path in (PACKAGE / room).rglob("*.py"))]
    others = ("__init__.py", "__main__.py", "_command.py", "_origin.py")
    paths = sorted(path for path in found if path.name not in others)
    if in_source_tree():
        folder = ROOT / "csrc"
        paths += sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    else:
        paths += sorted(PACKAGE.glob("_C.*"))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\n" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def content_hash(path: str | Path) -> str:
    """A hash of a file or of the files of a directory; if neither exists, of the name itself."""
    found: dict[str, Any] = {}
    for file in sorted(file for file in (Path(path), *Path(path).rglob("*")) if file.is_file()):
        size, changed = file.stat().st_size, file.stat().st_mtime_ns
        content = hashlib.sha256(file.read_bytes()).hexdigest() if size <= HASHED_SIZE else [size, changed]
        found[str(file.relative_to(path))] = content
    return hashlib.sha256(json.dumps(found or str(path)).encode()).hexdigest()[:16]


def commit() -> str | None:
    """The short hash of the last commit of a source tree, or None."""
    if not in_source_tree():
        return None
    try:
        completed = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True,
                                   text=True)
    except OSError:
        return None
    return completed.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The name of a GPU, or that of the processor and the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    with contextlib.suppress(OSError):
        if match := re.search(r"model name\s*:\s*(.+)", CPUINFO.read_text()):
            model = match.group(1).strip()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def instruction_set() -> str | None:
    """The instruction set that the compiled CPU kernels use here, or None without them."""
    return None if _library.extension is None else _library.extension.cpu_isa()


def origin(device: torch.device | str, trainer: bool = False) -> dict[str, Any]:
    """The date, the versions, the sources (`sources_hash`) and the device of this process."""
    device = torch.device(device)
    versions = {"transformers": importlib.metadata.version("transformers")} if trainer else {}
    return {
        "date": datetime.date.today().isoformat(), "r1kernels": r1kernels.__version__, "torch": torch.__version__,
        **versions, "python": platform.python_version(), "device": device_name(device), "device_type": device.type,
        "threads": torch.get_num_threads(), "instruction_set": instruction_set() if device.type == "cpu" else None,
        "sources": sources_hash(trainer), "commit": commit(),
    }


def note_origin(origins: list[dict[str, Any]], now: dict[str, Any]) -> None:
    """Adds the origin `now` to those before it, unless only the date or the commit differs from the last one."""
    same = {"date": None, "commit": None}  # a commit may change documents alone; the sources have a hash
    if not origins or origins[-1] | same != now | same:
        origins.append(now)
