r"""Reads the forms of an answer to a mathematical problem. docs/answers.md lists them with examples.

`read` says which `Form` a text in `normal` notation has. A text in any other form raises ValueError or ArithmeticError.
"""

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction

from . import expression
from .notation import unit_of


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


INTERVALS = ("()", "(]", "[)", "[]")

_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?P<money>[$€£¥₹]?) ?(?:"
    rf"(?:(?P<whole>{_WHOLE})(?: |(?=\\)))?(?:\\frac\{{(?P<over>-?{_WHOLE})\}}\{{(?P<under>[1-9]\d*)\}}"
    rf"|(?P<above>{_WHOLE}) ?/ ?(?P<below>[1-9]\d*))"
    r"|10\^\{(?P<ten>-?\d{1,3})\}"
    rf"|(?P<decimal>{_WHOLE}(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3})(?!\d)| ?\\cdot ?10\^\{(?P<power>-?\d{1,3})\})?"
    r")(?![\d.,]*\d)",
    re.ASCII,
)
# Calculations: a sign, or a factor without a sign, beside a number or a bracket (for `\sqrt{324}` and `\log_{2}8` there
# is none); or a sign between two numbers, or a number in brackets (`\sqrt{6+6}`, but not `1+2x`, `2\cdot 3^x`, `\ln 2`)
_BESIDE = re.compile(r"[\d)}] ?[-+/^|(!\\]|\d ?[A-Za-z]|(?<=[^{(\[ ]) ?[-+/|] ?[\d(]|\\frac\{\\frac|\}\{\(?\\")
_BETWEEN = re.compile(
    r"(?<![\d.}_])(?<![A-Za-z] )[\d.]+ ?(?:[-+] ?[\d.]+(?![\d.]| ?[A-Za-z\\({^_])|\\cdot ?[\d.]+(?![\d.]| ?\^))"
    r"|(?<![A-Za-z} ])\([-+]?[\d.]+\)(?! ?\^)"
)
_SUBSCRIPT = re.compile(r"_\{\w+\}")
_NAME = re.compile(expression.NAME, re.ASCII)
_BARS = re.compile(rf"\|{expression.NAME}\|", re.ASCII)
FUNCTION = re.compile(r"[A-Za-z]\([A-Za-z]\)")  # as the name of an equation
_LITERAL = re.compile(r"[0-9A-F]+_\{\d\d?\}|\d+(?: ?: ?\d+)+(?: ?[ap]\.?m)?|-? ?\\infty", re.ASCII)
_WORDS = re.compile(r"\(?[^\W\d_]+(?:[ '-]+[^\W\d_]+)*\)?")
_LONG_WORD = re.compile(r"[^\W\d_]{3}|[^\x00-\x7f]|^no$", re.IGNORECASE)
_UNIT = re.compile(r'(.*?[^ ]) ?((?:"[^"]*"|(?<=[ })])[A-Za-z]{2,})(?: ?\^\{[23]\})?)')
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}")
_COMMA, _UNION = re.compile(","), re.compile(r"\\cup(?![A-Za-z])")
_SEPARATOR = re.compile(r",?(?: or | and )|(?<!\d),|,(?!\d{3}(?!\d))|;", re.ASCII)
_RELATION = re.compile(r":=|=|<|>|\\(?:le|ge|ne|in)(?![A-Za-z])")


def read(text: str) -> Form:
    words = " ".join(text.replace('"', " ").split())
    if number := _read_number(text):
        return number
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
    parts = _UNIT.fullmatch(text)
    unit = unit_of(parts[2]) if parts else ""
    text = parts[1] if parts and unit else text
    expression.is_equal(text, text)  # raises an error for what is no expression
    return Form("expression", text, unit=unit or "")


def _read_number(text: str) -> Form | None:
    match = _NUMBER.match(text)
    rest = text[match.end() :] if match else ""
    unit = unit_of(rest)
    # `5m` may be a product, so that a unit of one letter needs a space.
    if match is None or unit is None or (len(rest) == 1 and rest.isascii() and rest.isalpha()):
        return None
    part = {name: (found or "").replace(",", "") for name, found in match.groupdict().items()}
    value = Fraction(part["decimal"] or part["over"] or part["above"] or "1")
    if under := part["under"] or part["below"]:
        value /= int(under)
        if part["whole"] and not 0 < value < 1:
            return None
        value += int(part["whole"] or 0)
    value *= Fraction(10) ** sum(int(part[name] or 0) for name in ("exponent", "power", "ten"))
    currency = unit_of(part["money"])
    if currency and unit and unit != currency:
        return None  # `$18 apples`
    return Form("number", str(-value if part["sign"] == "-" else value), unit=unit or currency or "")


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of the text between separators outside all brackets, and these separators."""
    parts, found, start, depth, position = [], [], 0, 0, 0
    while position < len(text):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0 and (match := separator.match(text, position)):
            parts.append(text[start:position].strip())
            found.append(match[0].strip())
            start = position = match.end()
        else:
            position += 1
        if depth > expression.DEPTH:
            raise ValueError(f"it has more than {expression.DEPTH} brackets in brackets")
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
    ranges = [item for item in items if item.kind == "equation" and item.items[0].kind in INTERVALS]
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
        named[0] |= not any(named) and bool(FUNCTION.fullmatch(sides[0]))
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
    if kind not in ("{}", *INTERVALS) or not _is_one_bracket(text):
        return None
    inner, commas = _split(text[1:-1], _COMMA)
    if commas and kind != "{}":
        return Form(kind, items=tuple(map(read, inner)))
    if commas or kind not in ("{}", "()"):
        raise ValueError(f"{text!r} is not a tuple or interval")
    return read(inner[0])


def _is_one_bracket(text: str) -> bool:
    depths = itertools.accumulate((char in "([{") - (char in ")]}") for char in text)
    return 0 not in list(depths)[:-1]


def names(*forms: Form) -> set[str]:
    """The variables in forms."""
    found = set()
    for form in forms:
        found |= names(*form.items) | (expression.names(form.text) if form.kind == "expression" else set())
    return found


def is_undone(given: Form, expected: Form) -> bool:
    """Whether a quantity leaves a calculation to do that the expected quantity does not leave too."""
    if expected.kind == "number":
        return given.kind != "number" and bool(_BESIDE.search(_SUBSCRIPT.sub("", given.text)))
    return bool(_BETWEEN.search(given.text)) and not _BETWEEN.search(expected.text)
