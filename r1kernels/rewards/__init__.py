"""Rewards: what a completion is worth. No torch, and nothing else of r1kernels.

The functions here take lists and return lists, so TRL takes them as they are:

    GRPOTrainer(reward_funcs=[rewards.accuracy, rewards.format], ...)    # the data set has columns answer and kind

Completions and prompts are strings, or chats (lists of messages; the last message counts). A value of None means that
the completion cannot be scored: its reference is blank or unusable, or its judgement timed out or crashed. It never
stands for a wrong answer. `Scorer` adds weights, counts of failures, a background thread, and a pool of workers that
you can close.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Sequence
from math import isnan  # `math` here is a module of this package

from . import scorer as _scorer
from .endpoint import EndpointError
from .judge import Judge
from .pool import WorkerError
from .scorer import KINDS, Scorer, Scores

__all__ = [
    "KINDS",
    "EndpointError",
    "Judge",
    "Scorer",
    "Scores",
    "WorkerError",
    "accuracy",
    "code",
    "format",
    "language",
    "overlong",
]

Values = list[float | None]


def accuracy(completions: Sequence, *, answer: Sequence[str], kind: Sequence[str] | None = None,
             prompts: Sequence | None = None, **columns: object) -> Values:
    """1.0 where the final answer of a completion is right, else 0.0.

    Args:
        completions: B completions.
        answer: B references; for kind "code" the tests of a program as JSON.
        kind: B of "math" (the default), "choice", "exact", "code" and "open"; open answers give None.
        prompts: B prompts. A prompt that ends by opening `<think>` starts the thought.
        columns: ignored.

    Raises:
        ValueError: a column has a wrong length or value. The message names it.
        WorkerError: no worker process could start.
    """
    return _values("accuracy", completions, answer=answer, kind=kind, prompts=prompts)


def code(completions: Sequence, *, answer: Sequence[str], prompts: Sequence | None = None, **columns: object) -> Values:
    """`accuracy` where every answer is a program: 1.0 where it passes the tests of `answer` (JSON), else 0.0."""
    return accuracy(completions, answer=answer, kind=["code"] * len(completions), prompts=prompts)


def format(completions: Sequence, *, prompts: Sequence | None = None, **columns: object) -> Values:
    """1.0 for `<think>...</think> <answer>...</answer>`, each tag once and nothing outside, else 0.0."""
    return _values("format", completions, prompts=prompts)


def language(completions: Sequence, *, language: Sequence[str] | None = None, **columns: object) -> Values:
    """(words of the thought in `language`) / (words of the thought), from 0 to 1; 1 for a thought without words.

    `language` lists "en" (the default) or "zh". Latin letters in code and TeX are not counted.
    """
    return _values("language", completions, language=language)


def overlong(completions: Sequence, *, limit: int | Sequence[int], buffer: int, lengths: Sequence[int] | None = None,
             completion_ids: Sequence[Sequence[int]] | None = None, **columns: object) -> Values:
    """-min(max((length - (limit - buffer)) / buffer, 0), 1): DAPO's soft overlong penalty (arXiv 2503.14476, eq. 13).

    Lengths are in tokens: `lengths`, or the lengths of TRL's `completion_ids`. `limit` is one number or a list.
    """
    if buffer < 1:
        raise ValueError(f"buffer is {buffer!r}, expected at least 1")
    if lengths is None and completion_ids is not None:
        lengths = [len(ids) for ids in completion_ids]
    limits = [limit] * len(completions) if isinstance(limit, int) else limit
    return _values("overlong", completions, buffer=buffer, lengths=lengths, limit=limits)


def _values(name: str, completions: Sequence, buffer: int = 1, **columns: Sequence | None) -> Values:
    if name == "accuracy":
        values = _shared(os.getpid()).score(completions, **columns).parts[name]
    else:
        known = {column: values for column, values in columns.items() if values is not None}
        values = [_scorer.plain_reward(name, row, buffer) for row in _scorer.rows_of(completions, known)]
    return [None if isnan(value) else value for value in values]


@functools.cache
def _shared(process: int) -> Scorer:
    """The scorer that the functions share. A forked process has its own: threads do not survive a fork."""
    scorer = Scorer({"accuracy": 1.0})
    atexit.register(scorer.close)
    return scorer
