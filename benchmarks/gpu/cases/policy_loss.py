"""Policy loss, group advantages and KL of few tokens: launches, not bytes, so CUDA graphs are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import r1kernels
from gpu.inputs import generator, noise_like
from gpu.losses import PEER_TOLERANCE, compare, distance, with_compiled
from gpu.setting import OURS, Candidate, Case, Setting, policy_shapes, with_cuda
from gpu.timing import Timed
from r1kernels.bench import eager
from r1kernels.bench.peers import EAGER

GROUP = 8


def _inputs(setting: Setting, sequences: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs (B, T), old log-probs, rewards (B / G, G))."""
    rng = generator(setting.device)
    logprobs = -torch.rand(sequences, length, generator=rng, device=setting.device) * 3 - 0.1
    rewards = torch.rand(sequences // GROUP, GROUP, generator=rng, device=setting.device)
    return logprobs, logprobs + noise_like(logprobs, 0.1), rewards


def ours(logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor) -> Tensor:
    advantages = r1kernels.group_advantages(rewards).flatten()
    return r1kernels.policy_loss(logprobs, advantages, old_logprobs=old_logprobs).loss


def plain(logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor) -> Tensor:
    return eager.clipped_loss(logprobs, eager.group_advantages(rewards).flatten(), old_logprobs)


def kl_case(setting: Setting, logprobs: Tensor, ref_logprobs: Tensor, tokens: str) -> Case:
    def check(function: Callable[..., Tensor], tolerance: float) -> None:
        compare("the estimate", function(logprobs, ref_logprobs),
                eager.kl_estimate(logprobs.double(), ref_logprobs.double()), tolerance)

    ours = r1kernels.kl_estimate, 4 * torch.finfo(torch.float32).eps
    functions = {OURS: ours, EAGER: (eager.kl_estimate, PEER_TOLERANCE)}
    candidates = {
        name: Candidate(Timed(partial(function, logprobs, ref_logprobs)), partial(check, function, tolerance), True)
        for name, (function, tolerance) in functions.items()
    }
    return Case("kl_estimate", "forward, graph", tokens, torch.float32, with_cuda(candidates, setting))


def cases(setting: Setting) -> Iterator[Case]:
    for sequences, length in policy_shapes(setting):
        yield from of_tokens(setting, _inputs(setting, sequences, length))


def of_tokens(setting: Setting, inputs: tuple[Tensor, ...]) -> Iterator[Case]:
    leaf = inputs[0].clone().requires_grad_()

    def forward(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(leaf, *inputs[1:]).detach()

    def both(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(leaf, *inputs[1:]), leaf)

    def check(name: str, function: Callable[..., Tensor]) -> None:
        exact_leaf, *others = (value.detach().double() for value in (leaf, *inputs[1:]))
        exact = plain(exact_leaf.requires_grad_(), *others)
        (exact_grad,) = torch.autograd.grad(exact, exact_leaf)
        error = distance(both(plain)()[0], exact_grad) + torch.finfo(torch.float32).eps
        tolerance = 2 * error if name == OURS else PEER_TOLERANCE
        compare("the gradient", both(function)()[0], exact_grad, tolerance)
        # Terms of both signs cancel in the loss, so its error is one of their size.
        loss, expected = float(forward(function)()), float(exact.detach())
        if not abs(loss - expected) <= tolerance:
            raise AssertionError(f"the loss is {loss}, expected {expected}")

    functions: dict[str, Callable[..., Tensor]] = {OURS: ours, EAGER: plain}
    if setting.compiled:
        functions |= with_compiled(plain)
    tokens = f"{leaf.shape[0]} x {leaf.shape[1]} tokens"
    for case, make, graph in (
        ("forward, graph", forward, True), ("forward + backward, graph", both, True),
        ("forward + backward, queued call by call", both, False),
    ):
        candidates = {
            name: Candidate(Timed(make(function)), partial(check, name, function), graph)
            for name, function in functions.items()
        }
        yield Case("policy_loss + group_advantages", case, tokens, torch.float32, with_cuda(candidates, setting))
    yield kl_case(setting, inputs[0], inputs[1], tokens)
