"""Writes where the CUDA kernels are faster than Triton's, r1kernels/tables/cuda_faster.json, from measured results.

    python benchmarks/choose.py RESULTS.json [--table FILE]

RESULTS.json is that of `benchmarks/run_on_gpu.sh`, with both columns. Measurements of a device by other kernels or
versions than those of the results are dropped, others stay; an operator without both columns is not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu.bars import POLICY
from gpu.setting import CUDA, OURS

from r1kernels import _choice

Row = dict[str, Any]
MEASURED = ("driver", "torch", "triton", "cuda", "r1kernels", "kernels")
# Cases, by the operators that they measure.
OPERATORS = {
    ("token_stats", "statistics"): ("token_stats",),
    ("token_stats", "gradient"): ("token_stats_backward",),
    ("token_stats", "gradient in place"): ("token_stats_backward_out",),
    ("token_stats", "gradient in place, narrowed to 16 bits"): ("token_stats_backward_out",),
    ("grpo_loss", "forward + backward"): ("grpo_step",),
    (POLICY, "forward, graph"): ("policy_loss", "group_advantages"),
    ("kl_estimate", "forward, graph"): ("kl_estimate",),
    ("scaled", "by a factor"): ("scaled",),
}
ON_TOKENS = ("policy_loss", "group_advantages", "kl_estimate")
NEVER_FUSED = ("grpo_step", "float16")  # r1kernels.ops.grpo_step: both columns are of the same kind there


def ratio(triton: Row, cuda: Row) -> float:
    """Of the times, with half of both spreads against CUDA."""
    return (triton["median_us"] - triton["spread_us"] / 2) / (cuda["median_us"] + cuda["spread_us"] / 2)


def measurements(rows: list[Row]) -> dict[str, list[Row]]:
    """Measurements in the table's form, by operator."""
    timed = {
        (row["op"], row["case"], row["shape"], row["dtype"], row["candidate"]): row
        for row in rows if row.get("median_us") is not None
    }
    found: dict[str, list[Row]] = {}
    for (op, case, shape, dtype, candidate), triton in timed.items():
        cuda = timed.get((op, case, shape, dtype, CUDA))
        if candidate != OURS or cuda is None:
            continue
        first, second = (int(side.split()[0]) for side in shape.split(" x "))
        for operator in OPERATORS.get((op, case), ()):
            on_tokens = operator in ON_TOKENS
            if (operator, dtype) != NEVER_FUSED:
                found.setdefault(operator, []).append({
                    "dtype": None if on_tokens else dtype, "vocab": None if on_tokens else second,
                    "tokens": first * second if on_tokens else first, "ratio": round(ratio(triton, cuda), 3),
                })
    return found


def merged(entry: Row | None, measured: Row, found: dict[str, list[Row]]) -> Row:
    """A device's entry with what was found, which takes the place of what was measured of the same."""
    operators = dict(entry["operators"]) if entry and entry["measured"] == measured else {}
    for operator, new in found.items():
        places = [_place(each) for each in new]
        kept = [each for each in operators.get(operator, []) if _place(each) not in places]
        operators[operator] = sorted(kept + new, key=_order)
    return {"measured": measured, "operators": dict(sorted(operators.items()))}


def _order(each: Row) -> tuple[str, int, int]:
    return each["dtype"] or "", each["vocab"] or 0, each["tokens"]


def _place(each: Row) -> tuple[Any, ...]:
    return each["dtype"], each["vocab"], each["tokens"]


def write(results: Row, path: Path) -> dict[str, list[Row]]:
    """What was found in the results, which the table at `path` now has."""
    device = results.get("device", "")
    if not results.get("driver"):
        raise ValueError(f"the results are of {device or 'no device'}, expected those of a GPU")
    found = measurements(results["results"])
    table = json.loads(path.read_text()) if path.exists() else {}
    measured = {name: results.get(name) for name in MEASURED}
    if found:
        table[device] = merged(table.get(device), measured, found)
    path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", type=Path, default=_choice.TABLE)
    given = parser.parse_args()
    try:
        found = write(json.loads(given.results.read_text()), given.table)
    except ValueError as error:
        print(f"{given.results}: {error}", file=sys.stderr)
        return 2
    for operator, new in found.items():
        for each in new:
            of = f"{each['dtype']}, {each['tokens']} x {each['vocab']}" if each["vocab"] else f"{each['tokens']} tokens"
            print(f"{operator}, {of}: {each['ratio']:.2f} x")
    print(f"{sum(map(len, found.values()))} measurements in {given.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
