"""A loss that you write for single tokens costs what a built-in objective costs, and needs no tensor of logits.

    python examples/token_local_objective.py
    python examples/token_local_objective.py --tokens 4096 --width 1024 --vocab 151936 --device cuda

The loss bounds the ratio on one side, and adds a penalty where the entropy is low. It is compared with autograd on the
whole tensor of logits: the loss and the gradients of hidden states and head are equal up to rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import r1kernels
from r1kernels import Objective, PolicyBatch, testing

LEAST_ENTROPY = 4.0


def my_loss(logprobs: Tensor, entropies: Tensor, tokens: PolicyBatch) -> Tensor:
    """The losses (n,) of n tokens. Nothing here may depend on more than one token."""
    ratio = (logprobs - tokens.old_logprobs).exp()
    bounded = torch.where(tokens.advantages > 0, ratio.clamp(max=1.3), ratio.clamp(min=0.7))
    return 0.1 * (LEAST_ENTROPY - entropies).clamp(min=0) ** 2 - bounded * tokens.advantages


def fused(hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    objective = Objective.token_local(my_loss)  # the mean over tokens, unless you set `aggregate`
    return r1kernels.linear_grpo_loss(
        hidden, weight, token_ids, advantages, old_logprobs=old_logprobs, objective=objective).loss


def dense(hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    """The same in plain PyTorch, with three tensors that are as wide as the vocabulary."""
    logits = hidden @ weight.T
    all_logprobs = logits.log_softmax(-1)
    logprobs = all_logprobs.gather(-1, token_ids[:, None])[:, 0]
    entropies = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return my_loss(logprobs, entropies, SimpleNamespace(advantages=advantages, old_logprobs=old_logprobs)).mean()


def loss_and_gradients(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *rest: Tensor) -> list[Tensor]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    value = loss(*leaves, *rest)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    testing.check_token_local(my_loss)  # raises an error if a token's loss depends on another token

    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, device=options.device)
    weight = torch.randn(options.vocab, options.width, device=options.device) * 2.5 / options.width**0.5
    token_ids = r1kernels.linear_logits(hidden, weight).softmax(-1).multinomial(1)[:, 0]
    old_logprobs = r1kernels.linear_token_logprobs(hidden, weight, token_ids) + 0.3 * torch.randn_like(hidden[:, 0])
    batch = (hidden, weight, token_ids, torch.randn_like(hidden[:, 0]), old_logprobs)
    found, expected = loss_and_gradients(fused, *batch), loss_and_gradients(dense, *batch)
    for name, ours, plain in zip(("loss", "gradient of hidden", "gradient of weight"), found, expected, strict=True):
        print(f"{name}: largest difference {(ours - plain).abs().max():.1e}, largest value {plain.abs().max():.1e}")
