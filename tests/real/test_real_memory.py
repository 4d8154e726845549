"""`r1kernels plan` against measured peaks of a real model, in processes of their own. `make test-real` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL, PROGRAM = os.environ.get("R1KERNELS_REAL_MODEL"), Path(__file__).with_name("peak_memory.py")
pytestmark = [
    pytest.mark.skipif(not MODEL, reason="needs a real model: run `make test-real`"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]


@pytest.mark.parametrize("options", [
    "--precision bf16", "--precision fp32", "--precision bf16 --checkpointing", "--precision fp32 --checkpointing",
    "--precision bf16 --lora", "--precision bf16 --lora --checkpointing",
])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(options):
    command = [sys.executable, PROGRAM, MODEL, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)  # the table of docs/scaling.md; `pytest -rP` shows it
    *found, _ = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["phase"] for line in found] == ["updates", "sampling"]
    assert all(0.9 <= line["ratio"] <= 1.1 for line in found), found
