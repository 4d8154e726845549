"""What every benchmark shares: named shapes, a batch, peers that may be absent, time in turns and peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import time
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


# Shapes so small that all benchmarks together take a minute: to see that they work, not for their numbers.
SMALL = bool(os.environ.get("R1KERNELS_BENCH_SMALL"))
SHAPES = {"small": Shape(2, 16, 512)} if SMALL else {
    "llama-2, 4096 tokens": Shape(16, 256, 32_000),
    "llama-3, 1024 tokens": Shape(8, 128, 128_256),
    "qwen2.5, 1024 tokens": Shape(8, 128, 151_936),
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
    r1kernels.release_workspace()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would be re-used unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


class BusyProcess:
    """Another process that computes without a pause at the lowest priority, as data loaders and verifiers do, while a
    candidate made by `beside` runs."""

    def __init__(self) -> None:
        # It gets a new session: Linux first divides processors between sessions, and only then looks at priorities.
        command = ["nice", "-n", "19", sys.executable, "-c", "while True: pass"]
        self.child = subprocess.Popen(command, start_new_session=True)
        time.sleep(0.5)
        self.child.send_signal(signal.SIGSTOP)

    def beside(self, run: Callable[[], object]) -> Callable[[], None]:
        def both() -> None:
            self.child.send_signal(signal.SIGCONT)
            run()
            self.child.send_signal(signal.SIGSTOP)

        return both

    def __enter__(self) -> BusyProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()


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
def in_turns(benchmark: Any) -> Callable[..., list[dict[str, Any]]]:
    """Times candidates in turns, and keeps a row of each for the report.

    What else a machine does changes by the minute, so only times of one round are compared: `ratio` is the median over
    rounds of a candidate's time over that of the first candidate.
    """

    def measured(
        candidates: dict[str, Callable[[], object]], *, op: str, shape: str, rounds: int, slow: dict[str, int] = {},  # noqa: B006
    ) -> list[dict[str, Any]]:
        """`slow`: candidates that take part in so many rounds only, by name."""
        memory = {}
        for name, run in candidates.items():
            run()
            memory[name] = peak_extra_bytes(run)
        times: dict[str, list[float]] = {name: [] for name in candidates}

        def one_round() -> None:
            for name, run in candidates.items():
                if len(times[name]) < slow.get(name, rounds):
                    # Untimed: a system may have taken back the memory that others gave up, and whoever comes next
                    # would pay for it (seen on virtual machines: 3 ms for each 2 MiB, until the second run).
                    run()
                    if name not in slow:
                        run()
                    started = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - started)

        benchmark.pedantic(one_round, rounds=rounds)
        first = next(iter(times.values()))
        rows = []
        for name, taken in times.items():
            low, median, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
            ratio = statistics.median(mine / base for mine, base in zip(taken, first, strict=False))
            rows.append({
                "op": op, "shape": shape, "implementation": name, "peak_extra_bytes": memory[name],
                "median_s": median, "iqr_s": high - low, "rounds": len(taken), "ratio": ratio,
            })
        benchmark.extra_info["rows"] = rows
        return rows

    return measured
