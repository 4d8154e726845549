"""The fused GRPO step on the CUDA emulator: wrong values that only a device sees, and `grpo_loss` by this one kernel.

`test_cuda_emulated` runs this file.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from r1kernels import _library, backend, grpo_loss, objectives, testing
from r1kernels.ops import grpo_step

if not _library.EMULATED:
    pytest.skip("for the CUDA emulator: test_cuda_emulated runs this file", allow_module_level=True)

from grpo_step_cases import batch, reset, step


@pytest.fixture(autouse=True)
def hopper() -> None:
    reset()


# ---- errors of values that only a device sees ---------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 300, 2**40])
def test_an_id_outside_the_vocabulary(value: int) -> None:
    inputs = batch(torch.bfloat16, 300)
    inputs["token_ids"][1, 2] = value
    with pytest.raises(RuntimeError, match="token_ids holds an id outside"):
        step(inputs, objectives.grpo(), (2,))
    inputs["mask"] = torch.ones(5, 7, dtype=torch.bool)
    inputs["mask"][1, 2] = False
    step(inputs, objectives.grpo(), (2,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"normalizer": torch.tensor(0.0)}, "normalizer must be a positive finite number"),
        ({"normalizer": torch.tensor(math.nan)}, "normalizer must be a positive finite number"),
        ({"cu_seqlens": torch.tensor([0, 3, 34])}, "cu_seqlens must run from 0 to N"),
        ({"cu_seqlens": torch.tensor([0, 36, 35])}, "cu_seqlens must not descend"),
        ({"cu_seqlens": torch.tensor([-(10**12), 5, 35])}, "cu_seqlens must run from 0 to N"),
        ({"cu_seqlens": torch.tensor([0, 10**12, 35])}, "cu_seqlens must not descend"),
    ],
)
def test_wrong_values(wrong: dict[str, Tensor], message: str) -> None:
    inputs = {k: v.flatten(0, 1) if v.dim() > 1 else v[:2] for k, v in batch(torch.bfloat16, 300).items()}
    inputs |= {"cu_seqlens": torch.tensor([0, 3, 35]), "mask": torch.ones(35, dtype=torch.bool)} | wrong
    with pytest.raises(RuntimeError, match=message):
        step(inputs, objectives.grpo(), (2,))


# ---- grpo_loss ----------------------------------------------------------------------------------------------


def loss_and_gradient(inputs: dict[str, Any], factor: float = 1.0, **keywords: Any) -> tuple[Tensor, Tensor]:
    logits = inputs["logits"].detach().requires_grad_()
    loss = grpo_loss(**(inputs | {"logits": logits}), **keywords).loss
    (grad,) = torch.autograd.grad(loss * factor, logits)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grpo_loss_takes_the_step_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(dtype, 300)
    with backend("cuda"):
        *expected, grad = step(inputs, objectives.r1())
        calls = []
        run = grpo_step.grpo_step
        monkeypatch.setattr(grpo_step, "grpo_step", lambda *arguments: calls.append(1) or run(*arguments))
        loss, got = loss_and_gradient(inputs, objective=objectives.r1())
        assert calls == [1] and torch.equal(loss, expected[0]) and torch.equal(got, grad)
        for other in (objectives.gspo(), lambda logprobs, batch: -logprobs):
            loss_and_gradient(inputs, objective=other)
        loss_and_gradient(inputs | {"logits": inputs["logits"].half()})
        with torch.no_grad():
            grpo_loss(**inputs)
        assert calls == [1]


def test_a_factor_of_the_loss_reaches_the_gradient() -> None:
    inputs = batch(torch.float32, 300)
    with backend("cuda"):
        _, once = loss_and_gradient(inputs)
        assert torch.equal(loss_and_gradient(inputs, 4.0)[1], 4 * once)
        assert not loss_and_gradient(inputs, 0.0)[1].any()


def test_any_factor_is_one_more_rounding() -> None:
    inputs = batch(torch.bfloat16, 300)
    with backend("cuda"):
        _, once = loss_and_gradient(inputs)
        for factor in (0.1, 1 / 3, 7.0):
            _, scaled = loss_and_gradient(inputs, factor)
            exact = once.double() * float(torch.tensor(factor))
            testing.assert_within(scaled, exact, testing.rounding(exact, torch.bfloat16))


def test_a_kept_graph_gives_the_same_gradient_again() -> None:
    inputs = batch(torch.bfloat16, 300)
    logits = inputs["logits"].requires_grad_()
    with backend("cuda"):
        loss = 3 * grpo_loss(**inputs).loss
        first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], first)


def test_opcheck() -> None:
    inputs = batch(torch.bfloat16, 300)
    arguments = (
        inputs["logits"], inputs["token_ids"], inputs["advantages"], inputs["old_logprobs"], None, None, None, None,
        None, 1.0, 0, 3, 0, 0.2, 0.2, math.inf, 1.0, 1.05, 0.0, 0.0, 1.0, [], torch.zeros(5, 7, 300).bfloat16(),
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.r1kernels.grpo_step.default, arguments, test_utils=tests)
