r"""Multiple choice: the letter of the option that a completion chooses.

It is read from the final answer. A text that names a second letter, or takes the first one back, counts as no answer,
so listing letters gains nothing. docs/answers.md lists the forms. Runs of white space become one space and the length
is limited, so no pattern is slow.
"""

# ruff: noqa: RUF001
import re
import unicodedata

from .text import INVISIBLE

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
# Another letter: a single capital that is not an article, or any letter written like an option.
_OTHER = re.compile(
    r"\b[B-HJ-Z]\b|\bA\b(?! [a-z])|\bA (?:is|was|or|and|may|might|could|would)\b|[(\[][A-Za-z][)\]]|^[a-z]\b[.):]?$"
)
_EXCLUDED = re.compile(r"\(?\b([A-Z])\b\)? (?:is|are) (?:wrong|incorrect|false|impossible)\b")
_CHANGED = re.compile(
    r"\b(?:actually|wait|instead|rather|alternatively|maybe|perhaps|but|also|answer|option|choice|wrong|incorrect|so|thus)\b"
    r"|^(?:or|and|nor|not|no|never|only|if|unless|is|was|isn'?t|looks|seems|cannot|can'?t|could|might)\b(?!$)|[或和跟与不]",
    re.IGNORECASE,
)


def letter(text: str) -> str | None:
    """The option's letter, as a capital; None when the text does not name exactly one."""
    if len(text) > MAX_CHOICE:
        return None
    text = " ".join(unicodedata.normalize("NFKC", text.translate(INVISIBLE)).split())
    text = " ".join(_STYLE.sub(" ", text).split()).strip("'‘’ ")
    announced = _ANNOUNCED.match(text)
    before, _, last = text.rpartition(". ")
    if not announced and _SENTENCE.match(text) and not _NAME.search(before):
        text, announced = last, _ANNOUNCED.match(last)
    match = _LETTER.match(text, announced.end() if announced else 0)
    if match is None:
        return None
    found, end = match[match.lastindex or 0].upper(), match.end()
    if _END.match(text, end):
        return found
    # What follows must leave this letter the only one.
    if reason := _REASON.match(text, end):
        rest = _EXCLUDED.sub(lambda excluded: excluded[0] if excluded[1] == found else " ", reason[1])
    elif option := _OPTION.match(text, end):
        rest = option[option.lastindex or 0]
    else:
        return None
    return None if _OTHER.search(rest) or _CHANGED.search(rest) else found
