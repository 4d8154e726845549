"""Exact answers: text that must be the reference, but for white space and for how Unicode spells it."""

import math
import unicodedata

from .answers import TAIL, final_answer
from .base import Sample


def exact(sample: Sample) -> float:
    """1.0 when the final answer is the reference, after NFC and with every run of white space one space, else 0.0.

    NaN when the reference is blank.
    """
    reference = normal(sample.answer)
    if not reference:
        return math.nan
    answer = final_answer(sample.prompt, sample.completion)
    return float(answer is not None and normal(answer) == reference)


def normal(text: str) -> str:
    """The text without what makes no difference."""
    # Normalising takes time quadratic in a run of combining marks: what is that long stays as it is.
    text = " ".join(text.split())
    return unicodedata.normalize("NFC", text) if len(text) <= TAIL else text
