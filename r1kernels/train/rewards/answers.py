r"""Finding the final answer in a completion, and reading it when it is a plain number.

What counts as the final answer, so that listing many candidates earns nothing:

* only what follows the thought counts (`tags.after_thinking`); the prompt never does;
* with an `<answer>` tag there must be exactly one pair, and no `\boxed{}` or `####` after it;
* otherwise the last `\boxed{}` or `#### ` line is the answer, and it alone: an earlier one is ignored, and
  when the last is malformed there is no answer;
* inside the tag, a `\boxed{}` or `####` is read the same way, but a second one makes the answer ambiguous;
* without any marker there is no answer.
"""

import re
from decimal import Decimal

from .tags import ANSWER, ANSWER_END, after_thinking

BOXED, HASHES = "\\boxed{", "####"
ANSWER_MARKERS = (ANSWER, ANSWER_END, BOXED, HASHES)

# Longer than any sensible final answer, and short enough that parsing it stays cheap.
MAX_ANSWER = 500

# Characters that are not seen: of no width, of direction, and what chooses between two looks of another.
INVISIBLE = dict.fromkeys([0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x2060, 0x2065), *range(0xFE00, 0xFE10)])

# Untagged answers are looked for at the end only: the scan for a matching brace is a Python loop.
TAIL = 20_000


def final_answer(prompt: str, completion: str) -> str | None:
    """The unique final answer of a completion (see the rules above), or None when it gives none."""
    text = after_thinking(prompt, completion)
    if text is None:
        return None
    opened, closed = text.count(ANSWER), text.count(ANSWER_END)
    if opened == closed == 0:
        return _last_marked(text[-TAIL:])
    if opened != 1 or closed != 1:
        return None
    _, _, inside = text.partition(ANSWER)
    inside, end, after = inside.partition(ANSWER_END)
    if not end or BOXED in after or HASHES in after or len(inside) > TAIL:
        return None
    markers = inside.count(BOXED) + inside.count(HASHES)
    if markers > 1:
        return None
    return _last_marked(inside) if markers else inside.strip()


def _last_marked(text: str) -> str | None:
    boxed, hashes = text.rfind(BOXED), text.rfind(HASHES)
    if hashes > boxed:
        line = text[hashes + len(HASHES) :].lstrip(" \t").partition("\n")[0]
        return line.strip()
    return braced(text, boxed + len(BOXED)) if boxed >= 0 else None


def braced(text: str, start: int) -> str | None:
    """The text from `start`, just inside a brace, to the brace that closes it; None when nothing does."""
    depth, position = 1, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None


_MATH = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def unwrap(text: str) -> str:
    """Strips white space, a full stop, and math delimiters when they hold all that could be an answer."""
    text = text.strip().rstrip(".").rstrip()
    found = _MATH.search(text)
    if found and not re.search(r"[\d\\$=]", text[: found.start()] + text[found.end() :]):
        return next(filter(None, found.groups())).strip() or text
    return text


_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?:\\?\$)? ?(?P<inner>[+-]?)"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    r" ?(?P<percent>\\?%)?\.?",
    re.ASCII,
)
_LATEX_SPACING = (("\u2212", "-"), ("{,}", ","), (",\\!", ","), ("\\!", ""), ("\\,", " "), ("\\ ", " "))


def plain_number(text: str) -> tuple[Decimal, bool] | None:
    """Reads `1,234.50`, `$18`, `18.` or `-5%`: the exact value, and whether it was a percentage; else None.

    A comma counts only between groups of three digits, so that the list `3,4` is not 34.
    """
    text = text.strip()
    if len(text) > 64:
        return None
    for written, meant in _LATEX_SPACING:
        text = text.replace(written, meant)
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    digits = match["digits"].replace(",", "").replace(" ", "")
    return Decimal(match["sign"] + match["inner"] + digits), match["percent"] is not None


_WORD = re.compile(r"[^\W\d_]{2,}(?:['\u2019-][^\W\d_]+)*|[aAI]")
_PUNCTUATION = ".,;:!?*\"'"
# Words that change the value of the number beside them.
_OPERATOR = re.compile(
    "plus|minus|negative|times|over|divided|by|point|half|double|twice|third|quarter|dozen|hundred|thousand|"
    "million|billion|trillion|squared?|cubed?|root|sqrt|power|factorial|log|ln|exp|sin|cos|tan|pi|infinity|or",
    re.IGNORECASE,
)


_FACTORIAL = re.compile(r"\d\s*!")


def is_prose(text: str) -> bool:
    """Whether the text is only words and plain numbers: nothing that mathematics would have to read.

    The mark of `18!` is a factorial, but for one at the end of a sentence.
    """
    tokens = [token.strip(_PUNCTUATION) for token in text.split()]
    shouted = text.endswith("!") and any(_WORD.fullmatch(token) for token in tokens)
    if _FACTORIAL.search(text[:-1] if shouted else text):
        return False
    return all(not token or _WORD.fullmatch(token) or plain_number(token) for token in tokens)


def number_in_prose(text: str) -> tuple[Decimal, bool] | None:
    """The number of a phrase like `18 dollars` or `The answer is 18.`; None unless there is exactly one."""
    found = None
    for token in text.split():
        token = token.strip(_PUNCTUATION)
        number = plain_number(token)
        if number is not None and found is None:
            found = number
        elif number is not None or _OPERATOR.fullmatch(token):
            return None
    return found
