"""`python -m gpu GROUP --out DIR`: measures a group of cases, or checks all of them at small sizes.

The report is written after each case. The same command goes on where the last one ended (`gpu.progress`). Exit status:
75, the device was lost to this process, run the command again; 124, out of time; 1, a candidate of ours failed.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import r1kernels
from gpu import bars, ceilings, launches, measure, records, report
from gpu.cases import GROUPS, LEAN
from gpu.progress import Progress
from gpu.setting import COPY, OURS, Case, LeftOut, Setting, head_shape, logits_shapes
from gpu.timing import Clock, clock_of
from r1kernels import _library

FAILED, TRY_AGAIN, OUT_OF_TIME = 1, 75, 124
SECONDS_EACH = 1.0  # of timing for the candidates of a case that are not slow
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
    """The cases of a group. If a module cannot make its inputs, `broken` is told, and the next module follows."""
    setting = setting._replace(lean=group in LEAN)
    for make in GROUPS[group]:
        cases = make(setting)
        while True:
            try:
                case = next(cases)
            except StopIteration:
                break
            except Exception as error:
                broken(make.__module__.rpartition(".")[2], error)
                break
            yield case
            del case


def show(rows: list[measure.Row]) -> None:
    for row in rows:
        told = row.get("error") or (
            f"{row['median_us']:>10.1f} us  +- {row['spread_us']:.1f}"
            + "".join(f"  {row[name]:.3f} {name}" for name in ("share_of_copy", "share_of_gemm") if row[name])
        )
        print(f"  {row['candidate']:<36}{told}", flush=True)


def run_group(group: str, setting: Setting, folder: Path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    clock, environment = clock_of(setting.device), records.environment(setting.device)
    environment["host_time_hidden_us"] = measure.hides_us(clock)
    records.append(folder, "run", environment)
    hash_ = environment["kernels"]
    progress = Progress(folder, group, hash_)
    status, seen = 0, 0

    def broken(module: str, error: Exception) -> None:
        nonlocal status
        status = FAILED
        print(f"{module}: {measure.failure(error)}", flush=True)
        row = {"op": module, "case": "inputs", "shape": "", "dtype": "", "candidate": OURS}
        records.append(folder, "result", {**row, "error": measure.failure(error), "kernels": hash_})

    for case in group_cases(group, setting, broken):
        seen += 1
        if not progress.is_due(case.key):
            continue
        if time.monotonic() > deadline:
            print(f"out of time before {', '.join(case.key)}", flush=True)
            return OUT_OF_TIME
        print(", ".join(case.key), flush=True)
        progress.append("started", case.key)
        rows, lost = attempt(case, progress, clock, setting, folder)
        for row in rows:
            records.append(folder, "result", {**row, "kernels": hash_})
        show(rows)
        if lost is not None:
            print(f"the device was lost: {measure.failure(lost)}", flush=True)
            return TRY_AGAIN
        failed = any(is_failure(row) for row in rows)
        progress.append("finished", case.key, failed=failed)
        status = FAILED if failed else status
        write_report(folder, setting, plotted=False)
        del case
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    if not seen and setting.device.type == "cuda":
        print(f"{group}: no case can run here", flush=True)
        return FAILED
    return status


def attempt(
    case: Case, progress: Progress, clock: Clock, setting: Setting, folder: Path
) -> tuple[list[measure.Row], BaseException | None]:
    try:
        return measure.run(
            case, clock, 0.02 if setting.small else SECONDS_EACH, known_ceilings(folder),
            left_out=progress.suspects(case.key),
            begin=lambda candidate: progress.append("checking", case.key, candidate=candidate),
        )
    except SystemExit:  # SIGTERM
        progress.append("stopped", case.key)
        raise


def is_failure(row: measure.Row) -> bool:
    """Peers may fail, and ours may leave out what a device cannot do."""
    return row["candidate"].startswith(OURS) and not row.get("error", "left out").startswith("left out")


def write_report(folder: Path, setting: Setting, plotted: bool) -> list[bars.Bar]:
    return report.write(folder, str(logits_shapes(setting)[0]), str(head_shape(setting)), plotted)


def check_all(setting: Setting) -> int:
    """Every case of ours at small shapes, against float64."""
    wrong: list[str] = []
    seen: set[tuple[str, ...]] = set()

    def broken(module: str, error: Exception) -> None:
        wrong.append(module)
        print(f"  {module}: WRONG: {measure.failure(error)}", flush=True)

    for group in GROUPS:
        for case in group_cases(group, setting, broken):
            for name, candidate in case.candidates.items():
                if not name.startswith(OURS) or (*case.key, name) in seen:
                    continue
                seen.add((*case.key, name))
                try:
                    candidate.check()
                    told = "right"
                except LeftOut as error:
                    told = measure.failure(error)
                except Exception as error:
                    told = f"WRONG: {measure.failure(error)}"
                    wrong.append(case.op)
                print(f"  {', '.join((*case.key, name))}: {told}", flush=True)
    print(f"{len(wrong)} wrong" if wrong else "all right")
    return 1 if wrong else 0


def told_of_cuda(setting: Setting) -> None:
    if not setting.cuda:
        print(f"without the CUDA kernels: {_library.cuda_missing(setting.device.type)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("group", choices=["check", "launches", *GROUPS, "report"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600, help="start no case after so many")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, with --small")
    parser.add_argument("--backend", help="the one measured beside the CUDA kernels; triton on a GPU")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(OUT_OF_TIME))
    device = torch.device(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, given.small, not given.no_compile)
    if given.group == "report":
        for bar in write_report(given.out, setting, plotted=True):
            print(bar)
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda is not available; --device cpu --small rehearses", file=sys.stderr)
        return 2
    told_of_cuda(setting)
    with r1kernels.backend(given.backend or ("triton" if device.type == "cuda" else "auto")):
        if given.group == "launches":
            return launches.run(setting, given.out)
        if given.group == "check":
            return check_all(setting._replace(small=True, compiled=False))
        return run_group(given.group, setting, given.out, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
