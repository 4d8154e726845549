"""On a GPU: CUDA graphs, streams, synchronisation, bits that never change, and ids out of range."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu_cases import (
    FOR_EVERYTHING,
    KERNELS,
    Inputs,
    head_of,
    ids_of,
    leaves_of,
    logits_of,
    needs_device,
    needs_gpu,
    on_device,
    ours,
    size,
)
from torch import Tensor

import r1kernels
from r1kernels import objectives

pytestmark = needs_gpu
B, T, V, H = size(4, 2), size(128, 6), size(32_003, 131), size(512, 16)
REPEATS = size(100, 3)
LARGEST_ERROR = 2e-5  # of the log-probs of a head, in nats


@pytest.fixture(autouse=True, params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with ours(request.param):
        yield request.param


def policy_of(logprobs: Tensor, seed: int) -> Inputs:
    return {
        "advantages": on_device(B, seed=seed + 2).sign() * 1.5,
        "old_logprobs": logprobs + on_device(B, T, seed=seed + 3).sign() * 0.05,
        "mask": on_device(B, T, seed=seed + 5) > -1,
    }


def logits_inputs(seed: int = 0) -> Inputs:
    logits, ids = logits_of(B, T, V, seed=seed), ids_of(B, T, vocab=V, seed=seed + 1)
    return {"logits": logits, "token_ids": ids, **policy_of(r1kernels.token_logprobs(logits, ids), seed)}


def linear_inputs(seed: int = 0) -> Inputs:
    hidden, weight = head_of(B * T, H, V)
    hidden, ids = (hidden * (1 + seed / 100)).to(hidden.dtype).view(B, T, H), ids_of(B, T, vocab=V, seed=seed + 1)
    logprobs = r1kernels.linear_token_logprobs(hidden, weight, ids)
    return {"hidden": hidden, "weight": weight, "token_ids": ids, **policy_of(logprobs, seed)}


def distillation_inputs(seed: int = 0) -> Inputs:
    return {"student_logits": logits_of(B, T, V, seed=seed), "teacher_logits": logits_of(B, T, V, seed=seed + 7)}


def linear_distillation_inputs(seed: int = 0) -> Inputs:
    given = linear_inputs(seed)
    other = (0.7 * given["hidden"] + 0.7 * on_device(B, T, H, seed=seed + 8)).to(given["hidden"].dtype)
    return {"student_hidden": given["hidden"], "student_weight": given["weight"], "teacher_hidden": other,
            "teacher_weight": given["weight"]}


class Step:
    """Forward and backward of a loss: (loss, gradients)."""

    def __init__(self, make: Callable[[int], Inputs], leaves: tuple[str, ...], function: Callable[..., Any]) -> None:
        self.make, self.leaves, self.function = make, leaves, function

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        given = leaves_of(inputs, self.leaves)
        loss = self.function(**given)
        return loss.detach(), *torch.autograd.grad(loss, [given[name] for name in self.leaves])


def _policy(logits: Tensor, token_ids: Tensor, **given: Tensor) -> Tensor:
    rewards = given["advantages"].view(-1, 2).float()
    advantages = r1kernels.group_advantages(rewards).flatten() + given["advantages"]
    logprobs, entropy = r1kernels.token_logprobs_and_entropy(logits, token_ids)
    return r1kernels.policy_loss(
        logprobs, advantages, old_logprobs=given["old_logprobs"], ref_logprobs=given["old_logprobs"], entropy=entropy,
        mask=given["mask"], objective=objectives.grpo(kl_coef=0.1, entropy_coef=0.01),
    ).loss


def _linear_statistics(hidden: Tensor, weight: Tensor, token_ids: Tensor, **_: Tensor) -> Tensor:
    logprobs, entropy = r1kernels.linear_token_logprobs_and_entropy(hidden, weight, token_ids)
    return logprobs.mean() + 0.1 * entropy.mean()


STEPS = {
    "grpo_loss": Step(logits_inputs, ("logits",), lambda **x: r1kernels.grpo_loss(**x).loss),
    "policy_loss, group_advantages": Step(logits_inputs, ("logits",), _policy),
    "cross_entropy": Step(
        logits_inputs, ("logits",), lambda logits, token_ids, **_: r1kernels.cross_entropy(logits, token_ids)
    ),
    "distillation_loss": Step(
        distillation_inputs, ("student_logits",), lambda **x: r1kernels.distillation_loss(**x, divergence="jsd").loss
    ),
    "linear_grpo_loss with capacity": Step(
        linear_inputs, ("hidden", "weight"), lambda **x: r1kernels.linear_grpo_loss(**x, capacity=B * T).loss
    ),
    "linear_cross_entropy with capacity": Step(
        linear_inputs, ("hidden", "weight"),
        lambda hidden, weight, token_ids, **_: r1kernels.linear_cross_entropy(
            hidden, weight, token_ids, capacity=B * T
        ),
    ),
    "linear_distillation_loss with capacity": Step(
        linear_distillation_inputs, ("student_hidden", "student_weight"),
        lambda **x: r1kernels.linear_distillation_loss(**x, divergence="jsd", capacity=B * T).loss,
    ),
}
WAITING = {
    "linear_grpo_loss": Step(linear_inputs, ("hidden", "weight"), lambda **x: r1kernels.linear_grpo_loss(**x).loss),
    "linear statistics": Step(linear_inputs, ("hidden", "weight"), _linear_statistics),
}


BY_CUDA = ("grpo_loss", "policy_loss, group_advantages", "cross_entropy")


def on_kernels(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each name with each of the kernels that serve it."""
    served = [(name, kernels) for name in names for kernels in KERNELS if kernels != "cuda" or name in BY_CUDA]
    return pytest.mark.parametrize("name, kernels", served, indirect=["kernels"])


def assert_same(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bits, but where a library multiplies matrices: it may choose another algorithm inside a graph or on a stream."""
    for value, true in zip(found, expected, strict=True):
        if name.startswith("linear"):
            error = (value.double() - true.double()).norm() / true.double().norm()
            assert error <= 2 * max(torch.finfo(true.dtype).eps, LARGEST_ERROR), f"{name}: off by {float(error):.3g}"
        else:
            assert torch.equal(value, true), f"{name}: off by {(value.double() - true.double()).abs().max()}"


# ---- the same bits -----------------------------------------------------------------------------------------


@on_kernels([*STEPS, *WAITING])
def test_repeats_are_bit_identical(name: str) -> None:
    step = (STEPS | WAITING)[name]
    inputs = step.make(0)
    first = step(inputs)
    for _ in range(REPEATS):
        for found, expected in zip(step(inputs), first, strict=True):
            assert torch.equal(found, expected)


# ---- graphs, streams, synchronisation ----------------------------------------------------------------------


def captured(step: Step, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inputs)
    return graph, results


@needs_device
@on_kernels(STEPS)
def test_a_captured_graph_replays_with_other_inputs(name: str) -> None:
    step = STEPS[name]
    fixed = step.make(0)
    graph, results = captured(step, fixed)
    for seed in (10, 20, 0):
        fresh = step.make(seed)
        for field, value in fresh.items():
            fixed[field].copy_(value)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(name, results, step(fresh))


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_device
@on_kernels(STEPS)
def test_nothing_waits_for_the_device(name: str) -> None:
    step = STEPS[name]
    inputs = step.make(0)
    expected = step(inputs)  # compiles
    with waiting_is_an_error():
        found = step(inputs)
    assert_same(name, found, expected)


@needs_device
@on_kernels([*STEPS, *WAITING])
def test_kernels_run_on_the_stream_of_their_caller(name: str) -> None:
    """The inputs are finished late on that stream alone: a kernel on another would read what was there before."""
    step = (STEPS | WAITING)[name]
    inputs = step.make(0)
    expected = step(inputs)
    late = {field: torch.zeros_like(value) for field, value in inputs.items()}
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(50_000_000)
        for field, value in inputs.items():
            late[field].copy_(value)
        found = step(late)
    aside.synchronize()
    assert_same(name, found, expected)


# ---- bad ids, in a process of their own: a failed assertion ends its use of the device ------------------------

PROGRAM = """
import torch, r1kernels
torch.manual_seed(0)
ids = torch.tensor([1, BAD, 3], device="cuda")
logits = torch.randn(3, 1000, device="cuda").bfloat16()
hidden, weight = torch.randn(3, 64, device="cuda").bfloat16(), torch.randn(1000, 64, device="cuda").bfloat16()
with r1kernels.backend("KERNELS"):
    CALL
    torch.cuda.synchronize()
print("used")
"""
CALLS = {
    "token_logprobs": "r1kernels.token_logprobs(logits, ids)",
    "grpo_loss": "r1kernels.grpo_loss(logits[None], ids[None], torch.ones(1, device='cuda'))",
    "grpo_loss with a gradient":
        "r1kernels.grpo_loss(logits[None].requires_grad_(), ids[None], torch.ones(1, device='cuda')).loss.backward()",
    "cross_entropy": "r1kernels.cross_entropy(logits, ids)",
    "linear_token_logprobs": "r1kernels.linear_token_logprobs(hidden, weight, ids)",
}
CAPACITY = """weight.requires_grad_()
    ones = torch.ones(1, 3, device="cuda")
    r1kernels.linear_grpo_loss(hidden[None], weight, ids[None], ones, capacity=2, mask=ones)"""
Outcomes = dict[tuple[str, str], subprocess.CompletedProcess[str]]


def programs(kernels: str) -> dict[tuple[str, str], str]:
    calls = {name: call for name, call in CALLS.items() if kernels != "cuda" or not name.startswith("linear")}
    found = {f"{name} of {bad}": (call, str(bad)) for name, call in calls.items() for bad in (1000, -1)}
    found["ids in range"] = "\n    ".join(calls.values()), "999"
    if kernels in FOR_EVERYTHING:
        found["capacity"] = CAPACITY, "2"
    return {
        (name, kernels): PROGRAM.replace("CALL", call).replace("BAD", bad).replace("KERNELS", kernels)
        for name, (call, bad) in found.items()
    }


PROGRAMS = {key: program for kernels in KERNELS for key, program in programs(kernels).items()}


def of_programs(what: str) -> pytest.MarkDecorator:
    """A test of each program whose name has this in it."""
    return pytest.mark.parametrize("name, kernels", [key for key in PROGRAMS if what in key[0]], indirect=["kernels"])


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """Of all programs, run at once: each takes seconds to start."""

    def run(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=900,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    with ThreadPoolExecutor(12) as pool:
        return dict(zip(PROGRAMS, pool.map(run, PROGRAMS.values()), strict=True))


@needs_device
@of_programs(" of ")
def test_ids_out_of_range_are_refused_by_name(name: str, kernels: str, outcomes: Outcomes) -> None:
    outcome = outcomes[name, kernels]
    assert outcome.returncode != 0 and "used" not in outcome.stdout
    assert "outside [0, V)" in outcome.stderr, outcome.stderr[-2000:]


@needs_device
@of_programs("ids in range")
def test_ids_within_range_are_not(name: str, kernels: str, outcomes: Outcomes) -> None:
    outcome = outcomes[name, kernels]
    assert outcome.returncode == 0 and "used" in outcome.stdout, outcome.stderr[-2000:]


@needs_device
@of_programs("capacity")
def test_more_tokens_than_the_capacity_are_refused(name: str, kernels: str, outcomes: Outcomes) -> None:
    outcome = outcomes[name, kernels]
    assert outcome.returncode != 0 and "assert" in outcome.stderr.lower(), outcome.stderr[-2000:]
