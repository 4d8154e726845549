r"""Expressions in LaTeX: reading them, and whether two are equal. All work is bounded, so that no text takes long.

An expression is computed while it is read. A rational value is an exact fraction. Any other value is a list of samples:
numbers of mpmath at a few points of the variables, each at two precisions. Texts that are no complete expression, are
undefined, too large, or have two readings (`1/2x`) raise ValueError or ArithmeticError.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

POINTS, DIGITS = 3, (60, 120)
# Limits: brackets in brackets, the cost of all tokens, the bits of a fraction, the exponent (of two) of another number,
# and the arguments of functions and factorials.
DEPTH, COST, BITS, EXPONENT, ARGUMENT, FACTORIAL = 8, 400, 20_000, 2**14, 10**6, 3000

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega|Delta|Omega"
NAME = rf"(?:\\(?:{_GREEK})(?![A-Za-z])|[A-Za-z])(?:_\{{\w\w?\}})?"
_NAME = re.compile(NAME, re.ASCII)
_NUMBER = re.compile(r"(?:0(?!\d)|[1-9]\d*)(?:\.\d+)?|\.\d+", re.ASCII)
_TOKEN = re.compile(rf"{NAME}|{_NUMBER.pattern}|\\[A-Za-z]+|[^ ]", re.ASCII)
# `1/2x` is read as (1/2)x by some and as 1/(2x) by others. `2\frac{1}{3}x`, `1/2/3`, `2^2^3` and `3!!` have two readings too.
_AMBIGUOUS = re.compile(
    r"/ ?(?:\d+|[A-Za-z]) ?(?=[A-Za-z({/]|\\(?!cdot))|\d ?\\frac\{\d+\}\{\d+\}|\^\{[^{}]*\} ?\^|! ?!", re.ASCII
)
_TRIGONOMETRIC = (r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc")
_FUNCTIONS = (*_TRIGONOMETRIC, r"\arcsin", r"\arccos", r"\arctan", r"\sinh", r"\cosh", r"\tanh", r"\ln", r"\log", r"\exp")
_COSTS = dict.fromkeys((*_FUNCTIONS, r"\sqrt", "^"), 20) | {"!": 100, r"\binom": 100}
_CLOSES = {"(": ")", "{": "}", "[": "]", "|": "|"}
# How tightly operators bind. Factors without a sign between them bind like \cdot.
SUM, PRODUCT, POWER = 1, 2, 3
_BINDING = {"+": SUM, "-": SUM, r"\cdot": PRODUCT, "/": PRODUCT, "^": POWER, "!": POWER}

Value = Any  # a Fraction, or a list of samples


def names(text: str) -> frozenset[str]:
    """The variables of an expression: its letters but e and i."""
    return frozenset(filter(_NAME.fullmatch, _TOKEN.findall(text))) - {"e", "i"}


def read(text: str) -> tuple[Value, bool]:
    """The value of an expression, and whether it leaves a calculation undone.

    That is a sum, product or power of rational numbers, or a factorial or absolute value of one.
    """
    reader = _Reader(text, "")
    return reader.value, reader.undone


def is_equal(*texts: str) -> bool:
    """Whether two expressions have equal values."""
    return _is_same(*(_Reader(text, repr(texts)).value for text in texts))


def is_multiple(*texts: str) -> bool:
    """Whether one expression is a constant times the other, so that both are zero at the same points."""
    one, other = (_samples(_Reader(text, repr(texts)).value) for text in texts)
    if _is_same(one, Fraction(0)) or _is_same(other, Fraction(0)):
        return False
    ratios = _compute(operator.truediv, one, other)
    return _is_same(ratios, ratios[: len(DIGITS)] * POINTS)


def _is_same(one: Value, other: Value) -> bool:
    """Whether two fractions are equal, or two lists of samples to 50 digits.

    A difference that is zero shrinks when the precision grows. Any other difference, however small, does not.
    """
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    tiny = _contexts()[1].mpf(10) ** -50
    distances = [(abs(a - b), max(abs(a), abs(b))) for a, b in zip(_samples(one), _samples(other), strict=True)]
    for (rough, rough_size), (fine, fine_size) in zip(distances[::2], distances[1::2], strict=True):
        shrinks = fine <= max(rough, rough_size * tiny) * tiny
        if not shrinks or (fine > fine_size * tiny and fine_size > rough_size * tiny):
            return False
    return True


class _Whole(Fraction):
    """A whole number that is written, not computed."""

    def __neg__(self) -> _Whole:
        return _Whole(-self.numerator)


class _Reader:
    """Reads an expression from left to right, by the precedence of its operators."""

    def __init__(self, text: str, seed: str):
        tokens = _TOKEN.findall(text)
        if sum(_COSTS.get(token, 1) for token in tokens) > COST or _AMBIGUOUS.search(text):
            raise ValueError(f"{text!r} is too long, or has two readings")
        self.seed, self.text, self.undone = seed, text, False
        self.left = ["", *reversed(tokens)]  # what is still to be read
        self.opened = [""]
        self.value = self.expression(0)
        self.expect("")

    def expect(self, token: str) -> None:
        if self.left[-1] != token:
            raise ValueError(f"{self.left[-1] or 'the end'!r} is out of place in {self.text!r}")
        self.left.pop()

    def expression(self, floor: int) -> Value:
        """An operand, and the operators after it that bind more tightly than the floor."""
        sign = self.left.pop() if floor == 0 and self.left[-1] in ("+", "-") else ""
        value = self.expression(SUM) if sign else self.operand()
        value = _compute(operator.neg, value) if sign == "-" else value
        while (binding := _BINDING.get(self.left[-1], PRODUCT * self.at_operand())) > floor:
            sign = self.left.pop() if self.left[-1] in _BINDING else r"\cdot"
            if sign == "!":
                value = self.applied(sign, value)
            else:
                value = self.applied(sign, value, self.bracket("{") if sign == "^" else self.expression(binding))
        return value

    def at_operand(self) -> bool:
        """Whether a factor follows that needs no sign before it: any but a number."""
        token = self.left[-1]
        if token == "|":
            return self.opened[-1] != "|"
        return bool(_NAME.fullmatch(token)) or (token[:1] in ("\\", "(", "{") and token not in _BINDING)

    def applied(self, sign: str, *values: Value) -> Value:
        """The result of an operator. Notes whether it is a calculation with rational numbers."""
        numbers = [_rational(value) for value in values]
        first, last = numbers[0], numbers[-1]
        if sign in ("+", "-", r"\cdot"):
            self.undone |= 0 in numbers or None not in numbers
        elif sign == "/":
            self.undone |= last is not None and not isinstance(values[1], _Whole)
        elif sign == "^":
            reciprocal = last == -1 and isinstance(values[0], _Whole)
            self.undone |= first is not None and _is_whole(values[1]) and not reciprocal
        else:
            self.undone |= first is not None
        return _OPERATIONS[sign](*values)

    def operand(self) -> Value:
        token = self.left[-1]
        if token and token in "({":
            return self.bracket(token)
        if token == "|":
            return self.applied("|", self.bracket("|"))
        self.left.pop()
        if _NUMBER.fullmatch(token):
            return _Whole(token) if token.isdecimal() else Fraction(token)
        if token == r"\pi" or _NAME.fullmatch(token):
            return self.named(token)
        if token in _FUNCTIONS:
            return self.function(token)
        if token == r"\sqrt":
            index = self.bracket("[") if self.left[-1] == "[" else Fraction(2)
            return _power(self.bracket("{"), _compute(operator.truediv, Fraction(1), index))
        if token == r"\frac":
            return self.applied("/", self.bracket("{"), self.bracket("{"))
        if token == r"\binom":
            return _call("binomial", self.bracket("{"), self.bracket("{"))
        raise ValueError(f"{token or 'the end'!r} is out of place in {self.text!r}")

    def bracket(self, opening: str) -> Value:
        self.expect(opening)
        self.opened.append(opening)
        if len(self.opened) > DEPTH + 1:
            raise ValueError(f"{self.text!r} has more than {DEPTH} brackets in brackets")
        value = self.expression(0)
        self.opened.pop()
        self.expect(_CLOSES[opening])
        return value

    def function(self, name: str) -> Value:
        r"""A function. An argument without brackets, as in `\sin 2x`, ends at a sign or at another function."""
        base, exponent = Fraction(10), Fraction(1)
        if name == r"\log" and self.left[-1] == "_":
            self.left.pop()
            base = self.bracket("{")
        if self.left[-1] == "^":
            self.left.pop()
            exponent = self.bracket("{")
        if exponent == -1 and name in _TRIGONOMETRIC:
            name, exponent = rf"\arc{name[1:]}", Fraction(1)
        if self.left[-1] in ("(", "{", "|"):
            argument = self.operand()
        else:
            argument = self.expression(PRODUCT) if self.left[-1] not in _FUNCTIONS else self.bracket("{")
            while self.at_operand() and self.left[-1] not in _FUNCTIONS:
                argument = _compute(operator.mul, argument, self.expression(PRODUCT))
        arguments = (argument, base) if name == r"\log" else (argument,)
        return _power(_call(name[1:].replace("arc", "a"), *arguments), exponent)

    def named(self, name: str) -> Value:
        """The samples of a constant, or of a variable. Its points depend on the seed."""
        contexts = _contexts()
        if name == "i":
            return [context.mpc(0, 1) for context in contexts]
        if name in ("e", r"\pi"):
            return [+(context.e if name == "e" else context.pi) for context in contexts]
        digests = [hashlib.sha256(f"{self.seed} {name} {point}".encode()).digest() for point in range(POINTS)]
        numerators = [(-1) ** digest[0] * (260_000 + int.from_bytes(digest[1:3], "big")) for digest in digests]
        return [context.mpf(numerators[index // 2]) / 300_007 for index, context in enumerate(contexts)]


# Computing with values


@functools.cache
def _contexts() -> list[Any]:
    """The context of mpmath for each sample. Its precision stays the same."""
    import mpmath

    contexts = [mpmath.MPContext() for _ in DIGITS]
    for context, digits in zip(contexts, DIGITS, strict=True):
        context.dps = digits
    return contexts * POINTS


def _compute(operation: Callable[..., Any], *values: Value) -> Value:
    """The operation on fractions if all values are fractions, else on their samples."""
    if all(isinstance(value, Fraction) for value in values):
        return _checked(operation(*values))
    return [_checked(operation(*numbers)) for numbers in zip(*map(_samples, values), strict=True)]


def _samples(value: Value) -> list[Any]:
    if isinstance(value, Fraction):
        return [context.mpf(value.numerator) / value.denominator for context in _contexts()]
    return value


def _size(number: Any) -> float:
    """The bits of a fraction, or of the exponent of another number. It is no number for infinity and NaN."""
    if isinstance(number, Fraction):
        return max(number.numerator.bit_length(), number.denominator.bit_length())
    return abs(number.context.mag(number)) if number else 0


def _checked(number: Any) -> Any:
    if _size(number) <= (BITS if isinstance(number, Fraction) else EXPONENT):
        return number
    raise ValueError("a value is undefined, or too large to compute")


def _is_whole(value: Value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1


def _rational(value: Value) -> Fraction | None:
    r"""The fraction that a value equals. Of samples, only simple fractions are seen, like that of \log_4 8."""
    if isinstance(value, Fraction):
        return value
    scaled, common = value[1] * 720_720, 720_720
    nearest = scaled.context.nint(scaled.real) if abs(scaled) < 10**20 else 0
    return Fraction(int(nearest), common) if abs(scaled - nearest) < 1e-40 else None


def _power(base: Value, exponent: Value) -> Value:
    """The principal value, but the real root of a negative number where there is one."""
    exact = isinstance(base, Fraction) and _is_whole(exponent)
    numbers = [(base, exponent)] if exact else zip(_samples(base), _samples(exponent), strict=True)
    if any((_size(number) + 1) * abs(power) > (BITS if exact else EXPONENT) for number, power in numbers):
        raise ValueError("a power is too large to compute")
    if _is_whole(exponent):
        return _compute(lambda number: number**exponent.numerator, base)
    has_real_root = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1

    def raised(number: Any, power: Any) -> Any:
        if has_real_root and not number.imag and number.real < 0:
            return (-1) ** exponent.numerator * (-number) ** power
        return number**power

    return _compute(raised, _samples(base), _samples(exponent))


def _call(name: str, *values: Value) -> Value:
    """A function of mpmath. Factorials and binomials of whole numbers are exact."""
    if name in ("factorial", "binomial") and all(map(_is_whole, values)):
        if not all(0 <= value <= FACTORIAL for value in values):
            raise ValueError(f"a {name} is undefined, or too large to compute")
        exact = math.factorial if name == "factorial" else math.comb
        return _compute(lambda *numbers: Fraction(exact(*map(int, numbers))), *values)
    values = tuple(map(_samples, values))
    if name not in ("ln", "log") and any(abs(number) > ARGUMENT for value in values for number in value):
        raise ValueError(f"an argument of {name} is too large to compute")
    return _compute(lambda *numbers: getattr(numbers[0].context, name)(*numbers), *values)


_OPERATIONS = {
    "+": functools.partial(_compute, operator.add),
    "-": functools.partial(_compute, operator.sub),
    r"\cdot": functools.partial(_compute, operator.mul),
    "/": functools.partial(_compute, operator.truediv),
    "|": functools.partial(_compute, abs),
    "!": functools.partial(_call, "factorial"),
    "^": _power,
}
