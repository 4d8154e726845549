"""The words every reward shares: a sample, a judgement, a reward, and the scores of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .settings import ScoringConfig

# What a problem's answer is, and so how it is compared; "open" has none that rules could check.
KINDS = ("math", "choice", "exact", "code", "open")


@dataclass(frozen=True)
class Sample:
    """One completion to judge.

    Args:
        prompt: the text the model was given. Never searched for answers; only its end matters, because a
            template may already have opened `<think>`.
        completion: the text the model wrote.
        answer: the reference answer; for "code" the tests, for "open" a good response, if there is one.
        kind: one of `KINDS`.
        language: the language the thought should be in, "en" or "zh".
        tokens: length of the completion, where a reward needs it.
        limit: most tokens the completion could have had.
        question: what was asked, without the template around it; for rewards that show it to a judge.
    """

    prompt: str
    completion: str
    answer: str
    kind: str = "math"
    language: str = "en"
    tokens: int | None = None
    limit: int | None = None
    question: str = ""


@dataclass(frozen=True)
class Judgement:
    """What is left to do in a worker process, as `worker` is asked to do it.

    Args:
        judge: "module:function" inside this package. The module is imported in the worker, when it is first
            asked for or, where `Reward.judges` names it, before the worker is ready.
        arguments: strings, numbers, None and tuples of them: they travel as JSON. Equal judgements of a batch
            are made once.
        timeout_s: seconds the judgement may take before its worker is killed and the sample is unscorable;
            None for the scorer's own limit. A judge that has a limit of its own, whose breach is a verdict
            (a program that does not end is wrong), asks for more here.
    """

    judge: str
    arguments: tuple
    timeout_s: float | None = None


Outcome = float | Judgement


@dataclass(frozen=True)
class Reward:
    """How one named reward is computed.

    Args:
        score: the reward itself, from a sample to a number or NaN (unscorable), in the calling process.
        prepare: from the settings to what scores a sample in a `Scorer`: cheap and safe on any text, it returns the
            reward, or the `Judgement` that finds it in a worker process. None for `score` itself.
        judges: the judges that most samples need, loaded when a worker starts.
        requires: modules that must be installed, so that a missing one is reported before the run starts.
        kinds: the kinds of sample it applies to. Elsewhere it is NaN in `Scores.parts` and left out of the total.
        waits: whether `prepare`'s function waits for a network, and is to be called in many threads at once.
    """

    score: Callable[[Sample], float] | None = None
    prepare: Callable[[ScoringConfig], Callable[[Sample], Outcome]] | None = None
    judges: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    waits: bool = False


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch, in the order of its samples.

    Args:
        parts: for each reward, one value a sample; NaN where the sample could not be scored, or where the reward does
            not apply to its kind.
        total: the weighted sum of the rewards that apply, NaN where one of them with a non-zero weight is NaN.
        timeouts: judgements stopped at the time limit (NaN in `parts`).
        crashes: judgements whose worker died or ran out of memory (NaN in `parts`).
        endpoint_failures: rewards that a model endpoint did not give (NaN in `parts`).
        unscorable: for each reward, the samples it applies to and could not score, for whatever reason.
        endpoint_error: what the first of the endpoint failures met, "" where there was none.
    """

    parts: dict[str, list[float]]
    total: list[float]
    timeouts: int = 0
    crashes: int = 0
    endpoint_failures: int = 0
    unscorable: dict[str, int] = field(default_factory=dict)
    endpoint_error: str = ""

    @classmethod
    def joined(cls, batches: "Sequence[Scores]", rows: Sequence[Sequence[int]]) -> "Scores":
        """The scores of several batches of the same rewards, given which samples each holds; all samples are in one."""

        def column(pick: "Callable[[Scores], list[float]]") -> list[float]:
            values = {row: value for batch, some in zip(batches, rows, strict=True)
                      for row, value in zip(some, pick(batch), strict=True)}
            return [values[row] for row in range(len(values))]

        counts = ("timeouts", "crashes", "endpoint_failures")
        return cls(
            {name: column(lambda batch, name=name: batch.parts[name]) for name in batches[0].parts},
            column(lambda batch: batch.total),
            *(sum(getattr(batch, name) for batch in batches) for name in counts),
            unscorable={name: sum(batch.unscorable[name] for batch in batches) for name in batches[0].unscorable},
            endpoint_error=next((batch.endpoint_error for batch in batches if batch.endpoint_error), ""),
        )
