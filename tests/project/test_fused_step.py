"""Which calls the fused step serves, and what is said about the others, on a machine without a GPU."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1kernels import _dispatch, objectives
from r1kernels.ops import grpo_step, policy_loss


@pytest.fixture
def call() -> tuple[torch.Tensor, Any]:
    """What `grpo_loss` asks about: logits that want a gradient, and checked inputs."""
    logits = torch.zeros(1, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    inputs = policy_loss.check_inputs(
        logits, (1, 2), torch.ones(1), tokens="token_ids", old_logprobs=None, ref_logprobs=None, mask=None,
        cu_seqlens=None, importance_weights=None, normalizer=None, objective=objectives.grpo(), dtype=torch.float32,
    )
    return logits, inputs


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CUDA kernels served tensors of the CPU."""
    monkeypatch.setattr(_dispatch, "select", lambda tensor: "triton")
    monkeypatch.setattr(_dispatch, "gpu_kernels", lambda operator, like: "cuda")


def test_the_fused_step_serves_what_no_reason_forbids(call: tuple[torch.Tensor, Any], on_gpu: None) -> None:
    assert _dispatch.choose("grpo_step", *call).implementation == "fused"


@pytest.mark.parametrize("reason", [reason for reason, _ in _dispatch.TABLE["grpo_step"][0].unless])
def test_the_fused_step_says_why_it_does_not_serve(
    reason: str, call: tuple[torch.Tensor, Any], on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, inputs = call
    if "gradient" in reason:
        logits = logits.detach()
    elif "compile" in reason:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif "callable" in reason:
        inputs = inputs._replace(objective=dataclasses.replace(inputs.objective, surrogate=lambda *_: logits))
    elif "ratio is of sequences" in reason:
        inputs = inputs._replace(objective=objectives.gspo())
    elif "other weights" in reason:
        inputs = inputs._replace(objective=objectives.dr_grpo(8, entropy_coef=0.1))
    elif "split over ranks" in reason:
        inputs = inputs._replace(group="a group")
    elif "float32" in reason:
        logits = logits.detach().half().requires_grad_()
    elif "no GPU" in reason:
        monkeypatch.setattr(_dispatch, "select", lambda tensor: "reference")
    else:
        monkeypatch.setattr(_dispatch, "gpu_kernels", lambda operator, like: "triton")
    choice = _dispatch.choose("grpo_step", logits, inputs)
    assert choice.implementation == "separate" and choice.reason.endswith(reason)


def test_every_reason_of_the_operator_has_a_text() -> None:
    """The numbers are those of an enumeration in C++."""
    header = (Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "grpo_step.h").read_text()
    enumeration = re.search(r"enum class Unfused : int \{(.*?)\};", header, re.DOTALL).group(1)
    assert {int(number) for number in re.findall(r"\w+ = (\d+),", enumeration)} == {0, *grpo_step.PASSES}


@pytest.mark.parametrize("unfused", [0, *grpo_step.PASSES])
def test_the_operator_tells_its_tile(unfused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def tile(logits: torch.Tensor, grad_logits: torch.Tensor) -> tuple[int, int, int, int]:
        assert grad_logits.shape == logits.shape and grad_logits.is_contiguous()
        return 4, 3, 99, unfused

    operators = SimpleNamespace(r1kernels_cuda=SimpleNamespace(grpo_step_tile=SimpleNamespace(default=tile)))
    monkeypatch.setattr(grpo_step, "torch", SimpleNamespace(ops=operators, empty=torch.empty))
    assert grpo_step.chosen_tile(torch.zeros(2, 8).T) == (4, 3, 99, grpo_step.PASSES.get(unfused, ""))
