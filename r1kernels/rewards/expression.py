r"""Expressions: which texts are one, and when two are equal.

`latex` checks in linear time that a text is a complete expression of the commands listed here, and rewrites it so that
math-verify's LaTeX parser has nothing to guess: each variable becomes a numbered symbol, each decimal a fraction.

`is_equal` compares what the parser makes of two texts. Rational values are compared exactly, other values to 50
significant digits, and expressions with variables at a few points, which depend on the two texts. Nothing is expanded
or simplified, so the work is small. Still it should be done in a process that can be killed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sympy

DIGITS, POINTS = 50, 4
# How large an answer may be, unless its reference is larger: its brackets in brackets, its bars, the digits of a power,
# the product of all powers of brackets, its letters and numbers, and constructions whose size is not seen.
LIMITS = (8, 4, 50_000, 200, 80, 0)

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega|Delta|Omega"
NAME = rf"(?:\\(?:{_GREEK})(?![A-Za-z])|[A-Za-z])(?:_\{{\w\w?\}})?"
_FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|ln|log|exp)(?![A-Za-z])"
_TOKEN = re.compile(
    rf"(?P<name>{NAME})|(?P<number>(?:0(?!\d)|[1-9]\d*)(?:\.\d+)?|\.\d+)|(?P<constant>\\(?:pi|infty)(?![A-Za-z]))"
    rf"|(?P<function>{_FUNCTION})"
    r"|(?P<command>\\(?:frac|sqrt|binom)(?![A-Za-z]))|(?P<times>\\(?:cdot|times)(?![A-Za-z])|/)|(?P<plus>[+-])"
    r"|(?P<open>[({\[])|(?P<close>[)}\]])|(?P<bar>\|)|(?P<mark>[\^_])|(?P<factorial>!)|(?P<space> +)|(?P<other>.)",
    re.ASCII | re.DOTALL,
)
_CLOSES = {"(": ")", "{": "}", "[": "]", "|": "|"}
# `1/2x` is read as (1/2)x by some and as 1/(2x) by others. `2\frac{1}{3}x`, `1/2/3` and `2^2^3` have two readings too.
_AMBIGUOUS = re.compile(
    r"/ ?(?:\d+|[A-Za-z]) ?(?=[A-Za-z({/]|\\(?!cdot|times))|\d ?\\frac\{\d+\}\{\d+\}|\^\{[^{}]*\} ?\^", re.ASCII
)
_LOGARITHM = re.compile(r"\\log_\{(\w+)\} ?(\d+)", re.ASCII)


def names(text: str) -> frozenset[str]:
    """The variables of an expression: its letters but e and i."""
    return frozenset(match[0] for match in _TOKEN.finditer(text) if match["name"]) - {"e", "i"}


@functools.lru_cache(maxsize=4096)
def latex(text: str) -> str:
    """The text for the parser. ValueError when it is no complete expression of the listed commands."""
    if _AMBIGUOUS.search(text):
        raise ValueError(f"{text!r} has two readings; expected brackets that say which one is meant")
    written: list[str] = []
    closing: list[str] = []  # the brackets that must still come
    ended, previous = False, ""  # whether an operand ends here, and the kind of the last token
    for match in _TOKEN.finditer(_LOGARITHM.sub(r"\\log_{\1}{\2}", text)):
        kind, token = match.lastgroup or "", match[0]
        if kind == "space":
            continue
        if kind == "bar":
            kind = "close" if ended and closing[-1:] == ["|"] else "open"
        if (
            kind == "other"
            or (kind in ("times", "factorial", "close") and not ended)
            or (token == "^" and not ended and previous != "function")
            or (token == "_" and written[-1:] != [r"\log"])
            or (kind == "plus" and previous in ("plus", "times", "function"))
            or (kind == "number" and ended)
            or (kind == previous == "factorial")
            or (previous in ("command", "mark") and token not in "{[")
            or (token == "[" and previous != "command")
            or (kind == "close" and (not closing or closing.pop() != token))
        ):
            raise ValueError(f"{token!r} is out of place in {text!r}")
        if kind == "open":
            closing.append(_CLOSES[token])
        ended, previous = kind in ("name", "number", "constant", "close", "factorial"), kind
        if kind == "name":
            token = _symbol(token)
        elif kind == "number" and "." in token:
            token = rf"(\frac{{{int(token.replace('.', ''))}}}{{{10 ** len(token.partition('.')[2])}}})"
        written.append(token)
    if closing or not ended:
        raise ValueError(f"{text!r} is not complete")
    return " ".join(written)


def _symbol(name: str) -> str:
    return "x_{" + "".join(f"{ord(char):03}" for char in name) + "}"


# Towers of powers, factorials of large numbers, binomials of what is not plain, functions of functions.
_UNSEEN = re.compile(
    r"\^\{[^{}]*(?:[^A-Za-z{}]\^|\^\{[^{}]*\^)|\d{5}!|[)}|]!|\\binom(?!\{\w{1,4}\}\{\w{1,4}\})"
    rf"|{_FUNCTION}(?=[ ({{]*{_FUNCTION})",
    re.ASCII,
)
_POWER = re.compile(r"([)}|]?) ?\^\{[^{}\d]{0,20}(\d+)", re.ASCII)


def too_large(answer: str, reference: str) -> bool:
    """Whether comparing could take long: a size of the answer exceeds its limit and the reference's size."""
    return any(map(lambda size, limit, other: size > max(limit, other), _sizes(answer), LIMITS, _sizes(reference)))


def _sizes(text: str) -> tuple[int, ...]:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    powers = [(bracket, int(number[:9])) for bracket, number in _POWER.findall(text)]
    longest = max(map(len, re.findall(r"\d+", text)), default=0)
    digits = longest * max((power for _, power in powers), default=0)
    brackets = math.prod(power for bracket, power in powers[:20] if bracket and power)
    operands = len(re.findall(r"\\[A-Za-z]+|[A-Za-z]|\d+", text))
    return deepest, text.count("|"), digits, brackets, operands, len(_UNSEEN.findall(text))


@functools.lru_cache(maxsize=4096)
def tree(text: str) -> sympy.Expr:
    """What math-verify's parser makes of an expression, not evaluated. ValueError when it makes nothing of it."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    config = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
    written = latex(text)
    try:
        parsed = latex2sympy(written, normalization_config=None, conversion_config=config)
    except Exception as error:  # the parser raises exceptions of many classes
        raise ValueError(f"{text!r} cannot be parsed: {error}") from error
    if not isinstance(parsed, sympy.Expr):
        raise ValueError(f"{text!r} is no expression")
    return parsed


def is_calculation(text: str) -> bool:
    r"""Whether a calculation with rational numbers is left undone, such as `5+5`, `2 \cdot 3x`, `2^{10}` or `18+0x`."""
    import sympy

    def is_rational(node: sympy.Basic) -> bool:
        return isinstance(node, sympy.Expr) and not node.free_symbols and bool(node.doit().is_Rational)

    for node in sympy.preorder_traversal(tree(text)):
        numbers = [argument for argument in node.args if is_rational(argument)]
        if isinstance(node, sympy.Mul):
            # A division is a fraction, and -1 a sign.
            numbers = [item for item in numbers if item != -1 and not (item.is_Pow and item.args[1] == -1)]
        if isinstance(node, sympy.Add | sympy.Mul) and (len(numbers) > 1 or 0 in numbers):
            return True
        if isinstance(node, sympy.Pow) and len(numbers) == 2 and numbers[1].is_Integer:
            reciprocal = numbers[1] == -1 and numbers[0].is_Integer
            if not reciprocal:
                return True
        if isinstance(node, sympy.factorial | sympy.Abs) and numbers:
            return True
    return False


def is_equal(answer: str, reference: str) -> bool:
    """Whether two expressions have equal values wherever they have values."""
    pairs = list(_values(answer, reference))
    return bool(pairs) and all(_same_value(given, expected) for given, expected in pairs)


def is_multiple(answer: str, reference: str) -> bool:
    """Whether one expression is a constant multiple of the other, so that both are zero at the same points."""
    ratios = [given / expected for given, expected in _values(answer, reference) if expected != 0]
    return len(ratios) > 1 and ratios[0] != 0 and all(_same_value(ratio, ratios[0]) for ratio in ratios)


def _values(*texts: str) -> Iterator[list[sympy.Expr]]:
    """The values of the expressions at each point where one of them has a value."""
    import sympy

    constants = {sympy.Symbol(_symbol("e")): sympy.E, sympy.Symbol(_symbol("i")): sympy.I}
    trees = [tree(text).subs(constants) for text in texts]
    variables = sorted(set().union(*(item.free_symbols for item in trees)), key=str)
    for point in range(POINTS if variables else 1):
        place = {}
        for variable in variables:
            digest = hashlib.sha256(repr((texts, point, str(variable))).encode(errors="replace")).digest()
            value = sympy.Rational(int.from_bytes(digest[:2], "big") + 20_000, 30_011)
            place[variable] = -value if (digest[2] + point) % 2 else value
        values = [item.subs(place).doit() for item in trees]
        values = [value if value.is_Rational else value.evalf(DIGITS + 10) for value in values]
        if any(value.is_finite for value in values):
            yield values


def _same_value(given: sympy.Expr, expected: sympy.Expr) -> bool:
    import sympy

    if (given.is_Rational and expected.is_Rational) or not (given.is_finite and expected.is_finite):
        return given == expected
    difference, scale = abs(given - expected), max(abs(given), abs(expected))
    return bool(difference <= scale * sympy.Rational(1, 10**DIGITS))
