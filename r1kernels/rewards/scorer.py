"""Scores a batch of completions: the weighted sum of rewards, computed while the caller does something else.

Text of a model needs no worker process to be judged. Each program, and each set of tests, runs in its own sandbox
process with limits of time and memory; a thread only relays plain data between the two. Mathematics has a bounded cost
by construction. All other functions take time linear in the text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import pkgutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

from . import choice, text
from .code import judge as judge_program
from .code import settle as settle_program
from .endpoint import EndpointError
from .judge import Judge
from .math import grade
from .sandbox import check

REWARDS = ("accuracy", "format", "language", "overlong", "judge")
KINDS = ("math", "choice", "exact", "code", "open")
APPLIES = {"accuracy": KINDS[:4], "judge": ("open",)}  # the kinds of answer; other rewards apply to all


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

    @classmethod
    def joined(cls, batches: Sequence[Scores], rows: Sequence[Sequence[int]]) -> Scores:
        """The scores of several batches of the same rewards; `rows` says which completions each batch holds."""

        def column(parts: Iterable[list[float]]) -> list[float]:
            return [value for _, value in sorted(zip(itertools.chain(*rows), itertools.chain(*parts), strict=True))]

        return cls({name: column(batch.parts[name] for batch in batches) for name in batches[0].parts},
                   column(batch.total for batch in batches),
                   *(sum(getattr(batch, count) for batch in batches)
                     for count in ("timeouts", "crashes", "endpoint_failures")),
                   {name: sum(batch.unscorable[name] for batch in batches) for name in batches[0].unscorable},
                   next((batch.endpoint_error for batch in batches if batch.endpoint_error), ""))


class Scorer(contextlib.AbstractContextManager):
    """Scores completions in the background. Equal completions get equal scores in any batch, but for time-outs.

    Args:
        rewards: weight of each reward: accuracy, format, language, overlong, judge, or the import path of a function,
            "module:function". Weight 0 computes a reward without counting it.
        workers: programs that are judged at once.
        timeout_s, memory_mb: what one program may use: seconds, and MiB of address space.
        sandbox: where programs run, "bubblewrap" or "none". With "none" they can do whatever the caller can.
        imports: modules that programs may import in addition to Python's own.
        overlong_buffer: tokens before the limit in which the penalty of `overlong` grows to 1.
        judge: the language model that the reward "judge" asks.
    """

    def __init__(self, rewards: Mapping[str, float], *, workers: int = 1, timeout_s: float = 5.0, memory_mb: int = 512,
                 sandbox: str = "bubblewrap", imports: Sequence[str] | None = None, overlong_buffer: int = 4096,
                 judge: Judge | None = None):
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
                               for name in rewards if name not in APPLIES}
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"rewards is {rewards!r}, which cannot be imported: {error}") from error
        if "overlong" in rewards:
            self._functions["overlong"] = functools.partial(self._functions["overlong"], buffer=overlong_buffer)
        self._weights, self._judge, self._closing = dict(rewards), judge, threading.Event()
        self._program = (sandbox, timeout_s, memory_mb, tuple(imports or ()))
        self._batches, self._judgements = ThreadPoolExecutor(1), ThreadPoolExecutor(workers)

    def submit(self, completions: Sequence, **columns: Sequence | None) -> Future[Scores]:
        """Scores B texts or chats in the background. Batches are scored in order.

        `columns` are lists of B values: prompts, question, answer, kind, language, lengths (tokens), limit (tokens),
        and the columns of your own rewards. The future raises SandboxError and exceptions of your own rewards.
        """
        if isinstance(completions, str) or any(isinstance(column, str) for column in columns.values()):
            raise ValueError("completions and columns must be lists with one value per completion, got a string")
        columns = {name: list(column) for name, column in columns.items() if column is not None}
        for name, column in columns.items():
            if len(column) != len(completions):
                raise ValueError(f"{name} has {len(column)} values, expected {len(completions)}, one per completion")
        kinds, blank = columns.get("kind", ["math"] * len(completions)), [""] * len(completions)
        rows = list(zip(kinds, texts(columns.get("prompts", blank)), texts(completions), columns.get("answer", blank),
                        columns.get("question", blank), strict=True))
        for kind, _, _, answer, _ in rows:
            if kind not in KINDS or not isinstance(answer, str):
                raise ValueError(f"kind is {kind!r} and answer is {answer!r}, expected one of {KINDS} and a string")
        return self._batches.submit(self._score, rows, list(completions), columns)

    def score(self, completions: Sequence, **columns: Sequence | None) -> Scores:
        """The result of `submit`."""
        return self.submit(completions, **columns).result()

    def close(self, *exception: object) -> None:
        """Cancels batches that are not done, and kills programs that run."""
        self._closing.set()
        self._batches.shutdown(cancel_futures=True)
        self._judgements.shutdown()

    __exit__ = close

    def _score(self, rows: list[tuple[str, str, str, str, str]], completions: list, columns: dict[str, list]) -> Scores:
        applies = {name: [kind in APPLIES.get(name, KINDS) for kind, *_ in rows] for name in self._weights}
        if "accuracy" in applies and "code" in columns.get("kind", ()):
            sandbox, _, memory_mb, imports = self._program
            check(memory_mb, sandbox, imports)  # if it fails, that is an error before any work
        parts, replies = {}, {}
        try:
            for name, here in applies.items():
                if name in self._functions:
                    parts[name] = _call(name, self._functions[name], completions, columns)
                else:
                    parts[name] = [self._start(*row, replies) if applicable else None
                                   for row, applicable in zip(rows, here, strict=True)]
            pending = set(replies.values())
            while pending:
                pending = wait(pending, timeout=0.1).not_done
                if self._closing.is_set():
                    raise CancelledError("the scorer was closed")
        finally:
            for reply in replies.values():
                reply.cancel()
        results = {reply: reply.exception() or reply.result() for reply in replies.values()}
        found = {name: [results.get(value, value) for value in values] for name, values in parts.items()}
        # A judgement that failed counts for each completion that it was made for.
        failures = [value for values in found.values() for value in values if isinstance(value, Exception)]
        expected = [error for error in failures if isinstance(error, EndpointError | ValueError)]
        messages = [str(error) for error in expected if isinstance(error, EndpointError)]
        parts = {name: [value if isinstance(value, float) else math.nan for value in values]
                 for name, values in found.items()}
        total = [math.fsum(weight * parts[name][index] for name, weight in self._weights.items()
                           if weight and applies[name][index]) for index in range(len(rows))]
        unscorable = {name: sum(map(math.isnan, values)) - applies[name].count(False) for name, values in parts.items()}
        return Scores(parts, total, timeouts=sum(isinstance(error.__context__, TimeoutError) for error in expected),
                      crashes=len(failures) - len(expected), endpoint_failures=len(messages),
                      unscorable=unscorable, endpoint_error="".join(messages[:1]))

    def _start(self, kind: str, prompt: str, completion: str, answer: str, question: str,
               replies: dict[tuple, Future]) -> float | Future | None:
        """Accuracy, or the judge's reward for open answers; None if unscorable. Equal completions are judged once."""
        if kind == "choice":
            expected = choice.letter(answer)
            return None if expected is None else float(choice.chosen(prompt, completion) == expected)
        given = text.final_answer(prompt, completion) or ""
        if kind == "exact":
            expected = text.same_text(answer)
            return float(text.same_text(given) == expected) if expected else None
        if kind == "math":
            call = self._judgements.submit, grade, given, answer
        elif kind == "code":
            settled = settle_program(prompt, completion, answer)
            if not isinstance(settled, tuple):
                return settled
            call = self._judgements.submit, judge_program, *settled, *self._program, self._closing
        else:
            call = self._judge.start_reward, question or prompt, prompt, completion, answer
        if call not in replies:
            replies[call] = call[0](*call[1:])
        return replies[call]


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
