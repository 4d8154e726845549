"""What a stage writes step by step: metrics, times apart from them, examples, and a copy to trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from r1kernels.train.metrics import MetricsLog, split_timings
from r1kernels.train.stage import Stage
from r1kernels.train.trackers import Trackers


class StepLog:
    """The logs of one stage.

    Args:
        first_step: where the stage (re)starts: lines of this and later steps are removed, for they come again.
    """

    def __init__(self, stage: Stage, *, first_step: int) -> None:
        files = (stage.directory / f"{name}.jsonl" for name in ("metrics", "timings", "samples"))
        self._metrics, self._times, self._samples = (MetricsLog(file, first_step=first_step) for file in files)
        self._trackers = Trackers(
            stage.recipe.trackers, stage.directory.parent, stage.config.name,
            warn=lambda text: stage.console.say(text, warning=True),
        )
        self._open = contextlib.ExitStack()

    def write(self, line: Mapping[str, Any]) -> None:
        """One step: what depends on the clock goes to timings.jsonl, so that equal runs have equal metrics."""
        metrics, times = split_timings(line)
        self._metrics.write(metrics)
        self._times.write(times)
        self._trackers.write(line["step"], line)

    def examples(self, step: int, examples: list[dict[str, Any]]) -> None:
        for example in examples:
            self._samples.write({"step": step, **example})

    def sync(self) -> None:
        """Puts what was written on the disk, before a checkpoint that takes it for granted."""
        for log in (self._metrics, self._times, self._samples):
            log.sync()

    def __enter__(self) -> StepLog:
        for log in (self._metrics, self._times, self._samples):
            self._open.enter_context(log)
        self._open.callback(self._trackers.close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
