"""The document of results: what was measured, what was left out and why. It is written after each case."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from r1kernels import _origin
from r1kernels.bench import machine
from r1kernels.bench.peers import DISTRIBUTIONS

FORMAT = 1
FILE, PAGE = "bench.json", "bench.html"


class Results:
    """Rows, fidelity, ceilings and what is left out, with the facts of the device."""

    def __init__(self, device: torch.device, size: str) -> None:
        self.about: dict[str, Any] = {
            "format": FORMAT, **_origin.origin(device), "peers": {}, "memory_bytes": machine.memory_bytes(device),
            "size": size,
        }
        self.ceilings: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.fidelity: list[dict[str, Any]] = []
        self._left_out: dict[tuple[str, str], list[str]] = {}

    def imported(self, implementation: str) -> None:
        """Notes the version of a library that takes part."""
        if (name := DISTRIBUTIONS.get(implementation)) is not None:
            self.about["peers"][name] = importlib.metadata.version(name)

    def leave_out(self, what: str, why: str, where: str = "") -> None:
        """Notes that `what` is missing. The same reason in several places makes one entry."""
        places = self._left_out.setdefault((what, why), [])
        if where and where not in places:
            places.append(where)

    def left_out(self) -> list[dict[str, str]]:
        return [{"what": f"{what} ({', '.join(places)})" if places else what, "why": why}
                for (what, why), places in self._left_out.items()]

    def document(self, seconds: float) -> dict[str, Any]:
        return finite({
            **self.about, "seconds": round(seconds, 1), "ceilings": self.ceilings, "rows": self.rows,
            "fidelity": self.fidelity, "left_out": self.left_out(),
        })


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def write_json(document: dict[str, Any], path: Path) -> None:
    write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a neighbour and renames it, so that the file is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
