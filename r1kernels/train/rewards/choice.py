r"""Multiple choice: the letter of the option that a completion settles on.

Read from the final answer (see `answers`), or, where a completion has no marker at all, from a last line that says
`The answer is B`. The letter comes first, alone, in brackets or before `.`, `)` or `:` and the option's text; a letter
that a sentence happens to begin with (`A bird`) is none, and neither is the first of several (`A or B`). Only one
letter is ever read, so that listing them gains nothing.
"""

import math
import re
import unicodedata

from .answers import ANSWER_MARKERS, final_answer
from .base import Sample
from .tags import after_thinking

# An option's text may be long, but not so long; normalising stays cheap.
MAX_CHOICE = 2000

_STYLE = re.compile(r"\\(?:text|math|bold)?(?:bf|rm|it|sf|tt|symbol|box|normal)?(?=\s*\{)|\\[()\[\] ,;!]|[{}$*`_]")
_SO = r"(?:(?:so|thus|hence|therefore)\b,?\s*)?"
_NAME = (
    r"(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)*(?:answer|option|choice)\b(?:\s+(?:is|would\s+be)\b)?\s*:?\s*"
    r"|(?:正确|最终)?(?:答案|选项)(?:是|为|应为)?\s*:?\s*|(?:应)?选择?\s*"
)
_LETTER = r"(?:\(\s*(?P<round>[A-Z])\s*\)|\[\s*(?P<square>[A-Z])\s*\]|(?P<bare>[A-Z]))"
_SECOND = r"(?:(?:or|and|nor)\s+|[,/&|;+]\s*)*[(\[]?[A-Z](?:[)\]]|[.:,/&|;+]|\s*$|\s+(?:or|and|nor)\b)"
# After the letter: nothing, or what sets off the option's text, which does not begin with another letter.
_REST = rf"(?P<rest>\s*[.):]?\s*$|(?:(?<=[)\]])|\s*[.):]|\s+[-\u2013\u2014])\s+(?!{_SECOND})\S)"
_ANSWER = re.compile(rf"{_SO}(?:{_NAME})*{_LETTER}{_REST}", re.IGNORECASE)
_SENTENCE = re.compile(rf"{_SO}(?:{_NAME})+{_LETTER}{_REST}", re.IGNORECASE)


def choice(sample: Sample) -> float:
    """1.0 when the completion settles on the reference's letter, else 0.0; NaN when the reference names none."""
    expected = letter(sample.answer)
    if expected is None:
        return math.nan
    answer = final_answer(sample.prompt, sample.completion)
    if answer is not None:
        return float(letter(answer) == expected)
    text = after_thinking(sample.prompt, sample.completion)
    if text is None or any(marker in text for marker in ANSWER_MARKERS):
        return 0.0
    last = text.rstrip()[-MAX_CHOICE:].rpartition("\n")[2]
    return float(letter(last, _SENTENCE) == expected)


def letter(text: str, pattern: re.Pattern[str] = _ANSWER) -> str | None:
    """The option's letter, as a capital; None when the text does not name exactly one."""
    if len(text) > MAX_CHOICE:
        return None
    match = pattern.match(_STYLE.sub(" ", unicodedata.normalize("NFKC", text)).strip())
    return (match["round"] or match["square"] or match["bare"]).upper() if match else None
