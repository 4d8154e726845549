r"""Strict answers to mathematical problems: whether an answer equals its reference.

An answer counts if it has one of the forms of docs/answers.md. Anything else is wrong: this module never guesses the
meaning of a text. `notation.normal` writes a text in one notation, `read` says which `Form` it has, and `_same`
compares two forms. The work is bounded for every text.
"""

import itertools
import re
import threading
from collections.abc import Hashable
from dataclasses import dataclass

from . import expression
from .expression import Expression
from .notation import normal, unit_of

# An answer may be this much longer than its reference. Longer references are not read.
MAX_ANSWER, MAX_REFERENCE = 500, 2000
_UNREADABLE = (ValueError, ArithmeticError)
_LOCK = threading.Lock()  # mpmath is not safe in several threads


@dataclass(frozen=True)
class Form:
    """What an answer is. There are these kinds:

    number, expression: perhaps with a unit ("%" is a unit).
    words: a text that must be equal, except for capitals: words, a number in another base, a ratio, a time, infinity.
    equation: `name = item`, `name = item = item` and so on. An inequality is `name = interval`.
    list, union, matrix, row, or a pair of brackets: several items. Those of a list or union have no order.
    """

    kind: str
    text: str = ""  # the number, expression or words; the name of an equation
    items: tuple["Form", ...] = ()
    unit: str = ""
    difference: str = ""  # `left - (right)`, for an equation with these two sides


_INTERVALS = ("()", "(]", "[)", "[]")
_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0)"
# The numbers that leave nothing to calculate: perhaps mixed, scientific, or with commas between thousands.
_NUMBER = re.compile(
    rf"(?:(?:{_WHOLE} ?(?=\\))?\\frac\{{-?{_WHOLE}\}}\{{{_WHOLE}\}}|(?:{_WHOLE} )?{_WHOLE} ?/ ?{_WHOLE}"
    rf"|10\^\{{-?\d+\}}|(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+| ?\\cdot ?10\^\{{-?\d+\}})?)(?![\d.,]*\d)",
    re.ASCII,
)
_MIXED = re.compile(r"(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+) ?/ ?(\d+))", re.ASCII)
_MONEY = re.compile(r"([+-]?) ?([$€£¥₹]?) ?(.*)")
_UNIT = re.compile(r'(.*?[^ ]) ?((?:"[^"]*"|(?<=[ })])[A-Za-z]{2,})(?: ?\^\{[23]\})?)')
_NAME = re.compile(expression.NAME, re.ASCII)
_BARS = re.compile(rf"\|{expression.NAME}\|", re.ASCII)
_FUNCTION = re.compile(r"[A-Za-z]\([A-Za-z]\)")  # as the name of an equation
_LITERAL = re.compile(r"[0-9A-F]+_\{\d\d?\}|\d+(?: ?: ?\d+)+(?: ?[ap]\.?m)?|-? ?\\infty", re.ASCII)
_WORDS = re.compile(r"\(?[^\W\d_]+(?:[ '-]+[^\W\d_]+)*\)?")
_LONG_WORD = re.compile(r"[^\W\d_]{3}|[^\x00-\x7f]|^no$", re.IGNORECASE)
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}")
# What is between the parts of a list or union, and the sides of a relation. A comma may also be between thousands.
_SEPARATOR, _UNION = r",?(?: or | and )|(?<!\d),|,(?!\d{3}(?!\d))|;", r"\\cup(?![A-Za-z])"
_RELATION = r":=|=|<|>|\\(?:le|ge|ne|in)(?![A-Za-z])"


def grade(answer: str, reference: str) -> float | None:
    """1.0 for a right answer, else 0.0; None if the reference cannot be read."""
    if len(reference) > MAX_REFERENCE:
        return 1.0 if answer == reference else None
    if len(answer) > MAX_ANSWER + len(reference):
        return 0.0
    given, expected = normal(answer), normal(reference)
    if given == expected:
        return 1.0 if expected else None
    with _LOCK:
        try:
            expected_form = read(expected)
        except _UNREADABLE:
            return None
        try:
            return float(_same(read(given), expected_form))
        except _UNREADABLE:
            return 0.0


def check_reference(reference: str) -> str | None:
    """Why only the same text could equal this reference; None if the reference can be read."""
    if any("\ud800" <= char <= "\udfff" for char in reference):
        return f"the reference {reference!r} holds half of a character (a lone surrogate)"
    if len(reference) > MAX_REFERENCE:
        return f"the reference {reference!r:.60} is longer than {MAX_REFERENCE} characters"
    text = normal(reference)
    try:
        with _LOCK:
            read(text)
    except _UNREADABLE as error:
        return f"the reference {reference!r} does not have a listed answer form: {error}"
    return None


def spelling(answer: str) -> Hashable:
    """A key for majority votes: it is equal for answers that are read as the same number or text."""
    text = normal(answer[:MAX_ANSWER])
    try:
        with _LOCK:
            form = read(text)
            return Expression(form.text).value if form.kind == "number" else form
    except _UNREADABLE:
        return text


def read(text: str) -> Form:
    """The form of a text in `normal` notation. Any other text raises ValueError or ArithmeticError."""
    words = " ".join(text.replace('"', " ").split())
    if _LITERAL.fullmatch(text):
        return Form("words", text.replace(" ", ""))
    if _WORDS.fullmatch(words) and ('"' in text or _LONG_WORD.search(words)):
        return Form("words", words.strip("()").casefold())
    if form := _read_list(text) or _read_relation(text):
        return form
    if text.count(r"\pm") == 1 and not text.startswith(r"\{"):
        return Form("list", items=tuple(read(re.sub(r"\\pm ?", sign, text)) for sign in "+-"))
    if form := _read_brackets(text):
        return form
    if matrix := _MATRIX.fullmatch(text):
        rows = [tuple(read(cell.strip()) for cell in row.split("&")) for row in matrix[2].split("\\\\")]
        return Form("matrix", items=tuple(Form("row", items=row) for row in rows))
    return _read_quantity(text)


def _read_quantity(text: str) -> Form:
    """A number or another expression, perhaps with a unit."""
    sign, currency, amount = _MONEY.fullmatch(text).groups()
    currency, number = unit_of(currency), _NUMBER.match(amount)
    unit = unit_of(amount[number.end() :]) if number else None
    # `5m` may be a product, so that a unit of one letter needs a space.
    if unit is not None and not re.fullmatch("[A-Za-z]", amount[number.end() :]) and unit in ("", currency or unit):
        kind, text, unit = "number", sign + _plain(number[0]), unit or currency
    else:
        parts = _UNIT.fullmatch(text)
        unit = unit_of(parts[2]) if parts else ""
        kind, text, unit = "expression", parts[1] if unit else text, unit or ""
    Expression(text)  # raises an error for what is no expression
    return Form(kind, text, unit=unit)


def _plain(number: str) -> str:
    r"""A number as an expression: `1,234` becomes `1234`, `1e3` becomes `1\cdot 10^{3}`, `1 1/2` becomes `(1+1/2)`."""
    number = re.sub(r"[eE]\+?(-?\d+)", r"\\cdot 10^{\1}", number.replace(",", ""))
    if mixed := _MIXED.fullmatch(number):
        whole, over, under = filter(None, mixed.groups())
        if int(over) >= int(under):
            raise ValueError(f"{number!r} has a fraction that is not between 0 and 1")
        return rf"({whole}+\frac{{{over}}}{{{under}}})"
    return number


def _split(text: str, separator: str) -> tuple[list[str], list[str]]:
    """The parts of the text between separators outside all brackets, and these separators."""
    parts, found, start, depth = [], [], 0, 0
    for match in re.finditer(rf"[()\[\]{{}}]|{separator}", text, re.ASCII):
        depth += (match[0] in ("(", "[", "{")) - (match[0] in (")", "]", "}"))
        if depth > expression.DEPTH:
            raise ValueError(f"it has more than {expression.DEPTH} brackets in brackets")
        if depth == 0 and match[0] not in (")", "]", "}"):
            parts.append(text[start : match.start()].strip())
            found.append(match[0].strip())
            start = match.end()
    return [*parts, text[start:].strip()], found


def _read_list(text: str) -> Form | None:
    parts, separators = _split(text, _SEPARATOR)
    if not separators:
        return None
    items: list[Form] = []
    for part in parts:
        form = read(part)
        # `1 \pm 2` within a list is two of its items, but a set is one.
        several = form.kind == "list" and part[:2] != r"\{"
        items += form.items if several else [form]
    ranges = [item for item in items if item.kind == "equation" and item.items[0].kind in _INTERVALS]
    if len(ranges) == len(items) and set(separators) == {"or"} and len({item.text for item in ranges}) == 1:
        return Form("equation", ranges[0].text, (Form("union", items=tuple(item.items[0] for item in ranges)),))
    return Form("list", items=tuple(items))


def _read_relation(text: str) -> Form | None:
    sides, relations = _split(text, _RELATION)
    if not relations:
        return None
    named = [bool(_NAME.fullmatch(side)) and side not in ("e", "i") for side in sides]
    if set(relations) <= {"=", ":="}:
        if len(sides) == 2 and _BARS.fullmatch(sides[0]):
            return read(rf"\pm {sides[1]}")
        named[0] |= not any(named) and bool(_FUNCTION.fullmatch(sides[0]))
        difference = f"{sides[0]}-({sides[1]})" if len(sides) == 2 else ""
        name = sides.pop(named.index(True)) if any(named) else ""
        return Form("equation", name, tuple(map(read, sides)), difference=difference)
    if relations == [r"\in"] and named[0]:
        return Form("equation", sides[0], (read(sides[1]),))
    if set(relations) <= {">", r"\ge"}:
        sides, relations, named = sides[::-1], [{">": "<"}.get(one, r"\le") for one in relations[::-1]], named[::-1]
    if len(sides) == 2:
        place, end = (0, r"-\infty") if named[0] else (2, r"\infty")
        sides.insert(place, end)
        relations.insert(place, "<")
    if not set(relations) <= {"<", r"\le"} or len(sides) != 3 or sum(named) != 1 or not _NAME.fullmatch(sides[1]):
        raise ValueError(f"{text!r} is not a relation of the listed forms")
    kind = "(["[relations[0] == r"\le"] + ")]"[relations[1] == r"\le"]
    return Form("equation", sides[1], (Form(kind, items=(read(sides[0]), read(sides[2]))),))


def _read_brackets(text: str) -> Form | None:
    """A union, a set, a tuple, an interval, or a form with brackets around it."""
    parts, unions = _split(text, _UNION)
    if unions:
        return Form("union", items=tuple(map(read, parts)))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _read_list(text[2:-2]) or read(text[2:-2])
    kind = text[:1] + text[-1:]
    if kind not in ("{}", *_INTERVALS) or not _is_one_bracket(text):
        return None
    inner, commas = _split(text[1:-1], ",")
    if commas and kind != "{}":
        return Form(kind, items=tuple(map(read, inner)))
    if commas or kind not in ("{}", "()"):
        raise ValueError(f"{text!r} is not a tuple or interval")
    return read(inner[0])


def _is_one_bracket(text: str) -> bool:
    depths = itertools.accumulate((char in "([{") - (char in ")]}") for char in text)
    return 0 not in list(depths)[:-1]


def _same(given: Form, expected: Form) -> bool:
    if expected.kind == "equation":
        return _same_equation(given, expected)
    if given.kind == "equation":
        # `x = 5` answers 5, and so does `5 = 5`; but `x = 2x + 1` must still be solved, and `f(x) = 5` too.
        unknown = _names(expected, *given.items)
        if given.text in unknown or (not unknown and _FUNCTION.fullmatch(given.text)):
            return False
        return all(_same(item, expected) for item in given.items)
    if given.items or expected.items:
        return given.kind == expected.kind and _same_items(given, expected)
    if "words" in (given.kind, expected.kind):
        return given.text.casefold() == expected.text.casefold()
    return _same_quantity(given, expected)


def _same_quantity(given: Form, expected: Form) -> bool:
    units = [given.unit, expected.unit]
    if len({*units} - {""}) > 1:
        return False
    equal = expression.is_equal(given.text, expected.text)
    if not equal and units.count("%") == 1:  # 50% is the number 50 as well as 0.5: problems ask for either
        shares = [rf"\frac{{{form.text}}}{{100}}" if form.unit == "%" else form.text for form in (given, expected)]
        equal = expression.is_equal(*shares)
    return equal and not _is_undone(given, expected)


def _same_items(given: Form, expected: Form) -> bool:
    if len(given.items) != len(expected.items):
        return False
    if expected.kind not in ("list", "union"):
        return all(map(_same, given.items, expected.items))
    named = {item.text for item in given.items if item.kind == "equation"}
    if len(named) > 1 and all(item.kind != "equation" for item in expected.items):
        return False  # `a = 1, b = 2` for 1, 2
    left = list(expected.items)
    for one in given.items:
        match = next((other for other in left if _same(one, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_equation(given: Form, expected: Form) -> bool:
    if given.kind != "equation":
        given = Form("equation", expected.text, (given,))  # 5 answers `x = 5`
    is_named = given.text == expected.text != "" and len(expected.items) == 1
    if is_named and all(_same(item, expected.items[0]) for item in given.items):
        return True
    # One may have moved terms to the other side. But `2x = 10` for `x = 5` must still be solved.
    if not given.difference or not expected.difference or not _names(*expected.items):
        return False
    return any(expression.is_equal(f"{sign}({given.difference})", expected.difference) for sign in "+-")


def _is_undone(given: Form, expected: Form) -> bool:
    """Whether a quantity leaves a calculation to do that the expected quantity does not leave too."""
    if expected.kind == "number":
        return given.kind != "number" and Expression(given.text).steps > 0
    return Expression(given.text).sums > 0 and not Expression(expected.text).sums


def _names(*forms: Form) -> set[str]:
    """The variables in forms."""
    found = set()
    for form in forms:
        found |= _names(*form.items) | (expression.names(form.text) if form.kind == "expression" else set())
    return found
