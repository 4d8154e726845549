"""The memory of the device, and the name of the folder of its results."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


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
