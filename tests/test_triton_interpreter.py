"""The Triton kernels through the interpreter: the tests of each operation run once more, on them.

Triton reads `TRITON_INTERPRET` when a kernel is declared, so they run in a process of their own, where these kernels
take the place of the compiled ones (`R1KERNELS_BACKEND=triton`). Interpreted programs are slow: of long lists of
parameters, and of what other implementations alone can be asked, a part is left out here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What is left out of every file: errors that a GPU reports by an assertion (tests/gpu), threads and instruction sets of
# a CPU, and the reference.
NOT_HERE = (
    "bad_input", "directly_do_not_read", "threads", "reference_", "peak_", "memory_", "every_bfloat16", "nearest_even",
    "opcheck",
)
CASES = {
    "test_token_stats.py": (),
    "test_token_stats_edges.py": (),
    "test_policy_loss.py": (),
    "test_policy_loss_edges.py": (),
    "test_group_advantages.py": (),
    "test_kl_estimate.py": (),
    "test_grpo_loss.py": (),
    "test_cross_entropy.py": (),
    "test_invariance.py": (),
    "test_peer_defects.py": (),
    "test_linear_statistics_accumulation.py": (),
}


def run(files: list[str], leave_out: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "R1KERNELS_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    expression = " and ".join(f"not {name}" for name in leave_out)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", expression]
    return subprocess.run(
        [*command, *(str(TESTS / file) for file in files)], capture_output=True, text=True, env=environment,
        cwd=TESTS.parent,
    )


@pytest.mark.parametrize("file", CASES)
def test_the_tests_of_an_operation_pass_on_its_triton_kernels(file: str) -> None:
    completed = run([file], NOT_HERE + CASES[file])
    assert completed.returncode == 0, completed.stdout[-6000:] + completed.stderr[-2000:]
    passed = completed.stdout.strip().splitlines()[-1]
    assert " passed" in passed, passed


def test_the_process_uses_these_kernels() -> None:
    program = (
        "import torch; from r1kernels import _library;"
        "print(_library.choose('cpu', torch.float32).implementation, _library.extension)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "R1KERNELS_BACKEND": "triton"}
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert completed.stdout.split() == ["triton", "None"], completed.stderr
