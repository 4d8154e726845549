"""The peak memory of the trainer with a real model, beside what `r1kernels plan` says.

    OMP_NUM_THREADS=1 PYTHONPATH=.:benchmarks python benchmarks/plan_memory.py MODEL

runs tests/real/peak_memory.py for each of CASES and saves the results of this device as plan_memory.json.
docs/make_numbers.py makes the table of docs/scaling.md from the committed file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import saving

PROGRAM = Path(__file__).resolve().parents[1] / "tests" / "real" / "peak_memory.py"
CASES = {
    "bf16": [], "bf16, gradient checkpointing": ["--checkpointing"],
    "fp32": ["--precision", "fp32"], "fp32, gradient checkpointing": ["--precision", "fp32", "--checkpointing"],
    "bf16, LoRA of rank 16": ["--lora"], "bf16, LoRA, gradient checkpointing": ["--lora", "--checkpointing"],
}


def rows(model: str, case: str, printed: str) -> list[dict[str, Any]]:
    """A row for each phase that the program printed."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [{"op": "plan_memory", "model": Path(model).name, "case": case, "phase": line["phase"],
             "measured_bytes": line["measured"], "planned_bytes": line["planned"]} for line in lines if "phase" in line]


def main(model: str) -> None:
    found = []
    for case, options in CASES.items():
        done = subprocess.run([sys.executable, PROGRAM, model, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{case}: {done.stderr[-2000:]}")
        found += rows(model, case, done.stdout)
        print(found[-2:], flush=True)
    print(f"{saving.save(found)}/plan_memory.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
