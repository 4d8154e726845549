r"""Expressions: which texts are one, and when two are equal.

`latex` checks in linear time that a text is a complete expression of the commands listed here, and rewrites it so that
math-verify's LaTeX parser has nothing to guess: each variable becomes a numbered symbol, each decimal a fraction.

`equal` compares what the parser makes of two texts. Rational values are compared exactly, other values to 50
significant digits; expressions with variables at a few points, which depend on the two texts. Nothing is expanded or
simplified, so the work is small. Still it should be done in a process that can be killed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sympy

# How large an answer may be, unless its reference is larger.
MAX_DEPTH, MAX_BARS, MAX_POWER_DIGITS, MAX_BRACKET_POWER = 8, 4, 50_000, 200

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega|Delta|Omega"
NAME = rf"(?:\\(?:{_GREEK})(?![A-Za-z])|[A-Za-z])(?:_\{{\w\w?\}})?"
_TOKEN = re.compile(
    rf"(?P<name>{NAME})|(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<constant>\\(?:pi|infty)(?![A-Za-z]))"
    r"|(?P<function>\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|ln|log|exp)(?![A-Za-z]))"
    r"|(?P<command>\\(?:frac|sqrt|binom)(?![A-Za-z]))|(?P<times>\\(?:cdot|times)(?![A-Za-z])|/)|(?P<plus>[+-])"
    r"|(?P<open>[({\[])|(?P<close>[)}\]])|(?P<bar>\|)|(?P<mark>[\^_])|(?P<factorial>!)|(?P<space> +)|(?P<other>.)",
    re.ASCII | re.DOTALL,
)
_CLOSES = {"(": ")", "{": "}", "[": "]"}
# `1/2x` is read as (1/2)x by some and as 1/(2x) by others, and `2\frac{1}{3}x` has two readings too.
_AMBIGUOUS = re.compile(r"/ ?(?:\d+|[A-Za-z]) ?(?=[A-Za-z({]|\\(?!cdot|times))|\d ?\\frac\{\d+\}\{\d+\}", re.ASCII)
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
    closing: list[str] = []  # the brackets that are still to come
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
            or (kind == "mark" and not ended and previous != "function")
            or (kind == "plus" and previous in ("plus", "times", "function"))
            or (kind == "number" and ended)
            or (kind == "factorial" and previous == "factorial")
            or (previous in ("command", "mark") and token not in "{[")
            or (token == "[" and previous != "command")
            or (kind == "close" and (not closing or closing.pop() != token))
        ):
            raise ValueError(f"{token!r} is out of place in {text!r}")
        if kind == "open":
            closing.append(_CLOSES.get(token, "|"))
        ended, previous = kind in ("name", "number", "constant", "close", "factorial"), kind
        written.append(_symbol(token) if kind == "name" else _exact(token) if kind == "number" else token)
    if closing or not ended:
        raise ValueError(f"{text!r} is not complete")
    return " ".join(written)


def _symbol(name: str) -> str:
    return "x_{" + "".join(f"{ord(char):03}" for char in name) + "}"


def _exact(number: str) -> str:
    whole, point, places = number.partition(".")
    return rf"(\frac{{{int(whole + places)}}}{{{10 ** len(places)}}})" if point else number


def too_large(answer: str, reference: str) -> bool:
    """Whether comparing could take long: a size of the answer exceeds its limit and the reference's size."""
    limits = (MAX_DEPTH, MAX_BARS, MAX_POWER_DIGITS, MAX_BRACKET_POWER, 0)
    sizes, allowed = _sizes(answer), _sizes(reference)
    return any(size > max(limit, other) for size, limit, other in zip(sizes, limits, allowed, strict=True))


# Towers of powers, powers and factorials of large numbers, binomials of what is not plain.
_TOWER = re.compile(r"\^\{[^{}]*(?:[^A-Za-z{}]\^|\^\{[^{}]*\^)|\d{5}!|[)}]!|\\binom(?!\{\w{1,4}\}\{\w{1,4}\})", re.ASCII)
_POWER = re.compile(r"([)}|]?) ?\^\{[^{}\d]{0,20}(\d+)", re.ASCII)


def _sizes(text: str) -> tuple[int, int, int, int, int]:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    longest = max(map(len, re.findall(r"\d+", text)), default=0)
    powers = [(bracket, min(int(number[:9]), 10**9)) for bracket, number in _POWER.findall(text)]
    brackets = [power for bracket, power in powers if bracket and power > 1]
    digits = longest * max((power for _, power in powers), default=0)
    return deepest, text.count("|"), digits, math.prod(brackets[:50]), len(_TOWER.findall(text)) + len(brackets) // 50


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
    """Whether the expression leaves a calculation with rational numbers undone, such as `5+5`, `2 \\cdot 3x`, `2^{10}`."""
    import sympy

    def plain(node: sympy.Basic) -> bool:
        return not node.free_symbols and isinstance(node, sympy.Expr) and bool(node.doit().is_Rational)

    for node in sympy.preorder_traversal(tree(text)):
        operands = [argument for argument in node.args if plain(argument)]
        if isinstance(node, sympy.Mul):
            # A division is a fraction, and -1 a sign.
            operands = [item for item in operands if item != -1 and not (item.is_Pow and item.args[1] == -1)]
        whole_power = isinstance(node, sympy.Pow) and len(operands) == 2 and node.args[1].is_Integer and node.args[1] != -1
        if whole_power or isinstance(node, sympy.factorial | sympy.Abs) and operands:
            return True
        if isinstance(node, sympy.Add | sympy.Mul) and len(operands) > 1:
            return True
    return False


DIGITS, POINTS = 50, 4


def equal(answer: str, reference: str) -> bool:
    """Whether two expressions have equal values, wherever they have values."""
    pairs = list(_values(answer, reference))
    return bool(pairs) and all(_same_value(given, expected) for given, expected in pairs)


def proportional(answer: str, reference: str) -> bool:
    """Whether one expression is a constant multiple of the other, so that both are zero at the same points."""
    ratios = [given / expected for given, expected in _values(answer, reference) if expected != 0]
    return len(ratios) > 1 and ratios[0] != 0 and all(_same_value(ratio, ratios[0]) for ratio in ratios)


def _values(*texts: str):
    """The values of the expressions at some points; without those where none of them has a value."""
    import sympy

    constants = {sympy.Symbol(_symbol("e")): sympy.E, sympy.Symbol(_symbol("i")): sympy.I}
    trees = [tree(text).subs(constants) for text in texts]
    variables = sorted(set().union(*(item.free_symbols for item in trees)), key=str)
    for point in range(POINTS if variables else 1):
        place = {}
        for variable in variables:
            digest = hashlib.sha256(repr((texts, point, str(variable))).encode()).digest()
            value = sympy.Rational(int.from_bytes(digest[:2]) + 20_000, 30_011)
            place[variable] = -value if (digest[2] + point) % 2 else value
        values = [item.subs(place).doit() for item in trees]
        values = [value if value.is_Rational else value.evalf(DIGITS + 10) for value in values]
        if any(value.is_finite for value in values):
            yield values


def _same_value(given: sympy.Expr, expected: sympy.Expr) -> bool:
    import sympy

    if given.is_Rational and expected.is_Rational or not (given.is_finite and expected.is_finite):
        return given == expected
    scale = max(abs(given), abs(expected))
    return bool(abs(given - expected) <= scale * sympy.Rational(1, 10**DIGITS))
