r"""Multiple choice: the letter of the option that a completion settles on.

It is read from the final answer (see `text`), or, where a completion has no marker at all, from a last line that says
`The answer is B`. The forms of docs/answers.md start with the letter or with a phrase that announces it: `B`, `(B)`,
`B. Paris`, `B because A is wrong`, `The answer is B`. What names a second letter, or takes the first one back, names
none. So listing letters gains nothing.

White space is made single first and the length is limited, so that no pattern takes long.
"""

# ruff: noqa: RUF001
from __future__ import annotations

import re
import unicodedata

from .text import ANSWER_MARKERS, INVISIBLE, after_thinking, final_answer

# The text of an option may be long, but not longer.
MAX_CHOICE = 2000

_STYLE = re.compile(r"\\(?:text|math)?(?:bf|rm|it|boldsymbol)?(?= ?\{)|</?[bi]>|\\[()\[\] ,;!{}]|[{}$*`\"“”]")
_ANNOUNCED = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:"
    r"(?:(?:the |my )?(?:(?:correct|right|best|final) )?(?:answer|option|choice)(?: is| would be)?:? ?){1,3}"
    r"|I (?:guess|choose|pick|think it is) )"
    r"|(?:因此|所以)?,? ?(?:(?:正确|最终)?(?:答案|选项)(?:是|应为|为)? ?:? ?|[故应]?选择? ?)",
    re.IGNORECASE,
)
_NAME = re.compile(r"answer|option|choice", re.IGNORECASE)
_SENTENCE = re.compile(r"[A-Za-z] [a-z]|[A-Za-z]{2}")
_LETTER = re.compile(r"\( ?([A-Za-z]) ?\)|\[ ?([A-Za-z]) ?\]|([A-Za-z])(?![A-Za-z])")
_END = re.compile(r" ?[.):!。]{0,4}(?:,? not \(?[A-Z]\)?\.?)?$")
_REASON = re.compile(r" ?[,;.]? ?(?:because|since|因为)\b ?(.*)", re.IGNORECASE)
# The text of the option, after what separates it from the letter.
_OPTION = re.compile(r" ?[.):、](?: |(?<=、)|(?=[\u4e00-\u9fff]))(.+)|(?<=[)\]]) (.+)| [-–—] (.+)| \(([^()]+)\)\.?$")
# Another letter: a capital on its own that is no article, or any letter as an option is written.
_OTHER = re.compile(
    r"\b[B-HJ-Z]\b|\bA\b(?! [a-z])|\bA (?:is|was|or|and|may|might|could|would)\b|[(\[][A-Za-z][)\]]|^[a-z]\b[.):]?$"
)
_EXCLUDED = re.compile(r"\(?\b[A-Z]\b\)? (?:is|are) (?:wrong|incorrect|false|impossible)\b")
_CHANGED = re.compile(
    r"\b(?:actually|wait|instead|rather|alternatively|maybe|perhaps|but|also|answer|option|choice|wrong|incorrect)\b"
    r"|^(?:or|and|nor|not|no|never|only|if|unless|is|was|isn'?t|looks|seems|cannot|can'?t|could|might)\b(?!$)|[或和跟与不]",
    re.IGNORECASE,
)


def chosen(prompt: str, completion: str) -> str | None:
    """The letter that the completion settles on, if it does."""
    answer = final_answer(prompt, completion)
    if answer is not None:
        return letter(answer)
    text = after_thinking(prompt, completion)
    if text is None or any(marker in text for marker in ANSWER_MARKERS):
        return None
    return letter(text.rstrip()[-MAX_CHOICE:].rpartition("\n")[2], named=True)


def letter(text: str, *, named: bool = False) -> str | None:
    """The option's letter, as a capital; None when the text does not name exactly one.

    Args:
        named: whether the text has to announce the letter, as in `The answer is B`.
    """
    if len(text) > MAX_CHOICE:
        return None
    text = " ".join(unicodedata.normalize("NFKC", text.translate(INVISIBLE)).split())
    text = " ".join(_STYLE.sub(" ", text).split()).strip("'‘’ ")
    before, _, last = text.rpartition(". ")
    announced = _ANNOUNCED.match(text)
    if not announced and _SENTENCE.match(text) and not _NAME.search(before):
        text, announced = last, _ANNOUNCED.match(last)
    match = _LETTER.match(text, announced.end() if announced else 0)
    if match is None or (named and not announced):
        return None
    found = match[match.lastindex or 0].upper()
    return found if _is_settled(text, match.end(), found) else None


def _is_settled(text: str, end: int, found: str) -> bool:
    """Whether what follows the letter leaves it the only one."""
    if _END.match(text, end):
        return True
    if reason := _REASON.match(text, end):
        excluded = [part.strip("( )")[0] for part in _EXCLUDED.findall(reason[1])]
        rest = _EXCLUDED.sub(" ", reason[1])
        return found not in excluded and not _OTHER.search(rest) and not re.search(r"\b(?:so|thus)\b", rest)
    option = _OPTION.match(text, end)
    if option is None:
        return False
    rest = option[option.lastindex or 0]
    return not _OTHER.search(rest) and not _CHANGED.search(rest)
