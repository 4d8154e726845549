"""One case: checks, times in turns, rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from gpu.setting import COPY, PRODUCTS, Candidate, Case, LeftOut
from gpu.timing import GRAPH_CALLS, Clock, Measured, Timed, in_turns
from r1kernels.bench.peers import one_line

Row = dict[str, Any]
Ceilings = dict[str, float]  # "copy": bytes per second, "gemm": flop per second


class DeviceLost(RuntimeError):
    """After a fault on the device nothing runs in this process any more."""


def failure(error: BaseException) -> str:
    return f"left out: {error}"[:300] if isinstance(error, LeftOut) else one_line(error)


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _ready(candidate: Candidate, clock: Clock) -> tuple[Timed, Row]:
    """What is timed, after its check, and what the check measured."""
    measured = candidate.check()
    timed = clock.graph(candidate.timed.run) if candidate.graph else candidate.timed
    timed.prepare()
    timed.run()
    return timed, measured if isinstance(measured, dict) else {}


def run(
    case: Case, clock: Clock, seconds: float, ceilings: Ceilings, *, left_out: dict[str, str] | None = None,
    begin: Callable[[str], None] = lambda name: None,
) -> tuple[list[Row], BaseException | None]:
    """(a row for each candidate, the error that lost the device). A candidate that fails has an error for numbers.

    Args:
        left_out: candidates that do not run, with the reason.
        begin: is told the name of each candidate before its check, which may never end, and "" before the timing.
    """
    ready: dict[str, Timed] = {}
    extra: dict[str, Row] = {}
    failed: dict[str, str] = {name: f"left out: {reason}" for name, reason in (left_out or {}).items()}
    lost: BaseException | None = None
    for name, candidate in case.candidates.items():
        if name in failed:
            continue
        begin(name)
        try:
            ready[name], extra[name] = _ready(candidate, clock)
        except Exception as error:
            failed[name] = failure(error)
            if _is_lost(error):
                lost = error
                break
        gc.collect()
        if torch.cuda.is_available() and lost is None:
            torch.cuda.empty_cache()
    measured: dict[str, Measured] = {}
    if lost is None and ready:
        begin("")
        try:
            measured = in_turns(ready, clock, seconds)
        except Exception as error:
            failed |= dict.fromkeys(ready, failure(error))
            lost = error if _is_lost(error) else None
    judged = rows(case, measured, extra, ceilings, hides_us(clock))
    return [*judged, *(_failed(case, *item) for item in failed.items())], lost


def hides_us(clock: Clock) -> float | None:
    return None if clock.hides_s is None else clock.hides_s * 1e6


def _failed(case: Case, name: str, error: str) -> Row:
    return {**_place(case, name), "error": error}


def _place(case: Case, name: str) -> Row:
    op, which, shape, dtype = case.key
    return {"op": op, "case": which, "shape": shape, "dtype": dtype, "candidate": name}


def in_case(case: Case, measured: dict[str, Measured], ceilings: Ceilings) -> Ceilings:
    """The ceilings of this very round where the case has them among its candidates."""
    found = dict(ceilings)
    itemsize = case.dtype.itemsize
    copied = _numel(case) * itemsize * 2
    if COPY in measured and copied:
        found["copy"] = copied / measured[COPY].median_us * 1e6
    if PRODUCTS in measured and case.flop:
        found["gemm"] = case.flop / measured[PRODUCTS].median_us * 1e6
    return found


def _numel(case: Case) -> int:
    """Entries of N x V logits, 0 of other shapes."""
    sides = case.shape.split(" x ")
    return int(sides[0]) * int(sides[1]) if len(sides) == 2 and all(side.isdigit() for side in sides) else 0


def _logits_bytes(case: Case) -> int:
    """Of 16-bit logits of a head."""
    if not case.shape.startswith("N "):
        return 0
    tokens, _, vocab = (int(part.split()[1]) for part in case.shape.split(", "))
    return 2 * tokens * vocab


def rows(
    case: Case, measured: dict[str, Measured], extra: dict[str, Row], ceilings: Ceilings, hides_us: float | None = None
) -> list[Row]:
    ceilings = in_case(case, measured, ceilings)
    # What multiplies matrices is measured by products, all else by the copy.
    ceiling = "gemm" if case.op.startswith("linear") else "copy"
    ceilings = {ceiling: ceilings[ceiling]} if ceiling in ceilings and case.op != "ceiling" else {}
    result = []
    for name, each in measured.items():
        seconds = each.median_us * 1e-6
        moved = 2 * _numel(case) * case.dtype.itemsize if name == COPY and case.op != "ceiling" else case.bytes
        flop = 0 if name == COPY else case.flop
        rate, speed = (moved / seconds if moved else None), (flop / seconds if flop else None)
        peak = each.peak_extra_bytes
        result.append({
            **_place(case, name),
            **each._asdict(),
            "timing": f"CUDA graph of {GRAPH_CALLS} calls" if case.candidates[name].graph else "one call",
            "host_hidden": None if None in (hides_us, each.host_us) else each.host_us < hides_us,
            "bytes": moved,
            "bytes_per_s": rate,
            "share_of_copy": rate / ceilings["copy"] if rate and "copy" in ceilings else None,
            "flop": flop,
            "flop_per_s": speed,
            "share_of_gemm": speed / ceilings["gemm"] if speed and "gemm" in ceilings else None,
            "beyond_bytes": None if peak is None else peak - case.inherent_bytes,
            **({"logits_bytes": logits} if (logits := _logits_bytes(case)) else {}),
            **extra.get(name, {}),
        })
    return result
