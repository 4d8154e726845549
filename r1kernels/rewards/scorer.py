"""Scoring a batch of completions: the weighted sum of rewards, with dangerous judgements in worker processes."""

from __future__ import annotations

import importlib
import importlib.util
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from . import text
from .judge import Judge, JudgeError
from .language import LANGUAGES, share
from .pool import CRASH, GLANCE_S, TIMEOUT, Pool, Task

KINDS = ("math", "choice", "exact", "code", "open")
# The kinds of answer that a reward applies to; the other rewards apply to every kind.
APPLIES = {"accuracy": ("math", "choice", "exact", "code"), "judge": ("open",)}
REWARDS = ("accuracy", "format", "language", "overlong", "judge")
MATH, CODE = "r1kernels.rewards.math", "r1kernels.rewards.code"


class Row(NamedTuple):
    """One completion and what is known about it."""

    completion: str
    prompt: str = ""
    question: str = ""
    answer: str = ""
    kind: str = "math"
    language: str = "en"
    length: int | None = None
    limit: int | None = None


FIELDS = {"prompts": "prompt", "question": "question", "answer": "answer", "kind": "kind", "language": "language",
          "lengths": "length", "limit": "limit"}


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch, in the order of its completions.

    Args:
        parts: one value per completion for each reward. NaN where it cannot be scored or the reward does not apply.
        total: the weighted sum of the rewards that apply; NaN where one of them, with a weight other than 0, is NaN.
        timeouts: judgements that were killed at their time limit.
        crashes: judgements whose worker died, ran out of memory or raised.
        endpoint_failures: rewards that the language model judge did not give.
        unscorable: for each reward, how many completions it applies to and could not score, for whatever reason.
        endpoint_error: the message of the first of the endpoint failures, "" without one.
    """

    parts: dict[str, list[float]]
    total: list[float]
    timeouts: int = 0
    crashes: int = 0
    endpoint_failures: int = 0
    unscorable: dict[str, int] = field(default_factory=dict)
    endpoint_error: str = ""

    @classmethod
    def joined(cls, batches: Sequence[Scores], rows: Sequence[Sequence[int]]) -> Scores:
        """The scores of several batches of the same rewards; `rows` says which completions each batch holds."""

        def column(values: Callable[[Scores], list[float]]) -> list[float]:
            placed = {row: value for batch, places in zip(batches, rows, strict=True)
                      for row, value in zip(places, values(batch), strict=True)}
            return [placed[row] for row in range(len(placed))]

        return cls(
            parts={name: column(lambda batch, name=name: batch.parts[name]) for name in batches[0].parts},
            total=column(lambda batch: batch.total),
            timeouts=sum(batch.timeouts for batch in batches),
            crashes=sum(batch.crashes for batch in batches),
            endpoint_failures=sum(batch.endpoint_failures for batch in batches),
            unscorable={name: sum(batch.unscorable[name] for batch in batches) for name in batches[0].unscorable},
            endpoint_error=next((batch.endpoint_error for batch in batches if batch.endpoint_error), ""))


class Scorer:
    """Scores completions in a background thread. Equal completions get equal scores in any batch, but for time-outs.

    Args:
        rewards: weight of each reward: accuracy, format, language, overlong, judge, or an import path "module:function".
            Weight 0 computes a reward without counting it.
        workers: worker processes at most. None starts before a completion needs one.
        timeout_s: seconds for judging one answer, and for running one program.
        memory_mb: address space of one worker and memory of one program, in MiB.
        sandbox: where programs run, "bubblewrap" or "none". With "none" they can do whatever the caller can.
        imports: modules that programs may import; None for the default list of `rewards.code`.
        overlong_buffer: tokens before the limit in which the penalty of `overlong` grows to 1.
        judge: the language model that the reward "judge" asks.

    Raises:
        ValueError: an argument has a wrong value. The message names it.
        ImportError: a reward needs a package that is not installed.
    """

    def __init__(self, rewards: Mapping[str, float], *, workers: int = 1, timeout_s: float = 5.0, memory_mb: int = 512,
                 sandbox: str = "bubblewrap", imports: Sequence[str] | None = None, overlong_buffer: int = 4096,
                 judge: Judge | None = None):
        for name, value in {"workers": workers, "timeout_s": timeout_s, "memory_mb": memory_mb,
                            "overlong_buffer": overlong_buffer}.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}, expected a positive number")
        if sandbox not in ("bubblewrap", "none"):
            raise ValueError(f"sandbox is {sandbox!r}, expected 'bubblewrap' or 'none'")
        check_rewards(rewards)
        if "judge" in rewards and judge is None:
            raise ValueError("judge is None, expected a Judge: 'rewards' names 'judge'")
        self._weights, self._judge, self._buffer = dict(rewards), judge, overlong_buffer
        self._functions = {name: load_function(name) for name in rewards if ":" in name}
        self._timeout_s = timeout_s
        self._program = (sandbox, timeout_s, memory_mb, imports and list(imports))
        self._pool = Pool([f"{MATH}:judge"] if "accuracy" in rewards else [], workers=workers, memory_mb=memory_mb)
        self._lock, self._queue, self._closing = threading.Lock(), queue.SimpleQueue(), threading.Event()
        self._thread: threading.Thread | None = None

    def submit(self, completions: Sequence, **columns: Sequence | None) -> Future[Scores]:
        """Scores a batch while the caller does something else. Batches are scored in order.

        Args:
            completions: texts or chats (lists of messages); the last message of a chat is the completion.
            columns: lists with a value per completion: prompts, question, answer, kind, language, lengths (tokens),
                limit (tokens), and what rewards of your own take.

        The future raises WorkerError if no worker can start, and what a reward of your own raises.
        """
        columns = {name: list(column) for name, column in columns.items() if column is not None}
        rows = rows_of(completions, columns)
        future: Future[Scores] = Future()
        with self._lock:
            if self._thread is None:
                self._closing.clear()
                self._thread = threading.Thread(target=self._serve, name="scorer", daemon=True)
                self._thread.start()
            self._queue.put((future, rows, list(completions), columns))
        return future

    def score(self, completions: Sequence, **columns: Sequence | None) -> Scores:
        """The result of `submit`."""
        try:
            return self.submit(completions, **columns).result()
        except KeyboardInterrupt:
            self.close()
            raise

    def close(self) -> None:
        """Cancels batches that are not done and ends the workers. Scoring again starts new ones."""
        with self._lock:
            if self._thread is not None:
                self._closing.set()
                self._queue.put(None)
                self._thread.join()
                self._thread = None
            self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            future, *batch = item
            if self._closing.is_set():
                future.cancel()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._score(*batch))
                except BaseException as error:
                    future.set_exception(error)

    def _score(self, rows: list[Row], completions: list, columns: dict[str, list]) -> Scores:
        parts = {name: [math.nan] * len(rows) for name in self._weights}
        applies = {name: [row.kind in APPLIES.get(name, KINDS) for row in rows] for name in parts}
        # The members of a group often give the same answer. Each distinct judgement is made once.
        asked: dict[Task | Row, list[tuple[str, int]]] = {}
        for name in parts:
            if name in self._functions:
                parts[name] = call(name, self._functions[name], completions, columns)
                continue
            for index, row in enumerate(rows):
                if applies[name][index]:
                    value = self._reward(name, row)
                    if isinstance(value, Task | Row):
                        asked.setdefault(value, []).append((name, index))
                    else:
                        parts[name][index] = value
        counts, errors = Counter[str](), []
        for question, verdict in self._verdicts(asked).items():
            if isinstance(verdict, JudgeError):
                errors.append(str(verdict))
                verdict = "endpoint"
            for name, index in asked[question]:
                if isinstance(verdict, str):
                    counts[verdict] += 1
                else:
                    parts[name][index] = verdict
        total = [math.fsum(weight * parts[name][index] for name, weight in self._weights.items()
                           if weight and applies[name][index]) for index in range(len(rows))]
        unscorable = {name: sum(here and math.isnan(value) for here, value in zip(applies[name], parts[name], strict=True))
                      for name in parts}
        return Scores(parts, total, counts[TIMEOUT], counts[CRASH], counts["endpoint"], unscorable, "".join(errors[:1]))

    def _reward(self, name: str, row: Row) -> float | Task | Row:
        """The reward, or what must be asked for it: of a worker (Task) or of the language model judge (the row)."""
        if name == "accuracy":
            return self._accuracy(row)
        return row if name == "judge" else plain_reward(name, row, self._buffer)

    def _accuracy(self, row: Row) -> float | Task:
        if row.kind == "choice":
            from . import choice

            reference = choice.letter(row.answer)
            return math.nan if reference is None else float(choice.chosen(row.prompt, row.completion) == reference)
        if row.kind == "exact":
            answer = text.final_answer(row.prompt, row.completion)
            reference = text.same_text(row.answer)
            return float(answer is not None and text.same_text(answer) == reference) if reference else math.nan
        if row.kind == "code":
            programs = importlib.import_module(CODE)
            settled = programs.settle(row.prompt, row.completion, row.answer)
            if isinstance(settled, tuple):
                return Task(f"{CODE}:judge", (*settled, *self._program), 60.0)
        else:
            answer = text.final_answer(row.prompt, row.completion) or ""
            settled = importlib.import_module(MATH).settle(answer, row.answer)
            if not isinstance(settled, float | None):
                return Task(f"{MATH}:judge", (answer, row.answer), self._timeout_s)
        return math.nan if settled is None else settled

    def _verdicts(self, asked: Mapping) -> dict:
        """The verdict of each question: a number, TIMEOUT, CRASH or a JudgeError."""
        tasks = [question for question in asked if isinstance(question, Task)]
        replies = {row: self._judge.start_reward(row.question or row.prompt, row.prompt, row.completion, row.answer)
                   for row in asked if isinstance(row, Row)}
        try:
            verdicts = dict(zip(tasks, self._pool.run(tasks, self._closing), strict=True))
            for row, reply in replies.items():
                verdicts[row] = self._result(reply)
        finally:
            for reply in replies.values():
                reply.cancel()
        return verdicts

    def _result(self, reply: Future[float]) -> float | JudgeError:
        while not reply.done():
            if self._closing.is_set():
                raise CancelledError("the scorer was closed")
            wait([reply], GLANCE_S)
        error = reply.exception()
        if error is not None and not isinstance(error, JudgeError):
            raise error
        return error or reply.result()


def check_rewards(rewards: Mapping[str, float]) -> None:
    """Raises ValueError or ImportError where the names and weights of rewards are wrong."""
    if not rewards:
        raise ValueError(f"rewards is empty, expected weights of {', '.join(REWARDS)}, or of 'module:function'")
    for name, weight in rewards.items():
        if name not in REWARDS and ":" not in name:
            raise ValueError(f"rewards names {name!r}, expected {', '.join(REWARDS)}, or 'module:function'")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"rewards[{name!r}] is {weight!r}, expected a finite number")
    if "accuracy" in rewards and importlib.util.find_spec("math_verify") is None:
        raise ImportError("reward 'accuracy' needs the package math-verify: `pip install 'r1kernels[train]'`")


def rows_of(completions: Sequence, columns: Mapping[str, Sequence]) -> list[Row]:
    """The rows of a batch. Raises ValueError where a column has a wrong length or value."""
    for name, column in columns.items():
        if len(column) != len(completions):
            raise ValueError(f"{name} has {len(column)} values, expected {len(completions)}, one per completion")
    known = {FIELDS[name]: column for name, column in columns.items() if name in FIELDS}
    rows = []
    for index, completion in enumerate(completions):
        row = Row(text_of(completion), **{
            name: text_of(column[index]) if name == "prompt" else column[index]
            for name, column in known.items() if column[index] is not None})
        for name, values in (("kind", KINDS), ("language", LANGUAGES)):
            if getattr(row, name) not in values:
                raise ValueError(f"{name} is {getattr(row, name)!r}, expected one of {', '.join(values)}")
        if not isinstance(row.answer, str):
            raise ValueError(f"answer is {row.answer!r}, expected a string")
        rows.append(row)
    return rows


def text_of(message: str | Sequence[Mapping]) -> str:
    """The text itself, or that of the last message of a chat (parts that are not text are left out)."""
    if isinstance(message, str):
        return message
    content = message[-1]["content"] if message else ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())


def plain_reward(name: str, row: Row, buffer: int) -> float:
    """The reward format, language or overlong, which need no worker."""
    if name == "format":
        return float(text.is_well_formed(row.prompt, row.completion))
    if name == "language":
        return share(row.completion, row.language)
    if row.length is None or row.limit is None:
        raise ValueError(f"reward 'overlong' got length {row.length} and limit {row.limit}, expected two numbers")
    return -min(max((row.length - (row.limit - buffer)) / buffer, 0.0), 1.0)


def load_function(path: str) -> Callable:
    """The function of an import path "module:function"."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"rewards names {path!r}, which cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"rewards names {path!r}, which is {type(function).__name__}, expected a function")
    return function


def call(name: str, function: Callable, completions: list, columns: Mapping[str, list]) -> list[float]:
    """The values of a reward of the user's own; NaN where it gives None."""
    values = function(completions, **columns)
    if len(values) != len(completions):
        raise ValueError(f"reward {name!r} returned {len(values)} values, expected {len(completions)}")
    values = [math.nan if value is None else float(value) for value in values]
    if any(map(math.isinf, values)):
        raise ValueError(f"reward {name!r} returned an infinite value, expected numbers or None")
    return values
