r"""Finding the final answer in a completion, and reading it when it is a plain number.

What counts as the final answer, so that listing many candidates earns nothing:

* only what follows the thought counts (`tags.after_thinking`); the prompt never does;
* with an `<answer>` tag there must be exactly one pair, and no `\boxed{}` or `####` after it;
* otherwise the last `\boxed{}` or `#### ` line is the answer, and it alone: an earlier one is ignored, and
  when the last is malformed there is no answer; a `#### Summary` without a number after a `\boxed{}` is a heading;
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


_DIGIT = re.compile(r"\d")


def final_answer(prompt: str, completion: str) -> str | None:
    """The unique final answer of a completion (see the rules above), or None when it gives none."""
    text = after_thinking(prompt, completion)
    if text is None:
        return None
    text = text.replace("\\boxed {", BOXED)
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
        if boxed < 0 or _DIGIT.search(line):
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


_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?:\\?\$|[€£¥₹₽])? ?(?P<inner>[+-]?)"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    r" ?(?:(?P<percent>\\?%)|[€£¥₹₽°]|\^ ?\\circ|\^ ?\{ ?\\circ ?\})?\.?",
    re.ASCII,
)
_LATEX_SPACING = (
    ("\u2212", "-"), ("{,}", ","), (",\\!", ","), ("\\!", ""),
    *((space, " ") for space in ("\\,", "\\;", "\\:", "~", "\\ ")),
)  # fmt: skip


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
