"""Calls that wait for a network, many at once, and given up at once when nobody waits for them any more."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from .endpoint import EndpointError
from .pool import GLANCE_S, Stopped


class Calls:
    """Makes every call in one of a few threads, from `with` on. At the end of the block no further one begins.

    Threads that still wait for an answer then are left to themselves, and do not keep the process alive.
    """

    def __init__(self, jobs: Sequence[Callable[[], float]], threads: int, closing: threading.Event):
        self._jobs, self._closing, self._left = jobs, closing, deque(range(len(jobs)))
        self._results: list[float | BaseException | None] = [None] * len(jobs)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(threads, len(jobs)))]

    def results(self) -> list[float | EndpointError]:
        """The results in the order of the jobs; of what they raised, an EndpointError is a result too.

        Raises:
            Stopped: `closing` was set.
        """
        for thread in self._threads:
            while thread.is_alive():
                if self._closing.is_set():
                    raise Stopped
                thread.join(GLANCE_S)
        for result in self._results:
            if isinstance(result, BaseException) and not isinstance(result, EndpointError):
                raise result
        return self._results

    def _work(self) -> None:
        while True:
            try:
                index = self._left.popleft()
            except IndexError:
                return
            try:
                self._results[index] = self._jobs[index]()
            except BaseException as error:
                self._results[index] = error

    def __enter__(self) -> "Calls":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.clear()
