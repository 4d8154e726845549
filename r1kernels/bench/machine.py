"""What is known about the device, its memory, the installed peers and the sources that are measured."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent  # of a source tree
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")


def in_source_tree() -> bool:
    return (ROOT / "csrc").is_dir() and (ROOT / "pyproject.toml").is_file()


def sources_hash() -> str:
    """Sixteen digits of the SHA-256 over what a measurement runs: the operations, their kernels, and csrc/ in a source
    tree. An installed package has no csrc/: there, its compiled extension takes part instead."""
    found = [*PACKAGE.glob("*.py"), *(PACKAGE / "ops").rglob("*.py"), *(PACKAGE / "triton").rglob("*.py")]
    paths = sorted(path for path in found if path.name not in ("__init__.py", "__main__.py", "_command.py"))
    if in_source_tree():
        folder = ROOT / "csrc"
        paths += sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    else:
        paths += sorted(PACKAGE.glob("_C.*"))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\n" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


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


def folder_name(name: str, instruction_set: str | None) -> str:
    """The folder of a device's results: its name and instruction set in lower case, with hyphens."""
    text = " ".join(filter(None, (name, instruction_set)))
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _number(path: Path) -> int | None:
    """The number in a file of the system; None if the file is absent or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _meminfo(field: str) -> int | None:
    with contextlib.suppress(OSError):
        if match := re.search(rf"{field}:\s+(\d+) kB", MEMINFO.read_text()):
            return int(match.group(1)) * 1024
    return None


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, or of the container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = _meminfo("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number(CGROUP / "memory.max")
    return min(total, limit) if limit else total


def available_bytes(device: torch.device) -> int | None:
    """Memory that a call may still take, or None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = [value for value in (_meminfo("MemAvailable"), _left_in_container()) if value is not None]
    return min(found, default=None)


def _left_in_container() -> int | None:
    """The limit of the container minus what its processes hold. Files that the system can drop do not count."""
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is None or used is None:
        return None
    with contextlib.suppress(OSError):
        if match := re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE):
            used -= int(match.group(1))
    return limit - used
