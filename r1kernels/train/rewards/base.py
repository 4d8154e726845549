"""The words every reward shares: a sample, a reward, and the scores of a batch."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One completion to judge.

    Args:
        prompt: the text the model was given. Never searched for answers; only its end matters, because a
            template may already have opened `<think>`.
        completion: the text the model wrote.
        answer: the reference answer.
    """

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True)
class Reward:
    """How one named reward is computed.

    Args:
        score: the reward itself, from a sample to 1.0, 0.0 or NaN (unscorable), in the calling process.
        triage: for rewards that must not run in the trainer: settles a sample cheaply and safely, or returns
            the arguments (strings and numbers) of the judge. None when `score` is itself cheap and safe.
        judge: "module:function" inside this package, called in a worker process with what `triage` returned.
        requires: modules that must be installed, so that a missing one is reported before the run starts.
    """

    score: Callable[[Sample], float]
    triage: Callable[[Sample], float | tuple] | None = None
    judge: str | None = None
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch, in the order of its samples.

    Args:
        parts: for each reward, one value a sample; NaN where the sample could not be scored.
        total: the weighted sum, NaN where any part with a non-zero weight is NaN.
        timeouts: judgements stopped at the time limit (NaN in `parts`).
        crashes: judgements whose worker died or ran out of memory (NaN in `parts`).
    """

    parts: dict[str, list[float]]
    total: list[float]
    timeouts: int = 0
    crashes: int = 0
