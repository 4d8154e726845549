r"""The forms of an answer to a mathematical problem, and reading them.

`read` says which form a text has: a `Number`, `Words`, an `Expression`, a `Group` (list, tuple, interval, union,
matrix) or an `Equation`. A text that has none of them raises ValueError. docs/answers.md lists them with examples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from . import expression
from .notation import unit_of


@dataclass(frozen=True)
class Number:
    """An exact number. `50%` is the number 50 with `percent`."""

    value: Fraction
    percent: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Words:
    """A text that must be equal, but for capitals: words, a number in another base, a ratio, a time."""

    text: str


@dataclass(frozen=True)
class Expression:
    r"""A closed form such as `2\sqrt{3}`, or an expression with variables."""

    text: str
    unit: str = ""


@dataclass(frozen=True)
class Group:
    """Several forms. The kind is "list" or "union", which have no order, or "matrix", "row", or a pair of brackets."""

    kind: str
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Equation:
    """`name = side`, `side = side` and so on. An inequality is `name = interval`.

    The difference is `left - (right)`, for an equation with these two sides.
    """

    name: str
    sides: tuple[Form, ...]
    difference: str = ""


Form = Number | Words | Expression | Group | Equation
INTERVALS = ("()", "(]", "[)", "[]")


_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?P<money>[$€£¥₹]?) ?(?:"
    rf"(?:(?P<whole>{_WHOLE})(?: |(?=\\)))?(?:\\frac\{{(?P<over>-?{_WHOLE})\}}\{{(?P<under>[1-9]\d*)\}}"
    rf"|(?P<above>{_WHOLE}) ?/ ?(?P<below>[1-9]\d*))"
    r"|10\^\{(?P<ten>-?\d{1,4})\}"
    rf"|(?P<decimal>{_WHOLE}(?:\.\d*)?|\.\d+)(?:\\overline\{{(?P<period>\d+)\}})?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,4})(?!\d)| ?\\(?:times|cdot) ?10\^\{(?P<power>-?\d{1,4})\})?"
    r")(?![\d.,]*\d)",
    re.ASCII,
)
_NAME = re.compile(expression.NAME, re.ASCII)
_BARS = re.compile(rf"\|{expression.NAME}\|", re.ASCII)
_FUNCTION = re.compile(r"[A-Za-z]\([A-Za-z]\)")
_LITERAL = re.compile(r"[0-9A-F]+_\{\d\d?\}|\d+(?: ?: ?\d+)+(?: ?[ap]\.?m)?|-? ?\\infty", re.ASCII)
_WORDS = re.compile(r"\(?[^\W\d_]+(?:[ '-]+[^\W\d_]+)*\)?")
_LONG_WORD = re.compile(r"[^\W\d_]{3}|[^\x00-\x7f]|^no$", re.IGNORECASE)
_UNIT = re.compile(r'(.*?[^ ]) ?((?:"[^"]*"|(?<=[ })])[A-Za-z]{2,})(?: ?\^\{[23]\})?)')
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}")
_COMMA, _UNION = re.compile(","), re.compile(r"\\cup(?![A-Za-z])")
_SEPARATOR = re.compile(r",?(?: or | and )|(?<!\d),|,(?!\d{3}(?!\d))|;", re.ASCII)
_RELATION = re.compile(r":=|=|<|>|\\(?:le|ge|ne|in)(?![A-Za-z])")


def read(text: str) -> Form:
    """The form of a text in `normal` notation; ValueError when it has none of the forms."""
    words = " ".join(text.replace('"', " ").split())
    if number := _read_number(text):
        return number
    if _LITERAL.fullmatch(text):
        return Words(text.replace(" ", ""))
    if _WORDS.fullmatch(words) and ('"' in text or _LONG_WORD.search(words)):
        return Words(words.strip("()"))
    if form := _read_list(text) or _read_relation(text) or _read_signs(text) or _read_brackets(text):
        return form
    if matrix := _MATRIX.fullmatch(text):
        rows = [[read(cell.strip()) for cell in row.split("&")] for row in matrix[2].split("\\\\")]
        return Group("matrix", tuple(Group("row", tuple(row)) for row in rows))
    if text == r"\mathbb{R}":
        return Group("()", (Words(r"-\infty"), Words(r"\infty")))
    unit = _UNIT.fullmatch(text)
    name = unit_of(unit[2]) if unit else None
    if unit and name:
        text = unit[1]
    expression.check(text)
    return Expression(text, name or "")


def _read_number(text: str) -> Number | None:
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    percent = rest.strip() in ("%", "percent", '"percent"')
    unit = "" if percent else unit_of(rest)
    # `5m` may be a product, so that a unit of one letter needs a space.
    if unit is None or (len(rest) == 1 and rest.isascii() and rest.isalpha()):
        return None
    part = {name: (found or "").replace(",", "") for name, found in match.groupdict().items()}
    if part["over"] or part["above"]:
        value = Fraction(int(part["over"] or part["above"]), int(part["under"] or part["below"]))
        if part["whole"] and not 0 < value < 1:
            return None
        value += int(part["whole"] or 0)
    elif part["ten"]:
        value = Fraction(10) ** int(part["ten"])
    else:
        value = Fraction(part["decimal"])
        if period := part["period"]:
            value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(part["decimal"].partition(".")[2]))
        value *= Fraction(10) ** int(part["exponent"] or part["power"] or 0)
    return Number(-value if part["sign"] == "-" else value, percent, unit or unit_of(part["money"]) or "")


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of the text between the separators outside of all brackets, and these separators."""
    parts, found, start, depth, position = [], [], 0, 0, 0
    while position < len(text):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0 and (match := separator.match(text, position)):
            parts.append(text[start:position].strip())
            found.append(match[0].strip())
            start = position = match.end()
        else:
            position += 1
    return [*parts, text[start:].strip()], found


def _read_list(text: str) -> Form | None:
    parts, separators = _split(text, _SEPARATOR)
    if len(parts) == 1:
        return None
    items: list[Form] = []
    for part in parts:
        form = read(part)
        # `1 \pm 2` within a list is two of its items, but a set is one.
        several = isinstance(form, Group) and form.kind == "list" and part[:2] != r"\{"
        items += form.items if several else [form]
    ranges = [item for item in items if isinstance(item, Equation) and _is_interval(item.sides[0])]
    if len(ranges) == len(items) and set(separators) == {"or"} and len({item.name for item in ranges}) == 1:
        return Equation(ranges[0].name, (Group("union", tuple(item.sides[0] for item in ranges)),))
    return Group("list", tuple(items))


def _is_interval(form: Form) -> bool:
    return isinstance(form, Group) and form.kind in INTERVALS and len(form.items) == 2


def _read_relation(text: str) -> Form | None:
    sides, relations = _split(text, _RELATION)
    if not relations:
        return None
    named = [bool(_NAME.fullmatch(side)) and side not in ("e", "i") for side in sides]
    if set(relations) <= {"=", ":="}:
        if len(sides) == 2 and _BARS.fullmatch(sides[0]):
            return read(rf"\pm {sides[1]}")
        named[0] = named[0] or (not any(named) and bool(_FUNCTION.fullmatch(sides[0])))
        difference = f"{sides[0]}-({sides[1]})" if len(sides) == 2 else ""
        name = sides.pop(named.index(True)) if any(named) else ""
        return Equation(name, tuple(map(read, sides)), difference)
    if relations == [r"\in"] and named[0]:
        return Equation(sides[0], (read(sides[1]),))
    if set(relations) <= {">", r"\ge"}:
        sides, relations, named = sides[::-1], relations[::-1], named[::-1]
    closed = [relation in (r"\le", r"\ge") for relation in relations]
    if len(sides) == 2:
        place, end = (0, r"-\infty") if named[0] else (2, r"\infty")
        sides.insert(place, end)
        closed.insert(place, False)
    if len(sides) != 3 or sum(named) != 1 or not _NAME.fullmatch(sides[1]):
        raise ValueError(f"{text!r} is no inequality of the listed forms")
    if not (set(relations) <= {">", r"\ge"} or set(relations) <= {"<", r"\le"}):
        raise ValueError(f"{text!r} is no relation of the listed forms")
    return Equation(sides[1], (Group("(["[closed[0]] + ")]"[closed[1]], (read(sides[0]), read(sides[2]))),))


def _read_signs(text: str) -> Form | None:
    if text.count(r"\pm") != 1 or text.startswith(r"\{"):
        return None
    return Group("list", tuple(read(re.sub(r"\\pm ?", sign, text)) for sign in "+-"))


def _read_brackets(text: str) -> Form | None:
    """A union, a set, a tuple, an interval, or a form with brackets around it."""
    parts, unions = _split(text, _UNION)
    if unions:
        return Group("union", tuple(map(read, parts)))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _read_list(text[2:-2]) or read(text[2:-2])
    kind = text[:1] + text[-1:]
    if kind not in ("{}", *INTERVALS) or not _is_one_bracket(text):
        return None
    inner, commas = _split(text[1:-1], _COMMA)
    if not commas and kind in ("{}", "()"):
        return read(inner[0])
    if not commas or kind == "{}":
        raise ValueError(f"{text!r} is no tuple or interval")
    return Group(kind, tuple(map(read, inner)))


def _is_one_bracket(text: str) -> bool:
    depth = 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def is_function(name: str) -> bool:
    """Whether the name of an equation is one such as `f(x)`."""
    return bool(_FUNCTION.fullmatch(name))


def names(form: Form) -> frozenset[str]:
    """The variables in a form."""
    return frozenset().union(*(expression.names(text) for text in expressions(form)))


def expressions(form: Form) -> list[str]:
    """What the parser must read to compare a form with an expression."""
    if isinstance(form, Number):
        return [rf"{'-' * (form.value < 0)}\frac{{{abs(form.value.numerator)}}}{{{form.value.denominator}}}"]
    if isinstance(form, Expression):
        return [form.text]
    parts = form.items if isinstance(form, Group) else form.sides if isinstance(form, Equation) else ()
    return [text for part in parts for text in expressions(part)]
