"""How a run ends early: errors, which are shown as a message without a traceback, and signals."""

from __future__ import annotations

import os
import signal
from typing import Any


class RunError(Exception):
    """Ends the run. The message says what was wrong, what was expected and what to do."""


class ConfigError(RunError, ValueError):
    """A setting that cannot be used; the message names the key, its value and what was expected."""


class DataError(RunError, ValueError):
    """A data set that cannot be used; the message names the file, the line and what was expected."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or of an unknown format; the message names the file."""


class StorageError(RunError):
    """A file could not be written, for example because the disk is full. Older files are unchanged."""


class TrainingError(RunError):
    """Training cannot go on, for example because a loss is not finite. The last checkpoint is unchanged."""


class Interrupted(KeyboardInterrupt):
    """A stop was requested. It is raised only where the run can continue later."""


class Interrupt:
    """Turns SIGINT and SIGTERM into an `Interrupted` at the next `check`, which code calls where its state is complete.

    A second signal stops the process immediately. Both signals are handled even if the process was started with SIGINT
    ignored, as shells do for background jobs.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.requested:
            raise Interrupted(self.requested)

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        # Not print: the signal may arrive in the middle of one.
        text = f"\n{self.requested}: stopping at the next safe point; press Ctrl-C again to stop immediately\n"
        os.write(2, text.encode())
