"""`python -m gpu GROUP --out DIR`: measures a group of cases, or checks all of them at small sizes.

A case that was started and never ended (a time-out, a fault on the device) is not started again, so the same command
goes on behind it. Exit status 75: the device was lost to this process, run the command again.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import r1kernels
from gpu import bars, ceilings, measure, records, report
from gpu.cases import GROUPS
from gpu.setting import COPY, OURS, Case, Setting, head_shape, logits_shapes
from gpu.timing import clock_of
from r1kernels import _library

TRY_AGAIN = 75
SECONDS_EACH = 1.5  # of timing for a case
DEFAULT_CEILINGS: measure.Ceilings = {}


def known_ceilings(folder: Path) -> measure.Ceilings:
    found = dict(DEFAULT_CEILINGS)
    for row in records.latest(records.of_kind(records.read(folder), "result")):
        if row["op"] == "ceiling" and row.get("median_us"):
            if row["candidate"] == COPY:
                found["copy"] = row["bytes_per_s"]
            elif row["candidate"] == ceilings.PRODUCTS[0]:
                found["gemm"] = row["flop_per_s"]
    return found


def group_cases(group: str, setting: Setting, broken: Callable[[str, Exception], None]) -> Iterator[Case]:
    """The cases of a group. A module that cannot make its inputs is told to `broken`, and the next one goes on."""
    for module in (ceilings,) if group == "ceilings" else GROUPS[group]:
        cases = module.cases(setting)
        while True:
            try:
                case = next(cases)
            except StopIteration:
                break
            except Exception as error:
                broken(module.__name__.rpartition(".")[2], error)
                break
            yield case
            del case


def show(rows: list[measure.Row]) -> None:
    for row in rows:
        told = row.get("error") or (
            f"{row['median_us']:>12.1f} us  +- {row['spread_us']:.1f}"
            + "".join(f"  {row[name]:.3f} {name}" for name in ("share_of_copy", "share_of_gemm") if row[name])
        )
        print(f"  {row['candidate']:<26}{told}", flush=True)


def run_group(group: str, setting: Setting, folder: Path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    clock, environment = clock_of(setting.device), records.environment(setting.device)
    records.append(folder, "run", environment)
    hash_ = environment["kernels"]
    begun = {
        tuple(record["key"]) for record in records.of_kind(records.read(folder), "started")
        if record["kernels"] == hash_
    }

    def broken(module: str, error: Exception) -> None:
        print(f"{module}: {measure.failure(error)}", flush=True)
        row = {"op": module, "case": "inputs", "shape": "", "dtype": "", "candidate": OURS}
        records.append(folder, "result", {**row, "error": measure.failure(error), "kernels": hash_})

    for case in group_cases(group, setting, broken):
        if case.key in begun:
            continue
        if time.monotonic() > deadline:
            print(f"out of time before {', '.join(case.key)}")
            return 0
        print(", ".join(case.key), flush=True)
        records.append(folder, "started", {"key": case.key, "kernels": hash_})
        each = 0.02 if setting.small else SECONDS_EACH
        rows, lost = measure.run(case, clock, each, known_ceilings(folder))
        for row in rows:
            records.append(folder, "result", {**row, "kernels": hash_})
        show(rows)
        if lost is not None:
            print(f"the device was lost: {measure.failure(lost)}")
            return TRY_AGAIN
        del case
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def check_all(setting: Setting) -> int:
    """Every case of ours at small shapes, against float64."""
    wrong: list[str] = []

    def broken(module: str, error: Exception) -> None:
        wrong.append(module)
        print(f"  {module}: WRONG: {measure.failure(error)}", flush=True)

    for group in GROUPS:
        for case in group_cases(group, setting, broken):
            for name, candidate in case.candidates.items():
                if not name.startswith(OURS):
                    continue
                try:
                    candidate.check()
                    told = "right"
                except Exception as error:
                    told = f"WRONG: {measure.failure(error)}"
                    wrong.append(case.op)
                print(f"  {', '.join((*case.key, name))}: {told}", flush=True)
    print(f"{len(wrong)} wrong" if wrong else "all right")
    return 1 if wrong else 0


def told_of_cuda(setting: Setting) -> None:
    if not setting.cuda:
        print(f"without the CUDA kernels: {_library.cuda_missing(setting.device.type)}", flush=True)


def print_bars(folder: Path, setting: Setting) -> None:
    rows = records.latest(records.of_kind(records.read(folder), "result"))
    for bar in bars.evaluate(rows, str(logits_shapes(setting)[0]), str(head_shape(setting))):
        print(bar)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("group", choices=["check", "ceilings", *GROUPS, "report"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600, help="start no case after so many")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, with --small")
    parser.add_argument("--backend", help="the one measured beside the CUDA kernels; triton on a GPU")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    device = torch.device(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, given.small, not given.no_compile)
    if given.group == "report":
        report.write(given.out, str(logits_shapes(setting)[0]), str(head_shape(setting)))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda is not available; --device cpu --small rehearses", file=sys.stderr)
        return 2
    told_of_cuda(setting)
    with r1kernels.backend(given.backend or ("triton" if device.type == "cuda" else "auto")):
        if given.group == "check":
            return check_all(setting._replace(small=True, compiled=False))
        status = run_group(given.group, setting, given.out, given.seconds)
    print_bars(given.out, setting)
    return status


if __name__ == "__main__":
    sys.exit(main())
