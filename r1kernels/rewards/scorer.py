"""Scoring a batch of completions: the weighted sum of rewards, with dangerous judgements in worker processes."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import NamedTuple

from . import choice, sandbox, text
from .code import settle as settle_program
from .endpoint import EndpointError
from .judge import Judge
from .language import LANGUAGES, share
from .math import NEEDS_JUDGE
from .math import settle as settle_math
from .pool import CRASH, GLANCE_S, TIMEOUT, Pool, Task

REWARDS = ("accuracy", "format", "language", "overlong", "judge")
KINDS = ("math", "choice", "exact", "code", "open")
# The kinds of answer that a reward applies to. The other rewards apply to every kind.
APPLIES = {"accuracy": ("math", "choice", "exact", "code"), "judge": ("open",)}
MATH, PROGRAM, ENDPOINT = "r1kernels.rewards.math:judge", "r1kernels.rewards.code:judge", "endpoint"
# Judgements that load what later ones need.
WARM_UP = [(MATH, (r"\sqrt{12}", r"2\sqrt{3}")), (MATH, ("x^2 - x", "x(x - 1)")), (MATH, (r"\frac{\pi}{2}", r"\pi/2"))]


class Row(NamedTuple):
    """One completion and what is known about it. `COLUMNS` names the columns of a batch that hold it."""

    completion: str
    prompt: str = ""
    question: str = ""
    answer: str = ""
    kind: str = "math"
    language: str = "en"
    length: int | None = None
    limit: int | None = None


COLUMNS = {"prompts": "prompt", "lengths": "length"} | {name: name for name in
                                                       ("question", "answer", "kind", "language", "limit")}


@dataclasses.dataclass(frozen=True)
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
    unscorable: dict[str, int] = dataclasses.field(default_factory=dict)
    endpoint_error: str = ""

    @classmethod
    def joined(cls, batches: Sequence[Scores], rows: Sequence[Sequence[int]]) -> Scores:
        """The scores of several batches of the same rewards; `rows` says which completions each batch holds."""
        places = [place for some in rows for place in some]

        def column(values: Callable[[Scores], list[float]]) -> list[float]:
            found = [value for batch in batches for value in values(batch)]
            return [value for _, value in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]

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
        rewards: weight of each reward: accuracy, format, language, overlong, judge, or the import path of a function,
            "module:function". Weight 0 computes a reward without counting it.
        workers: worker processes at most. None starts before a completion needs one.
        timeout_s: seconds for judging one answer, and for running one program.
        memory_mb: address space of one worker and of one program, in MiB.
        sandbox: where programs run, "bubblewrap" or "none". With "none" they can do whatever the caller can.
        imports: modules that programs may import; None for the default of `rewards.sandbox`.
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
        if not rewards:
            raise ValueError(f"rewards is empty, expected weights of {', '.join(REWARDS)} or 'module:function'")
        for name, weight in rewards.items():
            if name not in REWARDS and ":" not in name:
                raise ValueError(f"rewards names {name!r}, expected {', '.join(REWARDS)} or 'module:function'")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"rewards[{name!r}] is {weight!r}, expected a finite number")
        if "accuracy" in rewards and importlib.util.find_spec("latex2sympy2_extended") is None:
            raise ImportError("reward 'accuracy' needs the package math-verify: pip install 'r1kernels[train]'")
        if "judge" in rewards and judge is None:
            raise ValueError("judge is None, expected a Judge: rewards names 'judge'")
        self._weights, self._judge, self._buffer, self._timeout_s = dict(rewards), judge, overlong_buffer, timeout_s
        self._functions = {name: _load(name) for name in rewards if ":" in name}
        self._program = (sandbox, timeout_s, memory_mb, tuple(imports or ()))
        self._pool = Pool(WARM_UP, workers=workers, memory_mb=memory_mb)
        self._lock, self._queue, self._closing = threading.Lock(), queue.SimpleQueue(), threading.Event()
        self._thread: threading.Thread | None = None

    def submit(self, completions: Sequence, **columns: Sequence | None) -> Future[Scores]:
        """Scores a batch while the caller does something else. Batches are scored in order.

        Args:
            completions: B texts or chats. A chat is a list of messages; its last message is the completion.
            columns: lists of B values: prompts, question, answer, kind, language, lengths (tokens), limit (tokens), and
                what rewards of your own take.

        The future raises WorkerError if no worker can start, SandboxError if programs cannot be confined, and what a
        reward of your own raises.
        """
        columns = {name: list(column) for name, column in columns.items() if column is not None}
        rows, future = rows_of(completions, columns), Future()
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
        applies = {name: [row.kind in APPLIES.get(name, KINDS) for row in rows] for name in self._weights}
        parts = {name: [math.nan] * len(rows) for name in self._weights}
        # The members of a group often give the same answer. Each distinct judgement is made once.
        asked: dict[Task | Row, list[tuple[str, int]]] = {}
        for name in parts:
            if name in self._functions:
                parts[name] = _call(name, self._functions[name], completions, columns)
                continue
            for index, row in enumerate(rows):
                value = self._reward(name, row) if applies[name][index] else math.nan
                if isinstance(value, Task | Row):
                    asked.setdefault(value, []).append((name, index))
                else:
                    parts[name][index] = value
        counts, errors = Counter(), []
        for question, verdict in self._verdicts(list(asked)).items():
            if isinstance(verdict, EndpointError):
                errors.append(str(verdict))
                verdict = ENDPOINT
            for name, index in asked[question]:
                if isinstance(verdict, str):
                    counts[verdict] += 1
                else:
                    parts[name][index] = verdict
        total = [math.fsum(weight * parts[name][index] for name, weight in self._weights.items()
                           if weight and applies[name][index]) for index in range(len(rows))]
        unscorable = {name: sum(here and math.isnan(value) for here, value in zip(applies[name], values, strict=True))
                      for name, values in parts.items()}
        return Scores(parts, total, counts[TIMEOUT], counts[CRASH], counts[ENDPOINT], unscorable, "".join(errors[:1]))

    def _reward(self, name: str, row: Row) -> float | Task | Row:
        """The reward, or what must be asked for it: of a worker (Task) or of the language model judge (the row)."""
        if name != "accuracy":
            return row if name == "judge" else plain_reward(name, row, self._buffer)
        if row.kind == "choice":
            expected, given = choice.letter(row.answer), choice.chosen(row.prompt, row.completion)
        elif row.kind == "exact":
            expected = text.same_text(row.answer) or None
            given = text.same_text(text.final_answer(row.prompt, row.completion) or "")
        elif row.kind == "math":
            answer = text.final_answer(row.prompt, row.completion) or ""
            value = settle_math(answer, row.answer)
            if value is NEEDS_JUDGE:
                return Task(MATH, (answer, row.answer), self._timeout_s)
            return math.nan if value is None else value
        else:
            value = settle_program(row.prompt, row.completion, row.answer)
            if isinstance(value, tuple):
                kind, _, memory_mb, imports = self._program
                sandbox.check(memory_mb, kind, imports)  # a refusal here is an error, in a worker it would be a crash
                return Task(PROGRAM, (*value, *self._program), 2000 * self._timeout_s)
            return math.nan if value is None else value
        return math.nan if expected is None else float(given == expected)

    def _verdicts(self, questions: list[Task | Row]) -> dict[Task | Row, float | str | EndpointError]:
        tasks = [question for question in questions if isinstance(question, Task)]
        replies = {row: self._judge.start_reward(row.question or row.prompt, row.prompt, row.completion, row.answer)
                   for row in questions if isinstance(row, Row)}
        try:
            verdicts = dict(zip(tasks, self._pool.run(tasks, self._closing), strict=True))
            for row, reply in replies.items():
                while not reply.done():
                    if self._closing.is_set():
                        raise CancelledError("the scorer was closed")
                    wait([reply], GLANCE_S)
                try:
                    verdicts[row] = reply.result()
                except EndpointError as error:
                    verdicts[row] = error
        finally:
            for reply in replies.values():
                reply.cancel()
        return verdicts


def plain_reward(name: str, row: Row, buffer: int) -> float:
    """The reward format, language or overlong, which need no worker."""
    if name == "format":
        return float(text.is_well_formed(row.prompt, row.completion))
    if name == "language":
        return share(row.completion, row.language)
    if row.length is None or row.limit is None:
        raise ValueError(f"reward 'overlong' got length {row.length} and limit {row.limit}, expected two numbers")
    return -min(max((row.length - (row.limit - buffer)) / buffer, 0.0), 1.0)


def rows_of(completions: Sequence, columns: Mapping[str, Sequence]) -> list[Row]:
    """The rows of a batch. Raises ValueError where a column has a wrong length or value."""
    for name, column in columns.items():
        if len(column) != len(completions):
            raise ValueError(f"{name} has {len(column)} values, expected {len(completions)}, one per completion")
    known = {COLUMNS[name]: column for name, column in columns.items() if name in COLUMNS}
    rows = []
    for index, completion in enumerate(completions):
        values = {name: column[index] for name, column in known.items() if column[index] is not None}
        row = Row(_text(completion), **values | {"prompt": _text(values.get("prompt", ""))})
        for name, allowed in (("kind", KINDS), ("language", LANGUAGES)):
            if getattr(row, name) not in allowed:
                raise ValueError(f"{name} is {getattr(row, name)!r}, expected one of {', '.join(allowed)}")
        if not isinstance(row.answer, str):
            raise ValueError(f"answer is {row.answer!r}, expected a string")
        rows.append(row)
    return rows


def _text(message: str | Sequence[Mapping]) -> str:
    """The text itself, or that of the last message of a chat. Parts of it that are no text are left out."""
    if isinstance(message, str):
        return message
    content = message[-1]["content"] if message else ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())


def _load(path: str) -> Callable:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"rewards names {path!r}, which cannot be imported: {error}") from error


def _call(name: str, function: Callable, completions: list, columns: Mapping[str, list]) -> list[float]:
    """The values of a reward of the user's own; NaN where it gives None."""
    values = [math.nan if value is None else float(value) for value in function(completions, **columns)]
    if len(values) != len(completions) or any(map(math.isinf, values)):
        raise ValueError(f"reward {name!r} returned {values!r:.80}, expected {len(completions)} numbers or None")
    return values
