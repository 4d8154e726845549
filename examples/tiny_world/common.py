"""What sums and greetings share: the splits, and what a response looks like."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

Split = Literal["pretrain", "train", "test"]
Row = dict[str, Any]


def split_of(question: bytes) -> Split:
    """The split of a question, given by what is asked and not by its wording, so that no split sees another's."""
    bucket = hashlib.blake2b(question, digest_size=8).digest()[0] % 10
    return "pretrain" if bucket < 6 else "train" if bucket < 8 else "test"


def tagged(thought: str, answer: str | int) -> str:
    """A response in the form that the prompt asks for."""
    return f" <think>{thought}</think>\n<answer>{answer}</answer>"
