"""All statistics of tokens beside log-prob and entropy alone, from logits and from hidden states, in bfloat16.

R1KERNELS_BENCH_OTHER=FOLDER, with another version of the package in it, also times that version's log-prob and entropy,
in turns with this one's, after a check that both give the same bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import r1kernels

SMALL = bool(os.environ.get("R1KERNELS_BENCH_SMALL"))
OTHER = os.environ.get("R1KERNELS_BENCH_OTHER", "")
# N, H, V
SHAPES = {"small": (64, 64, 4_096)} if SMALL else {
    "2048 tokens, H 1024, V 32768": (2048, 1024, 32_768),
    "2048 tokens, H 1024, V 151936": (2048, 1024, 151_936),
}
SOURCES = ("logits", "hidden")
PASSES = ("forward", "forward + backward")


def inputs_of(source: str, shape: str) -> tuple[Tensor, ...]:
    """(logits, ids), or (hidden, weight, ids), in bfloat16."""
    tokens, width, vocab = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (tokens,), generator=generator)
    if source == "logits":
        return (torch.randn(tokens, vocab, generator=generator) * 3).bfloat16(), ids
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    return hidden, (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).bfloat16(), ids


def both(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    of_logits = len(inputs) == 2
    function = r1kernels.token_logprobs_and_entropy if of_logits else r1kernels.linear_token_logprobs_and_entropy
    return function(*inputs)


def everything(inputs: tuple[Tensor, ...], **keywords: Any) -> Any:
    return (r1kernels.token_statistics if len(inputs) == 2 else r1kernels.linear_token_statistics)(*inputs, **keywords)


def step(function: Callable[..., Any], source: str, shape: str, passes: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that returns log-prob and entropy; with a backward from both of them."""
    *tensors, ids = inputs_of(source, shape)
    slopes = torch.randn(2, len(ids), generator=torch.Generator().manual_seed(1))
    for tensor in tensors:
        tensor.requires_grad_(passes != "forward")

    def run() -> tuple[Tensor, Tensor]:
        result = function((*tensors, ids))
        logprobs, entropy = (result.logprobs, result.entropy) if hasattr(result, "entropy") else result
        if passes != "forward":
            torch.autograd.grad((logprobs, entropy), tensors, tuple(slopes))
        return logprobs.detach(), entropy.detach()

    return run


class OtherVersion:
    """The package in a folder, in a process that makes a call for each line that it reads."""

    def __init__(self, folder: str, *which: str) -> None:
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, str(Path(__file__).resolve()), *which]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __call__(self) -> str:
        """A checksum of log-prob and entropy."""
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return self.child.stdout.readline().strip()

    def __enter__(self) -> OtherVersion:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.communicate()


def checksum(results: tuple[Tensor, Tensor]) -> str:
    return " ".join(str(int(value.view(torch.int32).long().sum())) for value in results)


def check(source: str, shape: str) -> None:
    """No number without the equality check: the bits of log-prob and entropy, and the others against float64."""
    inputs = inputs_of(source, shape)
    few = (*((inputs[0][:16],) if source == "logits" else (inputs[0][:16], inputs[1])), inputs[-1][:16])
    result = everything(few)
    for value, expected in zip((result.logprobs, result.entropy), both(few), strict=True):
        assert torch.equal(value, expected)
    z = few[0].double() if source == "logits" else few[0].double() @ few[1].double().T
    exact = {"lse": z.logsumexp(-1), "sum_sq_probs": z.softmax(-1).square().sum(-1), "mean_logit": z.mean(-1)}
    for name, value in exact.items():
        torch.testing.assert_close(getattr(result, name).double(), value, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.is_top1, z.argmax(-1) == few[-1])


def bench_token_statistics(in_turns: Callable[..., list[dict[str, Any]]], case: tuple[str, ...]) -> None:
    source, shape, passes = case
    check(source, shape)
    candidates: dict[str, Callable[[], object]] = {
        "log-prob + entropy": step(both, source, shape, passes),
        "all statistics": step(everything, source, shape, passes),
        "and 16 selected ids": step(
            lambda inputs: everything(inputs, selected_ids=inputs[-1][:, None].expand(-1, 16)), source, shape, passes
        ),
    }
    rounds = 41 if source == "logits" else 11  # from logits, a run takes less time than the noise of a machine lasts
    names = {"op": "token_statistics", "shape": f"{source}, {passes}, {shape}", "rounds": rounds}
    if not OTHER:
        in_turns(candidates, **names)
        return
    with OtherVersion(OTHER, *case) as other:
        assert other() == checksum(candidates["log-prob + entropy"]())
        in_turns({"log-prob + entropy": candidates["log-prob + entropy"], "other version": other}, **names)


def pytest_generate_tests(metafunc: Any) -> None:
    if "case" in metafunc.fixturenames:
        cases = [(source, shape, passes) for source in SOURCES for shape in SHAPES for passes in PASSES]
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


if __name__ == "__main__":
    run = step(both, *sys.argv[1:])
    for _ in sys.stdin:
        print(checksum(run()), flush=True)
