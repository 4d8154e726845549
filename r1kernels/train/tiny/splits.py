"""Which part of the tiny world a stage may see."""

import hashlib
from typing import Literal

Split = Literal["pretrain", "train", "test"]

# Shares of all questions, in tenths: what pre-training has seen, RL never asks, and neither has seen the test.
_SPLITS: dict[Split, range] = {"pretrain": range(6), "train": range(6, 8), "test": range(8, 10)}


def split_of(question: bytes) -> Split:
    """The split to which what is asked belongs, whatever its wording."""
    bucket = hashlib.blake2b(question, digest_size=8).digest()[0] % 10
    return next(split for split, buckets in _SPLITS.items() if bucket in buckets)
