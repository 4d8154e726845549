"""Rewards for completions. This package imports neither torch nor other parts of r1kernels.

The functions here take lists and return lists, so TRL can use them directly:

    GRPOTrainer(reward_funcs=[rewards.accuracy, rewards.format], ...)    # the data set has columns answer and kind

Completions and prompts are texts or chats (lists of messages; the last message counts). `Scorer` adds weights, counts
of failures, and several programs at once.
"""

from collections.abc import Sequence as _Sequence
from math import isnan as _isnan  # `math` here is a module of this package

from .endpoint import EndpointError, Judge
from .language import LANGUAGES as _LANGUAGES
from .language import share as _share
from .scorer import KINDS, Scorer, Scores
from .scorer import Completion as _Completion
from .scorer import texts as _texts
from .text import is_well_formed as _is_well_formed

__all__ = ["KINDS", "EndpointError", "Judge", "Scorer", "Scores", "accuracy", "code", "format", "language", "overlong"]


def accuracy(completions: _Sequence[_Completion], *, answer: list[str], kind: list[str] | None = None,
             prompts: _Sequence[_Completion] | None = None, **columns: object) -> list[float | None]:
    """1.0 if the final answer of a completion is right, else 0.0; None if its reference cannot be used.

    `kind` lists "math" (the default), "choice", "exact", "code" (`answer` is the tests of a program as JSON) and "open"
    (always None). A prompt may end by opening `<think>`. Raises SandboxError if programs cannot be confined.
    """
    with Scorer({"accuracy": 1.0}) as scorer:
        values = scorer.score(completions, answer=answer, kind=kind, prompts=prompts).parts["accuracy"]
    return [None if _isnan(value) else value for value in values]


def code(completions: _Sequence[_Completion], *, answer: list[str], prompts: _Sequence[_Completion] | None = None,
         **columns: object) -> list[float | None]:
    """`accuracy` for answers that are programs: 1.0 if it passes the tests of `answer` (JSON), else 0.0."""
    return accuracy(completions, answer=answer, kind=["code"] * len(completions), prompts=prompts)


def format(completions: _Sequence[_Completion], *, prompts: _Sequence[_Completion] | None = None,
           **columns: object) -> list[float]:
    """1.0 for `<think>...</think> <answer>...</answer>`, each tag once and nothing outside, else 0.0."""
    pairs = zip(_texts(prompts or [""] * len(completions)), _texts(completions), strict=True)
    return [float(_is_well_formed(prompt, completion)) for prompt, completion in pairs]


def language(completions: _Sequence[_Completion], *, language: list[str] | None = None,
             **columns: object) -> list[float]:
    """(words of the thought in `language`, "en" or "zh") / (words of the thought); 1 for a thought without words."""
    wanted = language or ["en"] * len(completions)
    for unknown in set(wanted) - set(_LANGUAGES):
        raise ValueError(f"language is {unknown!r}, expected one of {', '.join(_LANGUAGES)}")
    return [_share(completion, one) for completion, one in zip(_texts(completions), wanted, strict=True)]


def overlong(completions: _Sequence[_Completion], *, limit: int | list[int], buffer: int,
             lengths: list[int] | None = None, completion_ids: list[list[int]] | None = None,
             **columns: object) -> list[float]:
    """-min(max((length - (limit - buffer)) / buffer, 0), 1): DAPO's soft overlong penalty (arXiv 2503.14476, eq. 13).

    Lengths are in tokens: `lengths`, or those of TRL's `completion_ids`. `limit` is one number or a list.
    """
    if buffer < 1 or (lengths is None and completion_ids is None):
        raise ValueError(f"buffer is {buffer}, expected at least 1, and lengths or completion_ids are needed")
    limits = [limit] * len(completions) if isinstance(limit, int) else limit
    pairs = zip(map(len, completion_ids or ()) if lengths is None else lengths, limits, strict=True)
    return [-min(max((length - (most - buffer)) / buffer, 0.0), 1.0) for length, most in pairs]
