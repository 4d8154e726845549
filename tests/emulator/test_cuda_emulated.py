"""The CUDA kernels on the CPU: the tests of each operation run once more, on them, in the emulator's random order.

A process serves one backend, so they run in processes of their own, where `R1KERNELS_BACKEND=cuda` and the library of
`R1KERNELS_CUDA_EMULATOR` put these kernels in place of the compiled ones. Every access to memory is watched
(cuda_emulator/races.h); of long lists of cases (conftest), and of what other implementations alone can be asked, a part
is left out.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cuda_emulation
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the extension too")

TESTS = Path(__file__).parents[1]
# Of every file. Values that only a device sees have another error there (test_grpo_step, test_cuda_losses); threads,
# instruction sets and ways to memory are a CPU's; float64 is the reference's; a row for each 16-bit number would take
# minutes.
NOT_HERE = (
    "bad_input", "bad_cu_seqlens", "infinite_reward", "called_directly_do_not_read", "threads", "past_the_caches",
    "reference_", "float64", "gradcheck", "fakes", "every_bfloat16", "nearest_even", "opcheck",
)
# Files by operation, the longest first, and what else is left out: cases that cost the most and run no line that others
# do not, and the bits of a composition or a compiled graph, which do without the fused step.
OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "statistics": (("token_stats", "token_stats_edges", "cuda_token_stats", "scaled", "cross_entropy"), ()),
    "grpo_step": (
        ("grpo_step", "grpo_step_loss", "grpo_loss"),
        ("composition_bit_for_bit", "compile_fullgraph", "lengths_and_temperatures_that_change"),
    ),
    "losses": (
        ("policy_loss", "policy_loss_edges", "group_advantages", "kl_estimate", "peer_defects", "invariance"),
        ("d10_any_completion_length",),
    ),
    "linear": (
        ("linear_token_stats", "linear_cross_entropy", "linear_compaction", "linear_options"),
        ("engine_that_rounds[dtype1]", "without_spills", "sixty_four_micro_batches"),
    ),
}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    library = str(cuda_emulation.operators())
    return {**os.environ, "R1KERNELS_CUDA_EMULATOR": library, "R1KERNELS_BACKEND": "cuda", "OMP_NUM_THREADS": "1"}


def run(operation: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    files, leave_out = OPERATIONS[operation]
    expression = " and ".join(f"not {name}" for name in (*NOT_HERE, *leave_out))
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", expression]
    return subprocess.run(
        [*command, *(str(next(TESTS.rglob(f"test_{file}.py"))) for file in files)], capture_output=True, text=True,
        env=environment, cwd=TESTS.parent,
    )


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, environment: dict[str, str]) -> Iterator[dict[str, Future]]:
    """Of the operations asked for."""
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = dict.fromkeys(case["operation"] for case in cases if case.get("operation") in OPERATIONS)
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {operation: pool.submit(run, operation, environment) for operation in asked}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_tests_of_an_operation_pass_on_its_cuda_kernels(operation: str, outcomes: dict[str, Future]) -> None:
    completed = outcomes[operation].result()
    assert completed.returncode == 0, completed.stdout[-6000:] + completed.stderr[-2000:]
    passed = completed.stdout.strip().splitlines()[-1]
    assert " passed" in passed and "failed" not in passed, passed


def test_the_process_uses_these_kernels(environment: dict[str, str]) -> None:
    program = (
        "import torch; from r1kernels import _library;"
        "print(_library.choose('cpu', torch.float32).implementation, _library.extension)"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert completed.stdout.split() == ["cuda", "None"], completed.stderr
