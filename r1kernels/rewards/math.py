r"""Strict answers to mathematical problems: whether an answer equals its reference.

An answer counts when it has one of the forms of docs/answers.md. Anything else is wrong: nothing here guesses what a
text may mean. An answer is read in three steps:

1. `notation.normal` writes it in one notation.
2. `read` classifies it: a `Number`, `Words`, an `Expression`, a `Group` (list, tuple, interval, union, matrix) or an
   `Equation`. ValueError when it is none of these.
3. `_same` compares two of these forms. Numbers are exact fractions.

`settle` does this in the calling process, in time linear in the text. Where expressions must be compared it returns
NEEDS_JUDGE. Then `judge` asks a computer algebra system, and should run in a process that can be killed.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fractions import Fraction

from . import expression
from .notation import normal, unit_of

# An answer may be this much longer than its reference.
MAX_ANSWER = 500


class Verdict(enum.Enum):
    """What `settle` says where it cannot say 1.0 or 0.0."""

    NEEDS_JUDGE = "needs judge"


NEEDS_JUDGE = Verdict.NEEDS_JUDGE


def settle(answer: str, reference: str) -> float | None | Verdict:
    """1.0 or 0.0 where that is seen without computer algebra; None when the reference cannot be read.

    NEEDS_JUDGE where `judge(answer, reference)` must decide.
    """
    try:
        return _score(answer, reference, _put_off)
    except _NeedsJudge:
        return NEEDS_JUDGE


def judge(answer: str, reference: str) -> float | None:
    """1.0 or 0.0; None when the reference cannot be read. It may take long: the caller limits time and memory."""
    return _score(answer, reference, _decide)


def check_reference(reference: str) -> str | None:
    """Why no answer could equal this reference; None for one that can be read. Cheap for numbers and words."""
    text = normal(reference)
    if not text:
        return "the reference is blank"
    try:
        for part in _expressions(read(text)):
            expression.tree(part)
    except (ValueError, RecursionError) as error:
        return f"the reference {reference!r} has none of the listed answer forms: {error}"
    return None


def spelling(answer: str) -> Hashable:
    """Equal for answers that are read as the same number, list or text. For majority votes."""
    text = normal(answer[:MAX_ANSWER])
    try:
        form = read(text) if not expression.too_large(text, "") else Words(text)
    except ValueError:
        return Words(text)
    return form.sides[0] if isinstance(form, Equation) and form.name and len(form.sides) == 1 else form


# The forms of an answer.


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


# Reading.

_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?P<money>[$€£¥₹]?) ?(?:"
    rf"(?:(?P<whole>{_WHOLE})(?: |(?=\\)))?(?:\\frac\{{(?P<over>-?{_WHOLE})\}}\{{(?P<under>[1-9]\d*)\}}"
    rf"|(?P<above>{_WHOLE}) ?/ ?(?P<below>[1-9]\d*))"
    rf"|(?P<decimal>{_WHOLE}(?:\.\d*)?|\.\d+)(?:\\overline\{{(?P<period>\d+)\}})?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,4})(?!\d)| ?\\(?:times|cdot) ?10\^\{(?P<power>-?\d{1,4})\})?"
    r"|10\^\{(?P<ten>-?\d{1,4})\})(?![\d.,]*\d)",
    re.ASCII,
)
_NAME = re.compile(expression.NAME, re.ASCII)
_BARS = re.compile(rf"\|{expression.NAME}\|", re.ASCII)
_FUNCTION = re.compile(r"[A-Za-z]\([A-Za-z]\)")
_LITERAL = re.compile(r"[0-9A-F]+_\{\d\d?\}|\d+(?: ?: ?\d+)+(?: ?[ap]\.?m)?", re.ASCII)
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
    if form := _read_list(text) or _read_relation(text) or _read_brackets(text):
        return form
    if matrix := _MATRIX.fullmatch(text):
        rows = [[read(cell.strip()) for cell in row.split("&")] for row in matrix[2].split("\\\\")]
        return Group("matrix", tuple(Group("row", tuple(row)) for row in rows))
    if text == r"\mathbb{R}":
        return Group("()", (Expression(r"-\infty"), Expression(r"\infty")))
    unit = _UNIT.fullmatch(text)
    name = unit_of(unit[2]) if unit else None
    if unit and name:
        text = unit[1]
    expression.latex(text)
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
    if not separators and text.count(r"\pm") == 1:
        parts = [re.sub(r"\\pm ?", sign, text) for sign in "+-"]
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
        sides, closed = ([r"-\infty", *sides], [False, *closed]) if named[0] else ([*sides, r"\infty"], [*closed, False])
    if len(sides) != 3 or sum(named) != 1 or not _NAME.fullmatch(sides[1]):
        raise ValueError(f"{text!r} is no inequality of the listed forms")
    if not (set(relations) <= {">", r"\ge"} or set(relations) <= {"<", r"\le"}):
        raise ValueError(f"{text!r} is no relation of the listed forms")
    return Equation(sides[1], (Group("(["[closed[0]] + ")]"[closed[1]], (read(sides[0]), read(sides[2]))),))


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


# Comparing. `Decide` says whether two expressions are equal, or, for equations, whether one is a multiple of the other.

Decide = Callable[[str, str, bool], bool]


class _NeedsJudge(Exception):
    pass


class _UnreadableReference(Exception):
    pass


def _put_off(given: str, expected: str, equation: bool) -> bool:
    raise _NeedsJudge


def _decide(given: str, expected: str, equation: bool) -> bool:
    try:
        undone = expression.is_calculation(expected)
    except ValueError as error:
        raise _UnreadableReference from error
    try:
        if equation:
            return expression.is_multiple(given, expected)
        return (undone or not expression.is_calculation(given)) and expression.is_equal(given, expected)
    except ValueError:
        return False


def _score(answer: str, reference: str, decide: Decide) -> float | None:
    if len(answer) > MAX_ANSWER + len(reference):
        return 0.0
    given, expected = normal(answer), normal(reference)
    if given == expected:
        return 1.0 if expected else None
    try:
        expected_form = read(expected)
    except (ValueError, RecursionError):
        return None
    if expression.too_large(given, expected):
        return 0.0
    try:
        return float(_same(read(given), expected_form, decide))
    except ValueError:
        return 0.0
    except _UnreadableReference:
        return None


def _same(given: Form, expected: Form, decide: Decide) -> bool:
    if isinstance(expected, Equation):
        return _same_equation(given, expected, decide)
    if isinstance(given, Equation):
        # `x = 5` answers 5, and so does `5 = 5`; but `x = 2x + 1` must still be solved, and `f(x) = 5` too.
        unknown = _names(expected) | _names(Group("list", given.sides))
        named = given.name not in unknown and (bool(unknown) or not _FUNCTION.fullmatch(given.name))
        return named and all(_same(side, expected, decide) for side in given.sides)
    if isinstance(expected, Words):
        return isinstance(given, Words | Expression) and given.text.casefold() == expected.text.casefold()
    if isinstance(given, Words):
        return isinstance(expected, Expression) and given.text == expected.text
    if isinstance(expected, Group):
        return isinstance(given, Group) and given.kind == expected.kind and _same_items(given, expected, decide)
    if isinstance(given, Group) or (given.unit and expected.unit and given.unit != expected.unit):
        return False
    if isinstance(given, Number) and isinstance(expected, Number):
        # 50% is the number 50 as well as 0.5: problems ask for either.
        fractions = [form.value / 100 if form.percent else form.value for form in (given, expected)]
        return given.value == expected.value or (given.percent != expected.percent and fractions[0] == fractions[1])
    (one,), (other,) = _expressions(given), _expressions(expected)
    return one == other or decide(one, other, False)


def _same_items(given: Group, expected: Group, decide: Decide) -> bool:
    if len(given.items) != len(expected.items):
        return False
    if expected.kind not in ("list", "union"):
        return all(_same(one, other, decide) for one, other in zip(given.items, expected.items, strict=True))
    if len({item.name for item in given.items if isinstance(item, Equation)}) > 1 and not any(
        isinstance(item, Equation) for item in expected.items
    ):
        return False  # `a = 1, b = 2` for 1, 2
    left = list(expected.items)
    for one in given.items:
        match = next((other for other in left if _same(one, other, decide)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_equation(given: Form, expected: Equation, decide: Decide) -> bool:
    if expected.name and len(expected.sides) == 1:
        side = expected.sides[0]
        if not isinstance(given, Equation):
            return _same(given, side, decide)
        if given.name == expected.name and all(_same(one, side, decide) for one in given.sides):
            return True
        if not _names(side):
            return False  # `2x = 10` for `x = 5` must still be solved
    if not isinstance(given, Equation) or not given.difference or not expected.difference:
        return False
    return decide(given.difference, expected.difference, True)


def _names(form: Form) -> frozenset[str]:
    return frozenset().union(*(expression.names(text) for text in _expressions(form)))


def _expressions(form: Form) -> list[str]:
    """What the parser must read to compare a form with an expression."""
    if isinstance(form, Number):
        return [rf"{'-' * (form.value < 0)}\frac{{{abs(form.value.numerator)}}}{{{form.value.denominator}}}"]
    if isinstance(form, Expression):
        return [form.text]
    parts = form.items if isinstance(form, Group) else form.sides if isinstance(form, Equation) else ()
    return [text for part in parts for text in _expressions(part)]
