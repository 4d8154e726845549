"""The table of `_dispatch`: every operation has a last server, every reason can hold, and nothing else decides."""

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import r1kernels
from r1kernels import Objective, _choice, _dispatch, _library, backend, objectives
from r1kernels._dispatch import OPS, TABLE, choose

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALF, SINGLE = torch.bfloat16, torch.float32


def test_every_operation_has_a_last_server_that_nothing_keeps_from_it() -> None:
    for operation, servers in TABLE.items():
        assert [not unless for _, unless in servers] == [False] * (len(servers) - 1) + [True], operation
        assert len({choice.implementation for choice, _ in servers}) == len(servers), operation


def test_an_operation_without_a_row_is_an_error() -> None:
    with pytest.raises(KeyError, match="cross_entropy"):
        choose("cross_entropy", "cpu", SINGLE)


@pytest.mark.parametrize("operation", ["kernels", *OPS])
def test_the_first_reason_is_told(operation: str) -> None:
    assert choose(operation, "cpu", torch.float64) == ("reference", _dispatch.FLOAT64, True)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_an_unmet_request_is_an_error_of_choose_and_a_result_of_explain(name: str) -> None:
    with backend(name):
        assert choose("divergence", "cpu", SINGLE) == _dispatch.explain("divergence", "cpu", SINGLE)
        assert choose("divergence", "cpu", SINGLE) == (name, "requested", False)
        if name == "cpu":
            error = _dispatch.explain("divergence", "cuda", SINGLE)
            assert error.implementation == "error" and "'cuda'" in error.reason


def test_one_float64_tensor_makes_an_operator_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", {_dispatch.FLOAT64})
    single, double = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert _dispatch.select(single, "divergence", single) == "cpu"
    assert _dispatch.select(single, "divergence", double) == _dispatch.select(double, "divergence", single)
    assert _dispatch.select(single, "divergence", double) == "reference"


# ---- one reason after the other ---------------------------------------------------------------------------------


class OnGpu:
    """What the table asks of bfloat16 logits on a GPU."""

    device, dtype, shape = GPU, HALF, torch.Size([2, 8])

    @staticmethod
    def dim() -> int:
        return 2


def head(weight: torch.Tensor, **other: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"weight": weight, "logits_dtype": SINGLE, "lora_a": None} | other)


HIDDEN, WEIGHT, ROW = torch.zeros(2, 4, dtype=HALF), torch.zeros(8, 4, dtype=HALF), torch.zeros(8)
KEEPS: Callable[[torch.device], bool] = lambda device: True  # noqa: E731
CASES: dict[str, list[tuple[str, tuple[Any, ...], str]]] = {
    # the reason that is told, the facts, who serves
    "linear_gradients": [
        ("", (ROW, True, None), "one_pass"),
        ("no gradient is wanted", (ROW, False, None), "two_phases"),
        ("hidden states are float16", (ROW.half(), True, None), "two_phases"),
        ("log-probs are over sets", (ROW, True, ()), "two_phases"),
    ],
    "policy_terms": [
        ("", (ROW, objectives.grpo()), "kernel"),
        ("do not know the surrogate", (ROW, objectives.gmpo()), "autograd"),
        ("do not know the surrogate", (ROW, Objective.token_local(torch.add)), "autograd"),
        ("the reference serves", (ROW.double(), objectives.grpo()), "autograd"),
    ],
    "linear_statistics": [
        ("", (HIDDEN, head(WEIGHT), False, None), "fused"),
        ("more statistics are wanted", (HIDDEN, head(WEIGHT), True, None), "chunks"),
        ("neither bfloat16 nor float16", (HIDDEN.float(), head(WEIGHT.float()), False, None), "chunks"),
        ("differ in dtype", (HIDDEN, head(WEIGHT.float()), False, None), "chunks"),
        ("logits are rounded", (HIDDEN, head(WEIGHT, logits_dtype=HALF), False, None), "chunks"),
        ("there is an adapter", (HIDDEN, head(WEIGHT, lora_a=WEIGHT), False, None), "chunks"),
        ("log-probs are over sets", (HIDDEN, head(WEIGHT), False, ()), "chunks"),
        ("rows of the weight are not contiguous", (HIDDEN, head(WEIGHT.t().contiguous().t()), False, None), "chunks"),
        ("no row of the vocabulary", (HIDDEN, head(WEIGHT[:0]), False, None), "chunks"),
    ],
    "product": [
        ("", (CPU, HALF, SINGLE, KEEPS), "native"),
        ("no CPU kernel", (GPU, SINGLE, SINGLE, KEEPS), "torch"),
        ("no CPU kernel", (GPU, HALF, HALF, KEEPS), "out_dtype"),
        ("no CPU kernel", (GPU, HALF, SINGLE, KEEPS), "parts"),
        ("no CPU kernel", (GPU, SINGLE, torch.float16, KEEPS), "copies"),
        ("no CPU kernel", (GPU, HALF, HALF, lambda device: False), "copies"),
        ("no CPU kernel", (GPU, HALF, SINGLE, lambda device: False), "copies"),
    ],
    "scaled": [
        ("", (ROW, ROW), "kernel"),
        ("the reference serves the gradient", (ROW.double(), ROW), "torch"),
        ("not contiguous or not aligned", (ROW[::2], ROW[:4]), "torch"),
        ("not contiguous or not aligned", (ROW[:4], ROW[1:5]), "torch"),
    ],
    "launch": [
        ("", ("token_stats", OnGpu(), False), "cuda"),
        ("there is no CUDA kernel", ("divergence", OnGpu(), False), "triton"),
        ("no CUDA kernel takes all arguments", ("token_stats_backward", OnGpu(), True), "triton"),
    ],
}


@pytest.mark.parametrize(
    ("operation", "reason", "facts", "server"),
    [(operation, *case) for operation, cases in CASES.items() for case in cases],
)
def test_a_reason_leaves_the_call_to_the_next(
    operation: str, reason: str, facts: tuple[Any, ...], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose GPU both Triton and CUDA serve, and CUDA faster."""
    monkeypatch.setattr(_library, "_missing", {"cuda": "", "cpu": ""})
    monkeypatch.setattr(_library, "_cuda_missing", {"cuda": ""})
    monkeypatch.setattr(_choice, "cuda_is_faster", lambda *about: True)
    monkeypatch.setattr(_dispatch, "_warned", {_dispatch.FLOAT64})
    monkeypatch.setattr(_dispatch, "_device_name", lambda index: "a GPU")
    if operation == "linear_statistics":  # as if Triton's kernels served tensors of the CPU
        monkeypatch.setattr(_library, "GPU_KERNELS_ON", "cpu")
    choice = choose(operation, *facts)
    assert choice.implementation == server and reason in choice.reason
    assert (choice in [each for each, _ in TABLE[operation]]) == (reason == "")


@pytest.mark.parametrize(("missing", "server"), [("_cuda_missing", "triton"), ("_missing", "cuda")])
def test_what_is_missing_is_not_launched(missing: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_missing", "_cuda_missing"):
        monkeypatch.setattr(_library, name, {"cuda": "it is not installed" if name == missing else ""})
    monkeypatch.setattr(_choice, "cuda_is_faster", lambda *about: False)
    assert _dispatch.gpu_kernels("token_stats", OnGpu()) == server


@pytest.mark.parametrize(("more", "beyond"), [((), False), ((None, None, None), False), ((None, None, ROW), True)])
def test_a_launch_knows_what_no_cuda_kernel_takes(
    more: tuple[Any, ...], beyond: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sum_sq, grad_sum_sq and shift of the gradient of logits."""
    asked = []
    monkeypatch.setattr(_dispatch, "gpu_kernels", lambda *facts: asked.append(facts) or "triton")
    monkeypatch.setattr(_library, "triton_missing", lambda device_type: "it is not installed")
    with pytest.raises(RuntimeError, match="it is not installed"):
        _dispatch._gpu_launcher("token_stats_backward")(*[ROW] * 6, 1.0, *more)
    assert [(name, said) for name, _, said in asked] == [("token_stats_backward", beyond)]


# ---- nothing else decides ---------------------------------------------------------------------------------------

FACTS = {"cuda_missing", "triton_missing", "extension", "cuda_is_faster", "INTERPRETED", "EMULATED", "_requested"}


def test_operations_ask_the_table_and_nothing_else() -> None:
    """No operation looks at what is installed, requested or measured."""
    for path in sorted((Path(r1kernels.__file__).parent / "ops").rglob("*.py")):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & FACTS, f"{path.name} uses {sorted(names & FACTS)}"
