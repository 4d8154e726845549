"""The CUDA kernels on the CPU: every test of the operations runs once more, on them, in the emulator's random order.

A process serves one backend, so they run in processes of their own, where these kernels take the place of the compiled
ones. Every access to memory is watched (cuda_emulator/races.h). Of a test with many cases a few are run
(conftest), with `--full` a sample that has every pair of values.
"""

import os
import shutil
import subprocess
import sys

import backends
import cuda_emulation
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the extension too")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {"R1KERNELS_CUDA_EMULATOR": str(cuda_emulation.operators()), "R1KERNELS_BACKEND": "cuda"}


@pytest.mark.slow(reason="minutes; needed after changes of operations and kernels")
@pytest.mark.parametrize("room", backends.ROOMS)
def test_the_tests_of_a_room_pass_on_the_cuda_kernels(
    room: str, environment: dict[str, str], request: pytest.FixtureRequest
) -> None:
    backends.check(backends.run_room(room, environment, full=request.config.getoption("--full")))


@pytest.mark.slow(reason="compiles all CUDA kernels for the emulator")
def test_the_process_uses_these_kernels(environment: dict[str, str]) -> None:
    program = (
        "import torch; from r1kernels import _dispatch, _library;"
        "print(_dispatch.choose('kernels', 'cpu', torch.float32).implementation, _library.extension)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert completed.stdout.split() == ["cuda", "None"], completed.stderr
