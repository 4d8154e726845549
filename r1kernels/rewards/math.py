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
import functools
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fractions import Fraction

from . import expression
from .notation import normal, unit_of

# An answer may be this much longer than its reference.
MAX_ANSWER = 500


class Verdict(enum.Enum):
    """What `settle` says where it has no number."""

    NEEDS_JUDGE = "needs judge"


NEEDS_JUDGE = Verdict.NEEDS_JUDGE


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
    """A closed form such as `2\\sqrt{3}`, or an expression with variables."""

    text: str
    unit: str = ""


@dataclass(frozen=True)
class Group:
    """Several forms. The kind is "list" or "union", which have no order, or "matrix", "row", or a pair of brackets."""

    kind: str
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Equation:
    """`name = side`, `name = side = side`, `side = side`; or an inequality, whose side is the interval it means."""

    name: str
    sides: tuple[Form, ...]
    # left - (right), where it has exactly these two sides.
    difference: str = ""


Form = Number | Words | Expression | Group | Equation

_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?P<money>[$€£¥₹]?) ?(?:"
    rf"(?:(?P<whole>{_WHOLE})(?: |(?=\\)))?(?:\\frac\{{(?P<over>-?{_WHOLE})\}}\{{(?P<under>[1-9]\d*)\}}"
    rf"|(?P<above>{_WHOLE}) ?/ ?(?P<below>[1-9]\d*))"
    rf"|(?P<decimal>(?:{_WHOLE}(?:\.\d*)?|\.\d+))(?:\\overline\{{(?P<period>\d+)\}})?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,4})(?!\d)| ?\\(?:times|cdot) ?10\^\{(?P<power>-?\d{1,4})\})?"
    r"|10\^\{(?P<ten>-?\d{1,4})\})(?![\d.,]*\d)",
    re.ASCII,
)
_NAME = re.compile(expression.NAME, re.ASCII)
_FUNCTION = re.compile(r"[A-Za-z]\((?:[A-Za-z])\)", re.ASCII)
_LITERAL = re.compile(r"[0-9A-F]+_\{\d\d?\}|\d+(?: ?: ?\d+)+(?: ?[ap]\.?m)?", re.ASCII)
_WORDS = re.compile(r"\(?[^\W\d_]+(?:[ '-]+[^\W\d_]+)*\)?")
_LONG_WORD = re.compile(r"[^\W\d_]{3}|[^\x00-\x7f]|^no$", re.IGNORECASE)
_SEPARATOR = re.compile(r",?(?: or | and )|(?<!\d),|,(?!\d{3}(?!\d))|;", re.ASCII)
_RELATION = re.compile(r":=|=|<|>|\\(?:le|ge|ne|in)(?![A-Za-z])")
_COMMA = re.compile(",")
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_UNIT = re.compile(r'(.*?[^ ]) ?((?:"[^"]*"|(?<=[ })])[A-Za-z]{2,})(?:\^\{[23]\})?)')
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}")


def settle(answer: str, reference: str) -> float | None | Verdict:
    """1.0 or 0.0 where that is seen without computer algebra; None when the reference cannot be read.

    NEEDS_JUDGE where `judge(answer, reference)` must decide.
    """
    if len(answer) > MAX_ANSWER + len(reference):
        return 0.0
    try:
        return float(_compare(answer, reference, _undecided))
    except _UnreadableReference:
        return None
    except _Undecided:
        return NEEDS_JUDGE


def judge(answer: str, reference: str) -> float | None:
    """1.0 or 0.0; None when the reference cannot be read. It may take long: the caller limits time and memory."""
    try:
        return float(_compare(answer, reference, _decided))
    except _UnreadableReference:
        return None


def check_reference(reference: str) -> str | None:
    """Why no answer could equal this reference; None for one that can be read. Cheap for numbers and words."""
    text = normal(reference)
    if not text:
        return "the reference is blank"
    try:
        for part in _expressions(read(text)):
            expression.tree(part)
    except ValueError as error:
        return f"the reference {reference!r} has none of the answer forms: {error}"
    return None


def spelling(answer: str) -> Hashable:
    """Equal for answers that are read as the same number, list or text. For majority votes."""
    text = normal(answer[:MAX_ANSWER])
    try:
        form = read(text)
    except ValueError:
        return text
    return form.sides[0] if isinstance(form, Equation) and form.name and len(form.sides) == 1 else form


class _UnreadableReference(Exception):
    pass


class _Undecided(Exception):
    pass


def _undecided(given: str, expected: str, equation: bool) -> bool:
    raise _Undecided


def _decided(given: str, expected: str, equation: bool) -> bool:
    try:
        expression.tree(expected)
        undone = expression.is_calculation(expected)
    except ValueError as error:
        raise _UnreadableReference from error
    try:
        if equation:
            return expression.proportional(given, expected)
        return (undone or not expression.is_calculation(given)) and expression.equal(given, expected)
    except ValueError:
        return False


Decide = Callable[[str, str, bool], bool]


def _compare(answer: str, reference: str, decide: Decide) -> bool:
    given, expected = normal(answer), normal(reference)
    if not expected:
        raise _UnreadableReference
    if given == expected:
        return True
    try:
        expected_form = read(expected)
    except (ValueError, RecursionError) as error:
        raise _UnreadableReference from error
    if expression.too_large(given, expected):
        return False
    try:
        return _same(read(given), expected_form, decide)
    except ValueError:
        return False


def _same(given: Form, expected: Form, decide: Decide) -> bool:
    if isinstance(expected, Equation):
        return _same_equation(given, expected, decide)
    if isinstance(given, Equation):
        # `x = 5` answers 5, and so does `5 = 5`; but `x = 2x + 1` is still to be solved.
        return given.name not in _names(expected) and all(_same(side, expected, decide) for side in given.sides)
    if isinstance(expected, Words):
        text = given.text if isinstance(given, Words | Expression) else ""
        return text.casefold() == expected.text.casefold()
    if isinstance(given, Words):
        return isinstance(expected, Expression) and given.text == expected.text
    if isinstance(expected, Group):
        return isinstance(given, Group) and given.kind == expected.kind and _same_items(given, expected, decide)
    if isinstance(given, Group) or (given.unit and expected.unit and given.unit != expected.unit):
        return False
    if isinstance(given, Number) and isinstance(expected, Number):
        # 50% is the number 50 as well as 0.5: problems ask for either.
        percents = given.value / (100 if given.percent else 1), expected.value / (100 if expected.percent else 1)
        return given.value == expected.value or (given.percent != expected.percent and percents[0] == percents[1])
    texts = _expressions(given)[0], _expressions(expected)[0]
    return texts[0] == texts[1] or decide(*texts, False)


def _same_items(given: Group, expected: Group, decide: Decide) -> bool:
    if len(given.items) != len(expected.items):
        return False
    if expected.kind not in ("list", "union"):
        return all(_same(one, other, decide) for one, other in zip(given.items, expected.items, strict=True))
    named = {item.name for item in given.items if isinstance(item, Equation)}
    if len(named) > 1 and not any(isinstance(item, Equation) for item in expected.items):
        return False
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
            return False  # `2x = 10` is still to be solved
    if not isinstance(given, Equation) or not given.difference or not expected.difference:
        return False
    return decide(given.difference, expected.difference, True)


def _names(form: Form) -> frozenset[str]:
    return frozenset().union(*(expression.names(text) for text in _expressions(form)))


def _expressions(form: Form) -> list[str]:
    """The texts that the parser has to read."""
    if isinstance(form, Number):
        return [rf"{'-' * (form.value < 0)}\frac{{{abs(form.value.numerator)}}}{{{form.value.denominator}}}"]
    if isinstance(form, Expression):
        return [form.text]
    parts = form.items if isinstance(form, Group) else form.sides if isinstance(form, Equation) else ()
    return [text for part in parts for text in _expressions(part)]


def read(text: str) -> Form:
    """The form of a text in `normal` notation; ValueError when it has none of the forms."""
    number = _read_number(text)
    if number:
        return number
    if _LITERAL.fullmatch(text):
        return Words(text.replace(" ", ""))
    words = " ".join(text.replace('"', " ").split())
    if _WORDS.fullmatch(words) and ('"' in text or _LONG_WORD.search(words)):
        return Words(words.strip("()"))
    for reader in (_read_list, _read_relation, _read_brackets):
        form = reader(text)
        if form:
            return form
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in matrix[2].split("\\\\")]
        return Group("matrix", tuple(Group("row", tuple(read(cell.strip()) for cell in row)) for row in rows))
    if text == r"\mathbb{R}":
        return Group("()", (Expression(r"-\infty"), Expression(r"\infty")))
    unit = _UNIT.fullmatch(text)
    if unit and unit_of(unit[2]):
        text, name = unit[1], unit_of(unit[2]) or ""
    else:
        name = ""
    expression.latex(text)
    return Expression(text, name)


def _read_number(text: str) -> Number | None:
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :].strip()
    percent = rest in ("%", "percent", '"percent"')
    unit = "" if percent else unit_of(rest)
    if unit is None or (rest[:1].isalpha() and len(rest) == 1 and rest.isascii() and text[match.end()] != " "):
        return None
    if match["money"]:
        unit = unit_of(match["money"]) if not unit else unit
    part = {name: (found or "").replace(",", "") for name, found in match.groupdict().items()}
    if part["over"] or part["above"]:
        value = Fraction(int(part["over"] or part["above"]), int(part["under"] or part["below"]))
        if part["whole"]:
            if not 0 < value < 1:
                return None
            value += int(part["whole"])
    elif part["ten"]:
        value = Fraction(10) ** int(part["ten"])
    else:
        value = Fraction(part["decimal"])
        if part["period"]:
            places = len(part["decimal"].partition(".")[2])
            value += Fraction(int(part["period"]), (10 ** len(part["period"]) - 1) * 10**places)
        value *= Fraction(10) ** int(part["exponent"] or part["power"] or 0)
    return Number(-value if part["sign"] == "-" else value, percent, unit or "")


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of the text between the separators outside of all brackets, and these separators."""
    parts, found, start, depth, position = [], [], 0, 0, 0
    while position < len(text):
        char = text[position]
        depth += (char in "([{") - (char in ")]}")
        match = separator.match(text, position) if depth == 0 else None
        if match:
            parts.append(text[start:position].strip())
            found.append(match[0].strip())
            start = position = match.end()
        else:
            position += 1
    return [*parts, text[start:].strip()], found


def _read_list(text: str) -> Form | None:
    parts, separators = _split(text, _SEPARATOR)
    if len(parts) == 1 and text.count(r"\pm") == 1:
        parts = [re.sub(r"\\pm ?", sign, text) for sign in "+-"]
    if len(parts) == 1:
        return None
    items: list[Form] = []
    for part in parts:
        form = read(part)
        # `1 \pm 2` within a list is two of its items; a set is one.
        several = r"\pm" in part and isinstance(form, Group) and form.kind == "list" and part[:2] != r"\{"
        items += form.items if several else [form]
    ranges = [item for item in items if isinstance(item, Equation) and _is_interval(item.sides[0])]
    if len(ranges) == len(items) and set(separators) == {"or"} and len({item.name for item in ranges}) == 1:
        return Equation(ranges[0].name, (Group("union", tuple(item.sides[0] for item in ranges)),))
    return Group("list", tuple(items))


def _is_interval(form: Form) -> bool:
    return isinstance(form, Group) and form.kind in ("()", "(]", "[)", "[]") and len(form.items) == 2


def _read_relation(text: str) -> Form | None:
    sides, relations = _split(text, _RELATION)
    if not relations:
        return None
    variables = [place for place, side in enumerate(sides) if _NAME.fullmatch(side) and side not in ("e", "i")]
    if set(relations) <= {"=", ":="}:
        if len(sides) == 2 and re.fullmatch(rf"\|{expression.NAME}\|", sides[0], re.ASCII):
            return read(rf"\pm {sides[1]}")
        if not variables and _FUNCTION.fullmatch(sides[0]):
            variables = [0]
        name = sides[variables[0]] if variables else ""
        values = tuple(read(side) for place, side in enumerate(sides) if place not in variables[:1])
        return Equation(name, values, f"{sides[0]}-({sides[1]})" if len(sides) == 2 else "")
    if relations == [r"\in"] and variables[:1] == [0]:
        return Equation(sides[0], (read(sides[1]),))
    if set(relations) <= {">", r"\ge"}:
        sides.reverse()
        relations.reverse()
    elif not set(relations) <= {"<", r"\le"}:
        raise ValueError(f"{text!r} is no relation of the listed forms")
    closed = [relation in (r"\le", r"\ge") for relation in relations]
    if len(sides) == 2:
        first = bool(_NAME.fullmatch(sides[0]))
        sides.insert(0 if first else 2, r"-\infty" if first else r"\infty")
        closed.insert(0 if first else 1, False)
    if len(sides) != 3 or not _NAME.fullmatch(sides[1]):
        raise ValueError(f"{text!r} is no inequality of the listed forms")
    kind = "(["[closed[0]] + ")]"[closed[1]]
    return Equation(sides[1], (Group(kind, (read(sides[0]), read(sides[2]))),))


def _read_brackets(text: str) -> Form | None:
    """A union, a set, a tuple, an interval, or a form with one pair of brackets around it."""
    parts, _ = _split(text, _UNION)
    if len(parts) > 1:
        return Group("union", tuple(read(part) for part in parts))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _read_list(text[2:-2]) or read(text[2:-2])
    if text[:1] not in ("(", "[", "{") or text[-1:] not in (")", "]", "}") or not _is_one_bracket(text):
        return None
    inner, _ = _split(text[1:-1], _COMMA)
    kind = text[0] + text[-1]
    if kind in ("{}", "()") and len(inner) == 1:
        return read(inner[0])
    if kind not in ("()", "(]", "[)", "[]") or len(inner) == 1:
        raise ValueError(f"{text!r} is no tuple or interval")
    return Group(kind, tuple(read(part) for part in inner))


def _is_one_bracket(text: str) -> bool:
    depth = 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False
