"""Scoring a batch: every reward of every sample, the dangerous ones in worker processes."""

import importlib.util
import math
import threading
from collections.abc import Mapping, Sequence

from .base import Sample, Scores
from .pool import CRASH, TIMEOUT, Pool
from .registry import REWARDS

DEFAULT_MEMORY = 512 * 2**20


class Scorer:
    """Scores samples by a weighted sum of rewards.

    Args:
        parts: the weight of each reward, by name (`REWARDS` lists them). A weight of 0 reports a reward
            without counting it.
        workers: worker processes at most; none starts before a sample needs one.
        timeout_s: wall-clock seconds one judgement may take.
        memory_bytes: address space of one worker.

    Raises:
        ValueError: an unknown reward, a weight that is not finite, no reward at all, a limit that
            is not positive.
        ImportError: a reward needs a package that is not installed.
    """

    def __init__(
        self,
        parts: Mapping[str, float],
        *,
        workers: int = 1,
        timeout_s: float = 5.0,
        memory_bytes: int = DEFAULT_MEMORY,
    ):
        _check_parts(parts)
        for name, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_bytes", memory_bytes)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value!r}")
        self._weights = dict(parts)
        judges = [REWARDS[name].judge for name in parts if REWARDS[name].judge]
        self._pool = Pool(judges, workers=workers, timeout_s=timeout_s, memory_bytes=memory_bytes)
        self._lock = threading.Lock()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Scores every sample.

        A judgement that times out or kills its worker is NaN for that sample alone, and counted.

        Raises:
            WorkerError: no worker could be started.
        """
        parts = {name: [math.nan] * len(samples) for name in self._weights}
        # The members of a group often give the same answer: each distinct judgement is made once.
        asked: dict[tuple, list[tuple[str, int]]] = {}
        for name, column in parts.items():
            reward = REWARDS[name]
            for index, sample in enumerate(samples):
                outcome = (reward.triage or reward.score)(sample)
                if isinstance(outcome, tuple):
                    asked.setdefault((reward.judge, outcome), []).append((name, index))
                else:
                    column[index] = outcome
        with self._lock:
            verdicts = self._pool.run(list(asked))
        counts = {TIMEOUT: 0, CRASH: 0}
        for verdict, places in zip(verdicts, asked.values(), strict=True):
            if verdict in counts:
                counts[verdict] += len(places)
                continue
            for name, index in places:
                parts[name][index] = verdict
        return Scores(parts, self._total(parts, len(samples)), counts[TIMEOUT], counts[CRASH])

    def _total(self, parts: Mapping[str, list[float]], count: int) -> list[float]:
        weighted = [(weight, parts[name]) for name, weight in self._weights.items() if weight]
        return [math.fsum(weight * column[index] for weight, column in weighted) for index in range(count)]

    def close(self) -> None:
        """Ends the workers. Scoring again starts new ones."""
        with self._lock:
            self._pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
