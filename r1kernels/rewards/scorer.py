"""Scores a batch of completions: the weighted sum of rewards.

Text of a model needs no worker process to be judged. Each program, and each set of tests, runs in its own sandbox
process with limits of time and memory; a thread only relays plain data between the two. Mathematics has a bounded cost
by construction. All other functions take time linear in the text.
"""

import contextlib
import dataclasses
import functools
import math
import pkgutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from . import choice, text
from .code import judge as judge_program
from .endpoint import EndpointError
from .judge import Judge
from .math import grade
from .sandbox import check

REWARDS = ("accuracy", "format", "language", "overlong", "judge")
KINDS = ("math", "choice", "exact", "code", "open")
# Each answer gets one of these, by its kind: "open" answers are for the judge. Other rewards apply to all kinds.
JUDGEMENTS = ("accuracy", "judge")


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of a batch, in the order of its completions."""

    parts: dict[str, list[float]]  # the scores of each reward; NaN where it cannot be scored or does not apply
    total: list[float]  # weighted sums of the rewards that apply
    timeouts: int = 0  # judgements that ran out of time in a data set's own tests, or in a request to the judge
    crashes: int = 0  # judgements that failed otherwise: the sandbox did not start
    endpoint_failures: int = 0  # rewards that the language model judge did not give
    unscorable: dict[str, int] = dataclasses.field(default_factory=dict)  # NaN of each reward where it applies
    endpoint_error: str = ""  # the message of the first of the endpoint failures


class _Row(NamedTuple):
    """What a judgement depends on. Equal rows are judged once."""

    kind: str
    prompt: str
    completion: str
    answer: str
    question: str

    def gets(self, reward: str) -> bool:
        """Whether a reward applies to this kind of answer."""
        return reward not in JUDGEMENTS or reward == ("judge" if self.kind == "open" else "accuracy")


class Scorer(contextlib.AbstractContextManager):
    """Scores completions. Equal completions get equal scores in any batch, but for time-outs.

    Args:
        rewards: weight of each reward: accuracy, format, language, overlong, judge, or the import path of a function,
            "module:function". Weight 0 computes a reward without counting it.
        workers: programs that are judged at once.
        timeout_s, memory_mb: what one program may use: seconds, and MiB of address space.
        imports: modules that programs may import in addition to Python's own.
        overlong_buffer: tokens before the limit in which the penalty of `overlong` grows to 1.
        judge: the language model that the reward "judge" asks.
    """

    def __init__(self, rewards: Mapping[str, float], *, workers: int = 1, timeout_s: float = 5.0, memory_mb: int = 512,
                 imports: Sequence[str] | None = None, overlong_buffer: int = 4096, judge: Judge | None = None):
        for name, value in {"workers": workers, "timeout_s": timeout_s, "memory_mb": memory_mb,
                            "overlong_buffer": overlong_buffer}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, expected a positive number")
        finite = all(type(weight) in (int, float) and math.isfinite(weight) for weight in rewards.values())
        if not rewards or not finite or not all(name in REWARDS or ":" in name for name in rewards):
            raise ValueError(f"rewards is {rewards!r}, expected numbers for {', '.join(REWARDS)} or 'module:function'")
        if "judge" in rewards and judge is None:
            raise ValueError("judge is None, expected a Judge: rewards names 'judge'")
        try:  # format, language and overlong are functions of this package, and called like those of the user
            self._functions = {name: pkgutil.resolve_name(name if ":" in name else f"{__package__}:{name}")
                               for name in rewards if name not in JUDGEMENTS}
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"rewards is {rewards!r}, which cannot be imported: {error}") from error
        if "overlong" in rewards:
            self._functions["overlong"] = functools.partial(self._functions["overlong"], buffer=overlong_buffer)
        self._weights, self._judge, self._closing = dict(rewards), judge, threading.Event()
        self._limits = {"timeout_s": timeout_s, "memory_mb": memory_mb, "imports": tuple(imports or ())}
        self._threads = ThreadPoolExecutor(workers)  # the kernel ends a program with the thread that started it

    def score(self, completions: Sequence, **columns: Sequence | None) -> Scores:
        """The scores of B texts or chats.

        `columns` are lists of B values: prompts, question, answer, kind, language, lengths (tokens), limit (tokens),
        and the columns of your own rewards. Raises ValueError for other columns, SandboxError if programs cannot be
        confined, CancelledError if another thread closes the scorer, and exceptions of your own rewards.
        """
        if isinstance(completions, str) or any(isinstance(column, str) for column in columns.values()):
            raise ValueError("completions and columns must be lists with one value per completion, got a string")
        columns = {name: list(column) for name, column in columns.items() if column is not None}
        for name, column in columns.items():
            if len(column) != len(completions):
                raise ValueError(f"{name} has {len(column)} values, expected {len(completions)}, one per completion")
        kinds, blank = columns.get("kind", ["math"] * len(completions)), [""] * len(completions)
        rows = list(map(_Row, kinds, texts(columns.get("prompts", blank)), texts(completions),
                        columns.get("answer", blank), columns.get("question", blank)))
        for row in rows:
            if row.kind not in KINDS or not isinstance(row.answer, str):
                raise ValueError(f"kind is {row.kind!r} and answer is {row.answer!r}, expected one of {KINDS} and a "
                                 "string")
        if "accuracy" in self._weights and "code" in kinds:
            check(self._limits["memory_mb"], self._limits["imports"])  # if it fails, that is an error before any work
        pending: dict[_Row, Future] = {}
        try:
            for row in rows:
                if row not in pending and any(row.gets(name) for name in self._weights.keys() & JUDGEMENTS):
                    pending[row] = self._start(row)
            parts = {name: _call(name, function, list(completions), columns)
                     for name, function in self._functions.items()}
            while wait(pending.values(), timeout=0.1).not_done or self._closing.is_set():
                if self._closing.is_set():
                    raise CancelledError("the scorer was closed")
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            for reply in pending.values():
                reply.cancel()
        return self._sum(rows, parts, {row: reply.exception() or reply.result() for row, reply in pending.items()})

    def close(self, *exception: object) -> None:
        """Kills programs that run. A call of `score` in another thread raises CancelledError."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    __exit__ = close

    def _start(self, row: _Row) -> Future:
        if row.kind == "open":
            return self._judge.start_reward(row.question or row.prompt, row.prompt, row.completion, row.answer)
        return self._threads.submit(self._accuracy, row)

    def _accuracy(self, row: _Row) -> float | None:
        """1.0 if the final answer is right, else 0.0; None if the reference cannot be used."""
        if row.kind == "code":
            return judge_program(row.prompt, row.completion, row.answer, **self._limits, stopped=self._closing)
        if row.kind == "choice":
            expected = choice.letter(row.answer)
            return None if expected is None else float(choice.chosen(row.prompt, row.completion) == expected)
        given = text.final_answer(row.prompt, row.completion) or ""
        if row.kind == "math":
            return grade(given, row.answer)
        expected = text.same_text(row.answer)
        return float(text.same_text(given) == expected) if expected else None

    def _sum(self, rows: list[_Row], parts: dict[str, list[float]], judged: dict[_Row, object]) -> Scores:
        """The scores of rows. A judgement that failed counts for each row that it was made for."""
        outcomes = [judged.get(row) for row in rows]
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        expected = [error for error in failures if isinstance(error, EndpointError | ValueError)]
        messages = [str(error) for error in expected if isinstance(error, EndpointError)]
        for name in self._weights.keys() & JUDGEMENTS:
            parts[name] = [outcome if isinstance(outcome, float) and row.gets(name) else math.nan
                           for row, outcome in zip(rows, outcomes, strict=True)]
        total = [math.fsum(weight * parts[name][index] for name, weight in self._weights.items()
                           if weight and row.gets(name)) for index, row in enumerate(rows)]
        unscorable = {name: sum(math.isnan(values[index]) and row.gets(name) for index, row in enumerate(rows))
                      for name, values in parts.items()}
        return Scores({name: parts[name] for name in self._weights}, total,
                      timeouts=sum(isinstance(error.__context__, TimeoutError) for error in expected),
                      crashes=len(failures) - len(expected), endpoint_failures=len(messages),
                      unscorable=unscorable, endpoint_error="".join(messages[:1]))


def texts(messages: Sequence) -> list[str]:
    """The texts, or the last message of each chat, without its parts that are not text."""
    contents = [message if isinstance(message, str) or not message else message[-1]["content"] for message in messages]
    return [content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())
            for content in contents]


def _call(name: str, function: Callable, completions: list, columns: Mapping[str, list]) -> list[float]:
    """The values of a function of lists; None becomes NaN."""
    values = [math.nan if value is None else float(value) for value in function(completions, **columns)]
    if len(values) != len(completions) or any(map(math.isinf, values)):
        raise ValueError(f"reward {name!r} returned {values!r:.80}, expected {len(completions)} numbers or None")
    return values
