"""What every benchmark shares: named shapes, a batch, peers that may be absent, time and peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import r1kernels


class Shape(NamedTuple):
    """B sequences of T tokens over a vocabulary of V."""

    sequences: int
    tokens: int
    vocab: int


SHAPES = {
    "qwen2.5, 1024 tokens": Shape(8, 128, 151_936),
    "llama-3, 1024 tokens": Shape(8, 128, 128_256),
    "llama-2, 4096 tokens": Shape(16, 256, 32_000),
}


def quietly(load: Callable[[], Any]) -> Any | None:
    """A peer, or None where it is not installed; its import warnings are not ours to raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load()
        except ImportError:
            return None


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """How far the resident memory of the process rises above its level before `run` (Linux only)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def read(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text()).group(1)) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would be re-used unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


class Batch(NamedTuple):
    """bfloat16 logits as a model gives them, and what a rollout stores beside them; every token counts."""

    logits: torch.Tensor
    token_ids: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor


def make_batch(shape: Shape) -> Batch:
    generator = torch.Generator().manual_seed(0)
    b, t, v = shape
    logits = (torch.randn(b, t, v, generator=generator) * 3).bfloat16()
    token_ids = torch.randint(v, (b, t), generator=generator)
    with torch.no_grad():
        logprobs = r1kernels.token_logprobs(logits, token_ids)
    old_logprobs = logprobs + 0.1 * torch.randn(b, t, generator=generator)
    return Batch(logits.requires_grad_(), token_ids, torch.randn(b, generator=generator), old_logprobs)


@pytest.fixture(scope="session")
def batches() -> Callable[[str], Batch]:
    """The batch of a shape by name, without a gradient left over from the benchmark before."""
    cached = functools.lru_cache(maxsize=1)(lambda name: make_batch(SHAPES[name]))

    def fresh(name: str) -> Batch:
        batch = cached(name)
        batch.logits.grad = None
        return batch

    return fresh


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """Times `run` and records its peak memory beside what the report needs to tell the rows apart."""

    def measured(run: Callable[[], object], rounds: int = 21, **row: object) -> None:
        benchmark.extra_info.update(row, peak_extra_bytes=peak_extra_bytes(run))
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)

    return measured
