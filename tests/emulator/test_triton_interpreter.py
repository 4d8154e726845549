"""The Triton kernels through the interpreter: every test of the operations runs once more, on them.

Triton reads `TRITON_INTERPRET` when a kernel is declared, so they run in processes of their own, where these kernels
take the place of the compiled ones. Interpreted programs are slow: of a test with many cases a few are run (conftest),
with `--full` a sample that has every pair of values.
"""

import os
import subprocess
import sys

import backends
import pytest

ENVIRONMENT = {"TRITON_INTERPRET": "1", "R1KERNELS_BACKEND": "triton"}


@pytest.mark.slow(reason="minutes; needed after changes of operations and kernels")
@pytest.mark.parametrize("room", backends.ROOMS)
def test_the_tests_of_a_room_pass_on_the_triton_kernels(room: str, request: pytest.FixtureRequest) -> None:
    backends.check(backends.run_room(room, ENVIRONMENT, full=request.config.getoption("--full")))


def test_the_process_uses_these_kernels() -> None:
    program = (
        "import torch; from r1kernels import _dispatch, _library;"
        "print(_dispatch.choose('kernels', 'cpu', torch.float32).implementation, _library.extension)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    assert completed.stdout.split() == ["triton", "None"], completed.stderr
