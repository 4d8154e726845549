"""Which tests run on which kernels, and how a process runs the tests of a room on the kernels of a GPU.

Every test of a room runs on every backend unless a marker says why not. What a marker leaves out is skipped, so that
the summary shows it:

    @pytest.mark.not_on("triton", reason="...")    never there
    @pytest.mark.slow_on("cuda", reason="...")     there with --full only
    @pytest.mark.long(reason="...")                everywhere with --full only
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOMS = ("kernels", "losses", "linear", "hardening")  # the operations, which every backend has to serve
GPU_KERNELS = ("triton", "cuda")

reference_only = pytest.mark.not_on(*GPU_KERNELS, reason="float64: the reference runs, and no kernel")
shapes_only = pytest.mark.not_on(*GPU_KERNELS, reason="fake tensors: no kernel runs")
registration_only = pytest.mark.not_on(*GPU_KERNELS, reason="tests the operator's schema, which all kernels share")
checks_only = pytest.mark.not_on(
    *GPU_KERNELS, reason="errors of the host; test_triton_errors and test_cuda_losses have those of devices"
)
host_code = pytest.mark.not_on(*GPU_KERNELS, reason="code of the host: no kernel of a GPU runs")
compiles = pytest.mark.slow_on(
    "reference", *GPU_KERNELS, reason="torch.compile sees an operator's schema and fake, which all backends share"
)
slow_interpreted = pytest.mark.slow_on("triton", reason="seconds of interpreted programs that other tests run too")
slow_on_gpu_kernels = pytest.mark.slow_on(
    *GPU_KERNELS, reason="seconds of interpreted programs that other tests run too"
)
without_cuda_kernels = pytest.mark.not_on("cuda", reason="there is no CUDA kernel of this operation")


def skip_reason(item: pytest.Item, kernels: str, full: bool) -> str:
    """Why a test does not run on these kernels, or "" if it does. A case of the reference counts as its own backend."""
    for mark in (*item.iter_markers("slow"), *item.iter_markers("long")):
        if mark.args or not mark.kwargs.get("reason"):
            raise pytest.UsageError(f"{item.nodeid}: {mark.name} needs a reason, not {mark}")
        if mark.name == "long" and not full:
            return f"with --full only: {mark.kwargs['reason']}"
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if "reference" in (values.get("implementation"), values.get("served_by")):
        kernels = "reference"
    for name in ("not_on", "slow_on"):
        for mark in item.iter_markers(name):
            if not mark.args or set(mark.args) - {"reference", "cpu", *GPU_KERNELS} or not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: {name} needs names of backends and a reason, not {mark}")
            if kernels in mark.args and name == "not_on":
                return f"not on {kernels}: {mark.kwargs['reason']}"
            if kernels in mark.args and not full:
                return f"on {kernels} with --full only: {mark.kwargs['reason']}"
    return ""


def run_room(
    room: str, environment: dict[str, str], full: bool = False, tests: Path = TESTS
) -> subprocess.CompletedProcess[str]:
    """Runs the tests of a room in a process whose environment chooses the kernels. Nothing is left out by name."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *(["--full"] if full else []), str(tests / room)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, cwd=tests.parent,
    )


def check(completed: subprocess.CompletedProcess[str]) -> None:
    print(completed.stdout)  # with the skips and their reasons
    assert completed.returncode == 0, completed.stdout[-6000:] + completed.stderr[-2000:]
    passed = completed.stdout.strip().splitlines()[-1]
    assert " passed" in passed and "failed" not in passed, passed
