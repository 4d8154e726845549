"""Stopping at a moment from which the run can continue."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A stop was asked for, and this is a safe place to stop at."""


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is untouched."""


class Interrupt:
    """Turns SIGINT and SIGTERM into an `Interrupted` at the next `check`.

    Code calls `check` wherever the trainer's state is whole: between tokens of a rollout, between the
    micro-batches before an optimiser step, never inside one. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def check(self) -> None:
        if self.requested:
            raise Interrupted(self.requested)

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.requested}: stopping at the next safe place; once more to stop at once\n".encode())
