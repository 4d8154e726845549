"""Scores a batch of completions: the weighted sum of rewards.

Text of a model needs no worker process to be judged. Each program, and each set of tests, runs in its own sandbox
process with limits of time and memory; a thread only relays plain data between the two. Mathematics has a bounded cost
by construction. All other functions take time linear in the text.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pkgutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from . import choice, text
from .code import judge as judge_program
from .math import grade
from .sandbox import check

REWARDS = ("accuracy", "format", "language", "overlong")
KINDS = ("math", "choice", "exact", "code", "open")
Completion = str | Sequence[Mapping[str, Any]]  # a text or a chat


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of a batch, in the order of its completions."""

    parts: dict[str, list[float]]  # the scores of each reward; NaN where it cannot be scored or does not apply
    total: list[float]  # weighted sums of the rewards that apply
    timeouts: int = 0  # programs whose data set's own tests ran out of time
    crashes: int = 0  # programs whose sandbox did not start
    unscorable: dict[str, int] = dataclasses.field(default_factory=dict)  # NaN of each reward where it applies


class Scorer(contextlib.AbstractContextManager["Scorer"]):
    """Scores completions. Equal completions get equal scores in any batch, but for time-outs.

    Args:
        rewards: weight of each reward: accuracy, format, language, overlong, or the import path of a function,
            "module:function". Weight 0 computes a reward without counting it. Accuracy does not apply to kind "open".
        workers: programs that are judged at once.
        timeout_s, memory_mb: what one program may use: seconds, and MiB of address space.
        imports: modules that programs may import in addition to Python's own.
        overlong_buffer: tokens before the limit in which the penalty of `overlong` grows to 1.
    """

    def __init__(self, rewards: Mapping[str, float], *, workers: int = 1, timeout_s: float = 5.0, memory_mb: int = 512,
                 imports: Sequence[str] | None = None, overlong_buffer: int = 4096):
        for name, value in {"workers": workers, "timeout_s": timeout_s, "memory_mb": memory_mb,
                            "overlong_buffer": overlong_buffer}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, expected a positive number")
        finite = all(type(weight) in (int, float) and math.isfinite(weight) for weight in rewards.values())
        if not rewards or not finite or not all(name in REWARDS or ":" in name for name in rewards):
            raise ValueError(f"rewards is {rewards!r}, expected numbers for {', '.join(REWARDS)} or 'module:function'")
        try:  # format, language and overlong are functions of this package, and called like those of the user
            self._functions = {name: pkgutil.resolve_name(name if ":" in name else f"{__package__}:{name}")
                               for name in rewards if name != "accuracy"}
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"rewards is {rewards!r}, which cannot be imported: {error}") from error
        for name, function in self._functions.items():
            if not callable(function):
                raise ValueError(f"rewards names {name!r}, which is {function!r:.60}, expected a function")
        if "overlong" in rewards:
            self._functions["overlong"] = functools.partial(self._functions["overlong"], buffer=overlong_buffer)
        self._weights, self._closing = dict(rewards), threading.Event()
        self._limits = {"timeout_s": timeout_s, "memory_mb": memory_mb, "imports": tuple(imports or ())}
        self._threads = ThreadPoolExecutor(workers)  # the kernel ends a program with the thread that started it

    def score(self, completions: Sequence[Completion], **columns: Sequence[Any] | None) -> Scores:
        """The scores of B texts or chats.

        `columns` are lists of B values: prompts, question, answer, kind, language, lengths (tokens), limit (tokens),
        and the columns of your own rewards. Raises ValueError for other columns, SandboxError if programs cannot be
        confined, CancelledError if another thread closes the scorer, and exceptions of your own rewards.
        """
        if isinstance(completions, str) or any(isinstance(column, str) for column in columns.values()):
            raise ValueError("completions and columns must be lists with one value per completion, got a string")
        given = {name: list(column) for name, column in columns.items() if column is not None}
        for name, column in given.items():
            if len(column) != len(completions):
                raise ValueError(f"{name} has {len(column)} values, expected {len(completions)}, one per completion")
        kinds, blank = given.get("kind", ["math"] * len(completions)), [""] * len(completions)
        answers = given.get("answer", blank)
        for kind, answer in zip(kinds, answers, strict=True):
            if kind not in KINDS or not isinstance(answer, str):
                raise ValueError(f"kind is {kind!r} and answer is {answer!r}, expected one of {KINDS} and a string")
        rows = list(zip(kinds, texts(given.get("prompts", blank)), texts(completions), answers, strict=True))
        if "accuracy" in self._weights and "code" in kinds:
            check(self._limits["memory_mb"], self._limits["imports"])  # if it fails, that is an error before any work
        pending: dict[tuple, Future] = {}  # equal rows are judged once
        try:
            for row in rows:
                if "accuracy" in self._weights and row not in pending and row[0] != "open":
                    pending[row] = self._threads.submit(self._accuracy, *row)
            parts = {name: _call(name, function, list(completions), given)
                     for name, function in self._functions.items()}
            results = {row: reply.exception() or reply.result() for row, reply in pending.items()}
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            for reply in pending.values():
                reply.cancel()
        if self._closing.is_set():
            raise CancelledError("the scorer was closed")
        return self._sum(kinds, parts, [results.get(row) for row in rows])

    def close(self) -> None:
        """Kills programs that run. A call of `score` in another thread raises CancelledError."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _accuracy(self, kind: str, prompt: str, completion: str, answer: str) -> float | None:
        """1.0 if the final answer is right, else 0.0; None if the reference cannot be used."""
        if kind == "code":
            return judge_program(prompt, completion, answer, **self._limits, stopped=self._closing)
        given = text.final_answer(prompt, completion) or ""
        if kind == "math":
            return grade(given, answer)
        read = choice.letter if kind == "choice" else text.same_text
        expected = read(answer)
        return float(read(given) == expected) if expected else None

    def _sum(self, kinds: list[str], parts: dict[str, list[float]], outcomes: list[object]) -> Scores:
        """The scores of a batch. An outcome is an accuracy, None, or the exception of a judgement that failed."""
        if "accuracy" in self._weights:
            parts["accuracy"] = [outcome if isinstance(outcome, float) else math.nan for outcome in outcomes]
        parts = {name: parts[name] for name in self._weights}
        applies = {name: [name != "accuracy" or kind != "open" for kind in kinds] for name in parts}
        total = [math.fsum(weight * parts[name][index] for name, weight in self._weights.items()
                           if weight and applies[name][index]) for index in range(len(kinds))]
        unscorable = {name: sum(map(math.isnan, itertools.compress(parts[name], applies[name]))) for name in parts}
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        unusable = [error for error in failures if isinstance(error, ValueError)]  # tests that cannot be run
        timeouts = sum(isinstance(error.__context__, TimeoutError) for error in unusable)
        return Scores(parts, total, timeouts, len(failures) - len(unusable), unscorable)


def texts(messages: Sequence[Completion]) -> list[str]:
    """The texts, or the last message of each chat, without its parts that are not text."""
    if isinstance(messages, str):
        raise ValueError(f"completions or prompts is {messages!r:.60}, expected a list of texts or chats")
    try:
        contents = [one if isinstance(one, str) or not one else one[-1]["content"] for one in messages]
    except (TypeError, KeyError) as error:
        raise ValueError(f"completions or prompts is {messages!r:.60}, expected a list of texts or chats") from error
    return [content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())
            for content in contents]


def _call(name: str, function: Callable, completions: list, columns: Mapping[str, list]) -> list[float]:
    """The values of a function of lists; None becomes NaN."""
    values = [math.nan if value is None else float(value) for value in function(completions, **columns)]
    if len(values) != len(completions) or any(map(math.isinf, values)):
        raise ValueError(f"reward {name!r} returned {values!r:.80}, expected {len(completions)} numbers or None")
    return values
