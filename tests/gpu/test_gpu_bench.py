"""On a GPU: `r1kernels bench --device cuda`. The clock of a GPU is also tested with a device that is made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_cases import needs_device

from r1kernels.bench import cli, clock


class Event:
    """Time passes with each event: 5 ms."""

    ticks: Iterator[int]
    seen: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0

    def record(self) -> None:
        self.at = next(Event.ticks)
        Event.seen.append("event")

    def synchronize(self) -> None:
        Event.seen.append("synchronize")

    def elapsed_time(self, end: Event) -> float:
        return 5.0 * (end.at - self.at)


def test_events_are_around_the_calls_and_the_flush_is_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.ticks, Event.seen = iter(range(100)), []
    sizes: list[int] = []

    def zeros(size: int, dtype: torch.dtype, **_: Any) -> SimpleNamespace:
        sizes.append(size * dtype.itemsize)
        return SimpleNamespace(sum=lambda: Event.seen.append("flush"))

    monkeypatch.setattr(clock.torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = clock.DeviceClock(torch.device("cpu"))
    assert sizes == [1 << 30] and found.hides_s == pytest.approx(0.005)
    assert Event.seen[:4] == ["event", "flush", "event", "synchronize"]
    Event.seen.clear()
    assert found.seconds(lambda: Event.seen.append("call"), 2) == pytest.approx(0.0025) and found.host_s >= 0
    assert Event.seen == ["flush", "event", "call", "call", "event", "synchronize"]


@pytest.mark.gpu
@needs_device
def test_the_command_measures_a_gpu(tmp_path: Path) -> None:
    names = ["token_logprobs", "linear_cross_entropy", "kl_estimate"]
    command = ["--size", "small", "--device", "cuda", "--out", str(tmp_path), "--only", *names]
    assert cli.main(command) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["device_type"] == "cuda" and found["instruction_set"] is None
    ours = [row for row in found["rows"] if row["implementation"] == "r1kernels"]
    assert {row["case"] for row in ours} == set(names)
    assert all(row["peak_extra_bytes"] >= 0 and row["median_s"] > 0 for row in ours)
