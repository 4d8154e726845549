r"""Multiple choice: the letter of the option that a completion settles on.

Read from the final answer (see `answers`), or, where a completion has no marker at all, from a last line that says
`The answer is B`. The letter comes first: alone, in brackets, before `.`, `)` or `:` and the option's text, before a
reason (`B because ...`), or, if it is no English word, before a capitalised text (`B Paris`). A letter that a sentence
happens to begin with (`A bird`) is none, and neither is the first of several (`A or B`, `A) 3 B) 4`) nor one that is
taken back (`B is wrong`). Only one letter is ever read, so that listing them gains nothing.

This runs in the trainer's own process. So white space is made single first, and every pattern is tried at one place
only and goes on from where the last one ended: nothing here takes more than linear time.
"""

import math
import re
import unicodedata

from .answers import ANSWER_MARKERS, INVISIBLE, final_answer
from .base import Sample
from .tags import after_thinking

# An option's text may be long, but not so long; normalising stays cheap.
MAX_CHOICE = 2000

_STYLE = re.compile(r"\\(?:text|math|bold)?(?:bf|rm|it|sf|tt|symbol|box|normal)?(?= ?\{)|\\[()\[\] ,;!]|[{}$*`_\"“”]")
_SO = re.compile(r"(?:so|thus|hence|therefore)\b,? ?", re.IGNORECASE)
# One name of an answer; several may follow each other.
_NAME = re.compile(
    r"(?:(?:the|my) )?(?:(?:correct|right|best|final) )*(?:answer|option|choice)\b(?: (?:is|would be)\b)? ?:? ?"
    r"|(?:正确|最终)?(?:答案|选项)(?:是|应为|为)? ?:? ?|应?选择? ?",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\( ?([A-Za-z]) ?\)|\[ ?([A-Za-z]) ?\]|([A-Za-z])")
_END = re.compile(r" ?[.):!。]{0,4}$")
_REASON = re.compile(r" ?[,、.;:]? ?(?:\b(?:because|since)\b|因为)", re.IGNORECASE)
# What sets off the option's text.
_TEXT = re.compile(r" ?[.):。、](?: (?=\S)|(?=[\u4e00-\u9fff]))|(?<=[)\]]) (?=\S)| [-–—] (?=\S)")
_CAPITALISED = re.compile(r" (?=[A-Z][a-z])")
# A second letter at the beginning of the text, and words that take the letter back or put another beside it.
_SECOND = re.compile(
    r"(?:(?:or|and|nor) |[,/&|;+] ?)*[(\[<']?[A-Z](?:[)\]>']|[.:,/&|;+]| ?$| (?:or|and|nor)\b)"
    r"|(?:or|and|nor|but|alternatively|maybe|perhaps|option|is|was|isn'?t|looks|seems|cannot|can'?t|could|might)\b"
    r"|(?:the )?(?:correct |right )?answer\b|[和或跟与不]",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(r"(?:not|no|wrong|incorrect|false|never|only|if|unless)\b", re.IGNORECASE)
_OTHER = re.compile(
    r"(?:^|(?<=[ (]))[A-Z][.)] |\b(?i:is|be|it's) [(\[]?[A-Z][)\]]?[.!]?$|\b[B-HJ-Z] (?i:is|would be) (?i:right|correct)"
)
_CHANGED = re.compile(r"\b(?:actually|wait|instead|rather|alternatively|maybe|perhaps)\b", re.IGNORECASE)


def choice(sample: Sample) -> float:
    """1.0 when the completion settles on the reference's letter, else 0.0; NaN when the reference names none."""
    expected = letter(sample.answer)
    return math.nan if expected is None else float(chosen(sample) == expected)


def chosen(sample: Sample) -> str | None:
    """The letter that the completion settles on, if it does."""
    answer = final_answer(sample.prompt, sample.completion)
    if answer is not None:
        return letter(answer)
    text = after_thinking(sample.prompt, sample.completion)
    if text is None or any(marker in text for marker in ANSWER_MARKERS):
        return None
    return letter(text.rstrip()[-MAX_CHOICE:].rpartition("\n")[2], named=True)


def letter(text: str, *, named: bool = False) -> str | None:
    """The option's letter, as a capital; None when the text does not name exactly one.

    Args:
        named: whether the text has to say that it is the answer.
    """
    if len(text) > MAX_CHOICE:
        return None
    text = " ".join(unicodedata.normalize("NFKC", text.translate(INVISIBLE)).split())
    text = " ".join(_STYLE.sub(" ", text).split()).strip("'‘’ ")
    match = _SO.match(text)
    start = first = match.end() if match else 0
    while match := _NAME.match(text, start):
        start = match.end()
    match = _LETTER.match(text, start)
    if match is None or (named and start == first) or not _settles(text, match):
        return None
    return match[match.lastindex].upper()


def _settles(text: str, match: re.Match[str]) -> bool:
    """Whether what follows the letter leaves it the only one."""
    end = match.end()
    if _END.match(text, end):
        return True
    if reason := _REASON.match(text, end):
        return not _CHANGED.search(text, reason.end())
    rest = _TEXT.match(text, end)
    if rest is None and match[3] and match[3] in "BCDEFGHJKLMNOPQRSTUVWXYZ":
        rest = _CAPITALISED.match(text, end)
        if rest and _TAKEN_BACK.match(text, rest.end()):
            return False
    if rest is None:
        return False
    rest = text[rest.end() :]
    return not (_SECOND.match(rest) or _OTHER.search(rest))
