"""The colour and the marker of an implementation, the same in every picture.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; the marker says the same once more.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

OURS = "r1kernels"
CEILING = "ceiling: "


class Mark(NamedTuple):
    color: str
    marker: str


MARKS = {
    OURS: Mark("#0072b2", "o"),
    "torch eager": Mark("#e69f00", "s"),
    "torch.compile": Mark("#009e73", "D"),
    "torch linear_cross_entropy": Mark("#cc79a7", "^"),
    "TRL": Mark("#d55e00", "v"),
    "Liger": Mark("#56b4e9", "P"),
    "verl": Mark("#8a6d3b", "<"),
    "cce": Mark("#7f7f7f", ">"),
    "QuACK": Mark("#7b5cc6", "X"),
}
OTHERS = (Mark("#a83279", "p"), Mark("#5b8c00", "h"), Mark("#b8860b", "*"), Mark("#3f7f93", "d"))


def mark(implementation: str) -> Mark:
    """The mark of an implementation. "r1kernels, float32 logits" has that of r1kernels; a name without a fixed mark has
    one that follows from its letters."""
    base = implementation.partition(", ")[0]
    return MARKS.get(base) or OTHERS[zlib.crc32(base.encode(errors="replace")) % len(OTHERS)]


def order(implementation: str) -> tuple[int, str]:
    """A key for sorting: r1kernels first, then the known ones, then others by name, ceilings last."""
    names = list(MARKS)
    base = implementation.partition(", ")[0]
    place = names.index(base) if base in MARKS else len(names)
    return (len(names) + 1 if implementation.startswith(CEILING) else place, implementation)
