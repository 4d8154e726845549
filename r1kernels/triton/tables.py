"""Tiles that were measured on a device, for the `config` functions; written by benchmarks/tune.py. Imports no Triton.

One small file per device, tables/<device name>.json: {"configs": {op: {dtype: {class of the size: fields of the op's
Config}}}}. Where a device has no file, or a file no entry, `config` decides by itself.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tables"
SHORT, MEDIUM = 16_384, 65_536
SIZES = (1, SHORT, MEDIUM)  # one of each class


def size_class(size: int) -> str:
    """Of the vocabulary, or of whatever an op's tile depends on."""
    return "short" if size < SHORT else "medium" if size < MEDIUM else "long"


def file_name(device_name: str) -> str:
    """"NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


@functools.cache
def _configs(device_name: str) -> dict[str, Any]:
    path = FOLDER / file_name(device_name)
    return json.loads(path.read_text())["configs"] if device_name and path.is_file() else {}


def tuned(op: str, device_name: str, dtype: torch.dtype, size: int) -> dict[str, int] | None:
    """The fields of the Config that was fastest for an op on a device, or None where none was measured."""
    by_dtype = _configs(device_name).get(op, {})
    found = by_dtype.get(str(dtype).removeprefix("torch."), {}).get(size_class(size))
    return None if found is None else dict(found)
