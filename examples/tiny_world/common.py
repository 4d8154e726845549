"""What sums and greetings share: the splits, and what a response looks like."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

Split = Literal["pretrain", "train", "test"]
Row = dict[str, Any]

# Shares of all questions in tenths. Pretraining, RL and the evaluation never see each other's questions.
_SPLITS: dict[Split, range] = {"pretrain": range(6), "train": range(6, 8), "test": range(8, 10)}


def split_of(question: bytes) -> Split:
    """The split of a question, given by what is asked and not by its wording."""
    bucket = hashlib.blake2b(question, digest_size=8).digest()[0] % 10
    return next(split for split, buckets in _SPLITS.items() if bucket in buckets)


def tagged(thought: str, answer: str | int) -> str:
    """A response in the form that the prompt asks for."""
    return f" <think>{thought}</think>\n<answer>{answer}</answer>"
