"""Scoring a batch: every reward of every sample, the dangerous ones in worker processes."""

import functools
import importlib.util
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future

from .base import Judgement, Outcome, Sample, Scores
from .calls import Calls
from .endpoint import EndpointError
from .pool import CRASH, TIMEOUT, Pool, Stopped
from .registry import REWARDS
from .settings import ScoringConfig

ENDPOINT = "endpoint"

# A reward of a sample.
Cell = tuple[str, int]


class Scorer:
    """Scores samples by a weighted sum of rewards, in a thread of its own.

    The same samples get the same scores, in whatever batches and at whatever time they come: but for time-outs, and
    for what a model endpoint answers.

    Args:
        parts: the weight of each reward, by name (`REWARDS` lists them). A weight of 0 reports a reward
            without counting it.
        settings: limits, and what single rewards need.

    Raises:
        ValueError: an unknown reward, a weight that is not finite, no reward at all, a setting that a reward needs.
        ImportError: a reward needs a package that is not installed.
    """

    def __init__(self, parts: Mapping[str, float], settings: ScoringConfig = ScoringConfig()):  # noqa: B008
        _check_parts(parts)
        self._weights = dict(parts)
        self._score: dict[str, Callable[[Sample], Outcome]] = {
            name: REWARDS[name].prepare(settings) if REWARDS[name].prepare else REWARDS[name].score for name in parts
        }
        self._threads = settings.judge.concurrency if settings.judge else 1
        judges = dict.fromkeys(judge for name in parts for judge in REWARDS[name].judges)
        self._pool = Pool(
            list(judges),
            workers=settings.workers,
            timeout_s=settings.timeout_s,
            memory_bytes=settings.memory_mb * 2**20,
        )
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def submit(self, samples: Sequence[Sample]) -> "Future[Scores]":
        """Has every sample scored while the caller does something else; batches are taken in order.

        A reward that cannot be found, because its judgement times out, kills its worker, or its endpoint does not
        answer, is NaN for that sample alone, and counted.

        The future raises WorkerError where no worker could be started, and what a reward itself raised.
        """
        future: Future[Scores] = Future()
        with self._lock:
            if self._thread is None:
                self._closing.clear()
                self._thread = threading.Thread(target=self._serve, name="scorer", daemon=True)
                self._thread.start()
            self._queue.put((list(samples), future))
        return future

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The scores of `submit`, waited for."""
        try:
            return self.submit(samples).result()
        except KeyboardInterrupt:
            self.close()
            raise

    def close(self) -> None:
        """Cancels what is under way and ends the workers. Scoring again starts new ones."""
        with self._lock:
            if self._thread is not None:
                self._closing.set()
                self._pool.stop()
                self._queue.put(None)
                self._thread.join()
                self._thread = None
            self._pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            samples, future = item
            if self._closing.is_set():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._score_all(samples))
            except Stopped:
                future.set_exception(CancelledError("the scorer was closed"))
            except BaseException as error:
                future.set_exception(error)

    def _score_all(self, samples: Sequence[Sample]) -> Scores:
        parts = {name: [math.nan] * len(samples) for name in self._weights}
        applies = {name: [sample.kind in REWARDS[name].kinds for sample in samples] for name in parts}
        # The members of a group often give the same answer: each distinct judgement is made once.
        asked: dict[Judgement, list[Cell]] = {}
        called: dict[tuple[str, Sample], list[Cell]] = {}
        for name, column in parts.items():
            for index, sample in enumerate(samples):
                if not applies[name][index]:
                    continue
                if REWARDS[name].waits:
                    called.setdefault((name, sample), []).append((name, index))
                    continue
                outcome = self._score[name](sample)
                if isinstance(outcome, Judgement):
                    asked.setdefault(outcome, []).append((name, index))
                else:
                    column[index] = outcome
        jobs = [functools.partial(self._score[name], sample) for name, sample in called]
        with Calls(jobs, self._threads, self._closing) as calls:
            verdicts = [*self._pool.run(list(asked)), *calls.results()]
        counts: Counter[str] = Counter()
        endpoint_error = ""
        for verdict, cells in zip(verdicts, [*asked.values(), *called.values()], strict=True):
            if isinstance(verdict, EndpointError):
                endpoint_error = endpoint_error or str(verdict)
                verdict = ENDPOINT
            if isinstance(verdict, str):
                counts[verdict] += len(cells)
                continue
            for name, index in cells:
                parts[name][index] = verdict
        total = [
            math.fsum(w * parts[name][index] for name, w in self._weights.items() if w and applies[name][index])
            for index in range(len(samples))
        ]
        unscorable = {
            name: sum(here and math.isnan(value) for here, value in zip(applies[name], column, strict=True))
            for name, column in parts.items()
        }
        return Scores(parts, total, counts[TIMEOUT], counts[CRASH], counts[ENDPOINT], unscorable, endpoint_error)


def _check_parts(parts: Mapping[str, float]) -> None:
    known = ", ".join(sorted(REWARDS))
    if not parts:
        raise ValueError(f"rewards must name at least one of: {known}")
    for name, weight in parts.items():
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}; known rewards: {known}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}")
        for module in REWARDS[name].requires:
            if importlib.util.find_spec(module) is None:
                raise ImportError(f"reward {name!r} needs the package {module!r}: `pip install 'r1kernels[train]'`")
