"""A gradient of a loss is a number without a derivative: to use it in another loss is an error, not a silent 0."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import r1kernels
from r1kernels import testing

IDS = testing.random_ids(2, 5, vocab=11)
LOGITS, HIDDEN, WEIGHT = testing.random_logits(2, 5, 11), testing.random_logits(2, 5, 6), testing.random_logits(11, 6)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "token_logprobs": lambda x: r1kernels.token_logprobs(x, IDS).sum(),
    "cross_entropy": lambda x: r1kernels.cross_entropy(x, IDS),
    "grpo_loss": lambda x: r1kernels.grpo_loss(x, IDS, torch.tensor([1.0, -1.0])).loss,
    "policy_loss": lambda x: r1kernels.policy_loss(x[..., 0], torch.tensor([1.0, -1.0])).loss,
    "distillation_loss": lambda x: r1kernels.distillation_loss(x, LOGITS.flip(-1)).loss,
    "linear_grpo_loss": lambda x: r1kernels.linear_grpo_loss(x[..., :6], WEIGHT, IDS, torch.tensor([1.0, -1.0])).loss,
    "linear_cross_entropy": lambda x: r1kernels.linear_cross_entropy(x[..., :6], WEIGHT, IDS),
    "linear_token_logprobs": lambda x: r1kernels.linear_token_logprobs(x[..., :6], WEIGHT, IDS).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_penalty_is_refused(name: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    with r1kernels.backend(testing.KERNELS):
        loss = LOSSES[name](logits)
        (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        assert torch.equal(grad, expected)
        with pytest.raises(RuntimeError, match="not differentiable twice"):
            (loss + grad.square().sum()).backward()


@pytest.mark.parametrize("name", LOSSES)
def test_a_hessian_is_refused(name: str) -> None:
    """Not 0: there is a path from the gradient to the logits."""
    with r1kernels.backend(testing.KERNELS), pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.functional.hessian(LOSSES[name], LOGITS)


def test_an_estimate_of_kl_is_not_differentiable_twice() -> None:
    with r1kernels.backend(testing.KERNELS), pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.functional.hessian(lambda x: r1kernels.kl_estimate(x, torch.zeros(5)).sum(), torch.ones(5))
