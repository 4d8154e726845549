"""Operators called directly (`torch.ops.r1kernels.*`), with one argument that is wrong: an error, never a crash.

`raw_calls` makes the calls in a process of its own, whose end by a signal is a failure.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from backends import SUPPORT, slow_interpreted
from raw_calls import CALLS

from r1kernels import testing

pytestmark = slow_interpreted
HARMLESS = ("transposed", "meta", "None")  # a vector's transpose is itself; without boundaries tokens are one sequence


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str, str], str]:
    """(operator, argument, what is wrong with it) -> "ok", or the error."""
    completed = subprocess.run([sys.executable, str(Path(SUPPORT) / "raw_calls.py")], capture_output=True, text=True)
    lines = completed.stdout.splitlines()
    assert completed.returncode == 0, f"the process ended with {completed.returncode} in: {lines[-1:]}\n" + (
        completed.stderr[-2000:]
    )
    return {tuple(line.split("\t")[:3]): line.split("\t")[3] for line in lines}


def test_no_operator_crashes(outcomes: dict[tuple[str, str, str], str]) -> None:
    called = {operator for operator, _, _ in outcomes}
    expected = {"token_stats", "token_stats_backward", "token_stats_backward_out", "policy_loss", "kl_estimate"}
    if testing.KERNELS == "cpu":
        expected = set(CALLS) - {"grpo_step", "linear_statistics"}  # which are for GPUs
    assert called >= expected and len(outcomes) > 100
    assert "ok" in outcomes.values()


@pytest.mark.parametrize("operator", ["policy_loss", *(["grpo_step"] if testing.KERNELS == "cuda" else [])])
def test_boundaries_that_bound_nothing_are_refused(
    operator: str, outcomes: dict[tuple[str, str, str], str]
) -> None:
    mine = {what: said for (name, argument, what), said in outcomes.items()
            if (name, argument) == (operator, "cu_seqlens") and what not in HARMLESS}
    assert {"0-d", "empty", "[]", "[0, 4, 2, 6]", "torch.int32"} <= set(mine)
    assert not [what for what, said in mine.items() if said == "ok"]
    for what in ("0-d", "empty", "[]", "torch.int32"):
        assert "cu_seqlens" in mine[what], mine[what]


@pytest.mark.parametrize("operator", [name for name in CALLS if not name.startswith("linear_token")])
def test_0_d_and_empty_tensors_are_refused(operator: str, outcomes: dict[tuple[str, str, str], str]) -> None:
    first = next((name for name, _, _ in outcomes if name == operator), None)
    if first is None:
        pytest.skip("not an operator of these kernels")
    argument = next(argument for name, argument, _ in outcomes if name == operator)
    for what in ("0-d", "empty"):
        if (operator, what) not in (("group_advantages", "0-d"), ("group_advantages", "empty")):
            assert outcomes[operator, argument, what] != "ok", (argument, what)
