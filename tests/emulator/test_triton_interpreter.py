"""The Triton kernels through the interpreter: the tests of each operation run once more, on them.

Triton reads `TRITON_INTERPRET` when a kernel is declared, so they run in processes of their own, two at a time, where
these kernels take the place of the compiled ones (`R1KERNELS_BACKEND=triton`). Interpreted programs are slow: of long
lists of cases (conftest), and of what other implementations alone can be asked, a part is left out here.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Of every file. Values that only a device sees have another error there (test_triton_errors); threads, instruction sets
# and ways to memory are a CPU's; float64 is the reference's; a row for each 16-bit number would take minutes.
NOT_HERE = (
    "bad_input", "bad_cu_seqlens", "infinite_reward", "called_directly_do_not_read", "threads", "past_the_caches",
    "reference_", "float64", "gradcheck", "fakes", "every_bfloat16", "nearest_even", "opcheck",
)
# Files by operation, and what else is left out: cases that cost the most and run no line that others do not.
# The longest first, for the sake of the two processes.
OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "divergence": (
        ("divergence", "divergence_edges", "distillation_loss"),
        (
            "(vocabulary_of_a_real_model and (forward_kl-dtype0 or reverse_kl-dtype0))",
            "compile_fullgraph[triton-True", "compile_fullgraph[triton-False-reverse_kl",
            "(keep_to_the_same_budget and jsd-0.01)", "confident_teachers",
            "(rows_do_not_depend_on_their_batch and (forward_kl or reverse_kl-dtype0))",
        ),
    ),
    "token_stats": (("token_stats", "token_stats_edges", "triton_errors"), ("drift[triton-2049]",)),
    "policy_loss": (("policy_loss", "policy_loss_edges"), ()),
    "losses": (
        ("grpo_loss", "cross_entropy", "group_advantages", "kl_estimate", "peer_defects", "scaled"),
        (
            "d10_any_completion_length[65535]", "d10_any_completion_length[65536]", "d10_any_completion_length[70001]",
            "composition_bit_for_bit", "lengths_and_temperatures_that_change",
        ),
    ),
    "invariance": (
        ("invariance",),
        (
            "micro_batches_with_the_global_normalizer[sequence_mean]",
            "micro_batches_with_the_global_normalizer[constant]", "row_order[token_mean]", "row_order[constant]",
            "packing[sequence_mean]", "packing[token_mean]",
        ),
    ),
    "linear_token_stats": (
        ("linear_token_stats", "linear_statistics_accumulation", "linear_cross_entropy", "linear_options"),
        ("engine_that_rounds[dtype1]", "without_spills", "sixty_four_micro_batches"),
    ),
    "linear_grpo_loss": (
        ("linear_grpo_loss", "linear_compaction"),
        (
            "is_grpo_loss_of_the_dense_logits", "metrics_and_loss_do_not_need_gradients", "a_callable_is_the_preset",
            "is_policy_loss_of_the_linear",
            "(heads_in_float32 and (two_sided or gspo_wide))",
            "(objectives_and_inputs and (dapo or two_sided or reinforce or cispo_sequence or sapo_sequence))",
        ),
    ),
    "linear_distillation_loss": (("linear_distillation_loss",), ("test_memory",)),
    "linear_invariance": (
        ("linear_invariance", "linear_precision"),
        (
            "micro_batches_with_the_global_normalizer", "chunk_budgets", "order_of_sequences",
            "cross_entropy_of_any_split", "autocast", "batch_invariant_log_probs", "micro_batches_at_size",
        ),
    ),
}
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "R1KERNELS_BACKEND": "triton", "OMP_NUM_THREADS": "1"}


def run(operation: str) -> subprocess.CompletedProcess[str]:
    files, leave_out = OPERATIONS[operation]
    expression = " and ".join(f"not {name}" for name in (*NOT_HERE, *leave_out))
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", expression]
    return subprocess.run(
        [*command, *(str(next(TESTS.rglob(f"test_{file}.py"))) for file in files)], capture_output=True, text=True,
        env=ENVIRONMENT, cwd=TESTS.parent,
    )


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """Of the operations asked for."""
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = dict.fromkeys(case["operation"] for case in cases if case.get("operation") in OPERATIONS)
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {operation: pool.submit(run, operation) for operation in asked}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_tests_of_an_operation_pass_on_its_triton_kernels(operation: str, outcomes: dict[str, Future]) -> None:
    completed = outcomes[operation].result()
    assert completed.returncode == 0, completed.stdout[-6000:] + completed.stderr[-2000:]
    passed = completed.stdout.strip().splitlines()[-1]
    assert " passed" in passed and "failed" not in passed, passed


def test_the_process_uses_these_kernels() -> None:
    program = (
        "import torch; from r1kernels import _library;"
        "print(_library.choose('cpu', torch.float32).implementation, _library.extension)"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert completed.stdout.split() == ["triton", "None"], completed.stderr
