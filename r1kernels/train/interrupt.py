"""Stopping where the run can continue later."""

from __future__ import annotations

import os
import signal
from typing import Any

from r1kernels.train.errors import Interrupted


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
