"""How a run ends early: errors, which are shown as a message without a traceback, and signals."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any


class RunError(Exception):
    """Ends the run. The message says what was wrong, what was expected and what to do."""


class ConfigError(RunError, ValueError):
    """A setting that cannot be used; the message names the key, its value and what was expected."""


class DataError(RunError, ValueError):
    """A data set that cannot be used; the message names the file, the line and what was expected."""


class StorageError(RunError):
    """A file could not be written, for example because the disk is full, or a checkpoint is missing or damaged."""


class TrainingError(RunError):
    """Training cannot go on, for example because a loss is not finite. The last checkpoint is unchanged."""


@contextlib.contextmanager
def naming(problem: str, errors: Any = Exception, made: type[RunError] = ConfigError) -> Iterator[None]:
    """Turns some errors, or all, into one that names the problem. Errors that end a run stay as they are."""
    try:
        yield
    except errors as error:
        if (isinstance(error, RunError) and errors is not ConfigError) or is_lost_contact(error):
            raise
        raise made(f"{problem}: {' '.join(str(error).split()):.400}") from error


def is_lost_contact(error: BaseException) -> bool:
    """Whether it is the error of a collective that another rank did not join."""
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


class Interrupted(KeyboardInterrupt):
    """A stop was requested. It is raised only where the run can continue later."""


class Interrupt:
    """Turns SIGINT and SIGTERM into an `Interrupted` at the next `check`, which code calls where its state is complete.
    A second signal stops the process immediately. Shells start background jobs with SIGINT ignored: it counts too."""

    requested: str | None = None

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
        os.write(2, b"\nstopping at the next safe point; press Ctrl-C again to stop immediately\n")
