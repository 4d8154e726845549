"""What tests of `r1kernels bench` share: the format of its document, a small engine, and the absence of peers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels.bench import clock, peers
from r1kernels.bench.engine import Engine
from r1kernels.bench.peers import Missing, Peer
from r1kernels.bench.results import Results
from r1kernels.bench.tasks import BOTH, FORWARD, OURS, Problem, Setting, Task

SMALL = Setting(torch.device("cpu"), "small", compiled=False)
ROW = {
    "case": str, "op": str, "pass": str, "shape": dict, "dtype": str, "series": str | None, "variant": str,
    "active_share": float, "implementation": str, "median_s": float, "iqr_s": float, "rounds": int, "ratio": float,
    "peak_extra_bytes": int | None, "bytes_moved": int | None, "flops": int, "max_error": float, "tolerance": float,
}
DOCUMENT = {
    "format": int, "date": str, "r1kernels": str, "torch": str, "python": str, "peers": dict, "device": str,
    "device_type": str, "threads": int, "instruction_set": str | None, "memory_bytes": int, "sources": str,
    "commit": str | None, "size": str, "seconds": float, "ceilings": dict, "rows": list, "fidelity": list,
    "left_out": list,
}


def assert_typed(found: dict[str, Any], types_of: dict[str, Any]) -> None:
    assert set(found) == set(types_of)
    wrong = {name: found[name] for name, kind in types_of.items() if not isinstance(found[name], kind)}
    assert not wrong


def assert_document(found: dict[str, Any]) -> None:
    """The format that the report and the documentation read."""
    assert_typed(found, DOCUMENT)
    assert found["format"] == 1 and len(found["sources"]) == 16
    assert found["ceilings"]["copy_bytes_per_s"] > 0
    assert set(found["ceilings"]["gemm_flops_per_s"]) == {"bfloat16", "float32"}
    for row in found["rows"]:
        assert_typed(row, ROW)
        assert row["median_s"] > 0 and row["ratio"] > 0 and row["rounds"] >= 2
        assert 0 <= row["max_error"] <= row["tolerance"] and row["pass"] in (FORWARD, BOTH)
    for row in found["fidelity"]:
        assert set(row) == {"quantity", "implementation", "dtype", "shape", "mean", "max", "quantiles", "nonfinite"}
        assert set(row["quantiles"]) == {"0.5", "0.9", "0.99", "0.999"}
    for entry in found["left_out"]:
        assert set(entry) == {"what", "why"} and entry["what"] and entry["why"]


def no_peer(peer: Peer, device: torch.device) -> None:
    """In place of `peers.load`: the imports of peers take longer than everything else in a test."""
    raise Missing("not installed: pip install it", everywhere=True)


def square(x: Tensor) -> Tensor:
    return x * x


def a_task(**changes: Any) -> Task:
    """The square of 64 numbers, and its gradient."""
    standard: dict[str, Any] = {
        "case": "square", "op": "square", "shape": {"N": 64}, "dtype": torch.float32, "exact": square,
        "make": lambda: Problem({"x": torch.linspace(-2, 2, 64).reshape(16, 4)}, ("x",)),
        "functions": {OURS: square, peers.EAGER: square},
    }
    return Task(**standard | changes)


def small_engine() -> Engine:
    """It takes as few rounds as it can."""
    found = Engine(SMALL, clock.HostClock(), Results(SMALL.device, "small"))
    found.seconds = 0.0
    return found
