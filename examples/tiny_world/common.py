"""The parts that sums and greetings share: the splits, and the form of a response."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

Split = Literal["pretrain", "train", "test"]
Row = dict[str, Any]


def split_of(question: bytes) -> Split:
    """The split of a question. It depends on the meaning and not on the wording, so splits do not share questions."""
    bucket = hashlib.blake2b(question, digest_size=8).digest()[0] % 10
    return "pretrain" if bucket < 6 else "train" if bucket < 8 else "test"


def tagged(thought: str, answer: str | int) -> str:
    """A response in the form that the prompt asks for."""
    return f" <think>{thought}</think>\n<answer>{answer}</answer>"
