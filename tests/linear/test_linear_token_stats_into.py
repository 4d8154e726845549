"""`token_stats_into` of `linear_grpo_loss`: the statistics of single tokens that the loss computes anyway."""

import pytest
import torch
from backends import slow_interpreted
from linear_policy_cases import head_of, make

from r1kernels import linear_grpo_loss, linear_token_logprobs_and_entropy, objectives


def shape_of(inputs: dict) -> torch.Size:
    return inputs["token_ids"].shape


@pytest.mark.parametrize("objective", [objectives.grpo(), objectives.gspo(), objectives.vespo(),
                                       objectives.grpo(entropy_coef=0.1)])
@pytest.mark.parametrize("gradients", [True, False])
@slow_interpreted
def test_are_those_of_all_tokens_that_count(objective, gradients: bool, implementation: str) -> None:
    inputs = make("everything", "holes")
    expected = linear_token_logprobs_and_entropy(**head_of(inputs), mask=inputs["mask"])
    found = tuple(torch.full(shape_of(inputs), torch.nan) for _ in range(2))
    inputs["hidden"].requires_grad_(gradients)
    needed = {name: inputs[name] for name in ("advantages", "old_logprobs", "mask")}
    arguments = {**head_of(inputs), **needed, "objective": objective, "measure_all": True}
    result = linear_grpo_loss(**arguments, token_stats_into=found)
    alone = linear_grpo_loss(**arguments)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
        assert not value.requires_grad
    assert torch.equal(result.loss, alone.loss)
    if gradients:
        assert torch.equal(*(torch.autograd.grad(loss.loss, inputs["hidden"])[0] for loss in (result, alone)))


def test_tokens_that_are_not_computed_have_0(implementation: str) -> None:
    inputs = make("plain", "holes")
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    found = tuple(torch.full(shape_of(inputs), torch.nan) for _ in range(2))
    needed = {name: inputs[name] for name in ("advantages", "old_logprobs", "mask")}
    linear_grpo_loss(**head_of(inputs), **needed, token_stats_into=found)
    assert not torch.stack(found).any()


@pytest.mark.parametrize("given, error, text", [
    (torch.zeros(2, 3), TypeError, "token_stats_into"),
    ((torch.zeros(1), torch.zeros(1)), ValueError, "token_stats_into logprobs has shape"),
    (("shape", "half"), TypeError, "token_stats_into entropy has dtype"),
    (("gradient", "shape"), ValueError, "token_stats_into logprobs requires a gradient"),
    (("twice",) * 2, ValueError, "token_stats_into has the same tensor twice"),
    ([torch.zeros(1), torch.zeros(1)], TypeError, "token_stats_into is a list"),
])
def test_wrong_tensors_are_named(given, error: type, text: str, implementation: str) -> None:
    inputs = make("plain", "holes")
    if isinstance(given, tuple) and isinstance(given[0], str):
        zeros = torch.zeros(shape_of(inputs))
        made = {"shape": zeros, "twice": zeros, "half": zeros.half(), "gradient": zeros.clone().requires_grad_()}
        given = tuple(made[name] for name in given)
    needed = {name: inputs[name] for name in ("advantages", "old_logprobs", "mask")}
    with pytest.raises(error, match=text):
        linear_grpo_loss(**head_of(inputs), **needed, token_stats_into=given)
