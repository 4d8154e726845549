r"""One notation for mathematical answers, and their units.

`normal` writes what looks the same in the same way: `\dfrac12`, `½` and `\frac {1} {2}` all become `\frac{1}{2}`. It
changes notation only, never meaning. Words in `\text{}` come out in double quotes, which have no other use.
"""

# ruff: noqa: RUF001
from __future__ import annotations

import re
import unicodedata
from importlib import resources

from .text import INVISIBLE

_SYMBOLS = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ", "θ": r"\theta ",
    "½": r" \frac{1}{2}", "⅓": r" \frac{1}{3}", "⅔": r" \frac{2}{3}", "¼": r" \frac{1}{4}", "¾": r" \frac{3}{4}",
    "²": "^{2}", "³": "^{3}", "\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,", "ℝ": r"\mathbb{R}",
    "，": ",", "。": ".", "’": "'", '"': "\0",
}  # fmt: skip
# Full-width characters and the alphabets of mathematics (bold, italic ...) mean the plain ones.
_SYMBOLS |= {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SYMBOLS |= {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in range(0x1D400, 0x1D800)}
_TABLE = INVISIBLE | str.maketrans(_SYMBOLS)

_TEXT = r"\\(?:text|textbf|textit|textrm|mbox|mathrm) ?\{"
_REWRITTEN = [(re.compile(pattern, re.ASCII), written) for pattern, written in (
    # Dollars around mathematics go, and dollars of money stay. Other marks around the whole go too.
    (r"\\\$", "\1"), (r"\$\$?([^$]*)\$\$?", r" \1 "), ("\1", "$"), (r"\\%", "%"),
    (r"^ ?\\\((.*)\\\) ?$|^ ?\\\[(.*)\\\] ?$|^ ?\*\*(.*)\*\* ?$", r"\1\2\3"),
    # Groups of thousands, then spaces.
    (r"(?<=\d)(?:\{,\}|,\\! *|\\[,;:! ]|~)(?=\d{3}(?!\d))", ","), (r"\{,\}", ","),
    (r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|\s|(?<=[\d{}])~(?=[A-Za-z\\])", " "),
    # Letters and words. What has a digit is no word.
    (r"\\(?:mathrm|rm|text) ?\{ ?([ei]) ?\}", r"\1"), (r"\\(?:mathbf|boldsymbol|mathit) ?\{([^{}]*)\}", r"\1"),
    (_TEXT + r"(?=[^{}]*\d)([^{}]*)\}", r" \1 "), (_TEXT + r"([^{}]*)\}", r'"\1"'), (r'" ?(or|and) ?"', r" \1 "),
    # One name for each command.
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\\(le|ge)(?:q|qslant)(?![A-Za-z])", r"\\\1"),
    (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"), ("<=", r"\\le "), (">=", r"\\ge "),
    (r"\\(?:varnothing|emptyset)(?![A-Za-z])|\\\{ ?\\\}", '"empty set"'), (r"\\mathbb ?\{R\}", r"(-\\infty,\\infty)"),
    (r"\^ ?\\circ(?![A-Za-z])|\^ ?\{ ?\\circ ?\}", '"degree"'), (r"\*\*", "^"), (r"\*|\\times(?![A-Za-z])", r"\\cdot "),
    (r"(?<![A-Za-z\\])(sqrt|sin|cos|tan|ln|log|pi)(?![A-Za-z])", r"\\\1"),
    # Braces around every argument.
    (r"√ ?(\d+|[A-Za-z])", r"\\sqrt{\1}"), (r"(?:\\sqrt|√) ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt ?(\d)(?!\d)", r"\\sqrt{\1}"), (r"\\frac ?([\dA-Za-z])(?= ?[\dA-Za-z{])", r"\\frac{\1}"),
    (r"\\frac ?(\{[^{}]*\}) ?([\dA-Za-z])", r"\\frac\1{\2}"),
    (r"\^ ?([+-]?\d+|[A-Za-z])", r"^{\1}"), (r"_ ?(\d+|[A-Za-z])", r"_{\1}"),
    (r"(?<![\w)}.!\]]) ?\+ ?\\infty", r"\\infty"),
    # Spaces that separate nothing.
    (r" *(\\?[{}()\[\]]|[;=+]) *", r"\1"), (r" +", " "), (r"^ | $", ""),
)]  # fmt: skip
_SAYS = re.compile(r"(?:(?:the |my )?(?:(?:final|correct) )?answer(?: is:?|:) ?|(?:正确|最终)?答案(?:是|为|:) ?)", re.I)

_LINES = [line.split() for line in resources.files(__package__).joinpath("units.txt").read_text("utf-8").splitlines()]
_UNITS = {name: line[0] for line in _LINES if line and line[0] not in ("#", "not") for name in line}
_NO_UNITS = {name for line in _LINES if line[:1] == ["not"] for name in line}
_NOUN = re.compile(r"(?!.*(?:th|rd|s|ing|ly|ward)s$)[a-z]{3,20}s")
_UNIT = re.compile(r"(?:(square|sq|cubic) )?([^ ^{}]+) ?(?:\^\{([23])\})?")


def normal(text: str) -> str:
    """The text in the one notation."""
    text = text.translate(_TABLE).strip()
    if text.isascii() and text.isdecimal():
        return text
    text = _without_stop(text[says.end() :] if (says := _SAYS.match(text)) else text)
    for pattern, written in _REWRITTEN:
        text = pattern.sub(written, text)
    return _without_stop(text)


def _without_stop(text: str) -> str:
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def unit_of(text: str) -> str | None:
    """The unit in one spelling (`"square inches"` is `in^2`), empty for none; None when the text is no unit.

    A unit is a name of units.txt, or the plural of a noun such as `apples`.
    """
    text = re.sub(r"degree ([CF])", r"degree_\1", " ".join(text.replace('"', " ").split()))
    found = []
    for part in re.split(r" ?/ ?| per ", text) if text else ():
        power, name, exponent = match.groups() if (match := _UNIT.fullmatch(part)) else ("", "", "")
        noun = name if _NOUN.fullmatch(name) and name not in _NO_UNITS else None
        unit = _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) or noun
        if unit is None:
            return None
        found.append(unit + (exponent or {"square": "2", "sq": "2", "cubic": "3"}.get(power, "")))
    return "/".join(found) if len(found) < 3 else None
