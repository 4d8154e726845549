r"""Reads expressions in LaTeX, and compares two of them. All work is bounded, so that no text takes long.

An expression is computed while it is read. A rational value is an exact fraction. Any other value is a list of samples:
numbers of mpmath at a few points of the variables, each at two precisions. A text that is not a complete expression, is
undefined or too large, or has two readings (`1/2x`) raises ValueError or ArithmeticError.
"""

import functools
import math
import operator
import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

POINTS, DIGITS = 3, (60, 120)
# Limits: brackets in brackets, the cost of all tokens, the bits of a fraction, the exponent (of two) of another number,
# and the arguments of functions and factorials.
DEPTH, COST, BITS, EXPONENT, ARGUMENT, FACTORIAL = 8, 400, 20_000, 2**21, 10**6, 3000

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega|Delta|Omega"
NAME = rf"(?:\\(?:{_GREEK})(?![A-Za-z])|[A-Za-z])(?:_\{{\w\w?\}})?"
_NAME = re.compile(NAME, re.ASCII)
_NUMBER = re.compile(r"(?:0(?!\d)|[1-9]\d*)(?:\.\d+)?|\.\d+", re.ASCII)
_TOKEN = re.compile(rf"{NAME}|{_NUMBER.pattern}|\\[A-Za-z]+|[^ ]", re.ASCII)
# `1/2x` is read as (1/2)x by some and as 1/(2x) by others. The others here have two readings too.
_AMBIGUOUS = re.compile(
    r"/ ?(?:\d+|[A-Za-z]) ?(?=[A-Za-z({/]|\\(?!cdot))|\d ?\\frac\{\d+\}\{\d+\}|\^\{[^{}]*\} ?\^|! ?!", re.ASCII
)
_INVERTIBLE = (r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc")
_FUNCTIONS = (*_INVERTIBLE, r"\arcsin", r"\arccos", r"\arctan", r"\sinh", r"\cosh", r"\tanh", r"\ln", r"\log", r"\exp")
_COSTS = dict.fromkeys((*_FUNCTIONS, r"\sqrt", "^"), 20) | {"!": 100, r"\binom": 140}
_CLOSES = {"(": ")", "{": "}", "[": "]"}
# How tightly operators bind. Factors without a sign between them bind like \cdot.
SUM, PRODUCT, POWER = 1, 2, 3
_BINDING = {"+": SUM, "-": SUM, r"\cdot": PRODUCT, "/": PRODUCT, "^": POWER, "!": POWER}
_OPERATORS = {"+": operator.add, "-": operator.sub, r"\cdot": operator.mul, "/": operator.truediv}

Value = Fraction | list[Any]


def names(text: str) -> set[str]:
    """The variables of an expression: its letters except e and i."""
    return set(filter(_NAME.fullmatch, _TOKEN.findall(text))) - {"e", "i"}


def is_equal(*texts: str) -> bool:
    """Whether two expressions have equal values: the same fraction, or samples that are equal to 50 digits.

    A difference that is zero shrinks when the precision grows. Any other difference, however small, does not.
    """
    one, other = (Expression(text, repr(texts)).value for text in texts)
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    tiny = _contexts()[1].mpf(10) ** -50
    distances = [(abs(a - b), max(abs(a), abs(b))) for a, b in zip(_samples(one), _samples(other), strict=True)]
    for (rough, rough_size), (fine, fine_size) in zip(distances[::2], distances[1::2], strict=True):
        shrinks = fine <= max(rough, rough_size * tiny) * tiny
        if not shrinks or (fine > fine_size * tiny and fine_size > rough_size * tiny):
            return False
    return True


class Expression:
    r"""An expression, read from left to right by the precedence of its operators.

    `sums` counts sums, differences and products of two fractions (`6+6`). `steps` counts what is left to calculate of a
    number: operators with a part that has no letters (`2\sqrt{3}`, `2^{3}`, but not `i^{2}`), and fractions without
    letters whose parts are not plain numbers.
    """

    text: str
    seed: str
    depth: int
    letters: int
    commands: int
    sums: int
    steps: int

    def __init__(self, text: str, seed: str = ""):
        tokens = _TOKEN.findall(text)
        if sum(_COSTS.get(token, 1) for token in tokens) > COST or _AMBIGUOUS.search(text):
            raise ValueError(f"{text!r} is too long, or has two readings")
        self.text, self.seed = text, seed
        self.left: list[str] = ["", *reversed(tokens)]  # tokens that are not read yet
        self.depth = self.letters = self.commands = self.sums = self.steps = 0
        self.value: Value = self.expression(0)
        self.expect("")

    def take(self, *tokens: str) -> str:
        """Reads the next token if it is one of these."""
        return self.left.pop() if self.left[-1] in tokens else ""

    def expect(self, *tokens: str) -> str:
        if self.left[-1] not in tokens:
            raise ValueError(f"{self.left[-1] or 'the end'!r} is out of place in {self.text!r}")
        return self.left.pop()

    def expression(self, floor: int) -> Value:
        """An operand, and the operators after it that bind more tightly than the floor."""
        start, sign = self.letters, self.take("+", "-") if floor == 0 else ""
        value = self.expression(SUM) if sign else self.operand()
        value = _compute(operator.neg, value) if sign == "-" else value
        while (binding := _BINDING.get(self.left[-1], PRODUCT * self.at_operand())) > floor:
            middle, sign = self.letters, self.take(*_BINDING) or r"\cdot"
            if sign == "^":
                value = _power(value, self.bracket("{"))
            elif sign == "!":
                value = _count(math.factorial, value)
            else:
                other = self.expression(binding)
                self.sums += sign != "/" and isinstance(value, Fraction) and isinstance(other, Fraction)
                value = _compute(_OPERATORS[sign], value, other)
            self.steps += middle == start or (self.letters == middle and sign not in ("^", "!"))
        return value

    def at_operand(self) -> bool:
        """Whether a factor follows that needs no sign before it: any factor except a number."""
        token = self.left[-1]
        return bool(_NAME.fullmatch(token)) or (token[:1] in ("\\", "(", "{") and token not in _BINDING)

    def operand(self) -> Value:
        token = self.left[-1]
        if token in ("(", "{"):
            return self.bracket(token)
        self.left.pop()
        if _NUMBER.fullmatch(token):
            return Fraction(token)
        if token == r"\pi" or _NAME.fullmatch(token):
            return self.named(token)
        start, before = self.letters, self.commands
        self.commands += 1
        if token in _FUNCTIONS:
            return self.function(token)
        if token == r"\sqrt":
            index = self.bracket("[") if self.left[-1] == "[" else Fraction(2)
            return _power(self.bracket("{"), _compute(operator.truediv, Fraction(1), index))
        if token in (r"\frac", r"\binom"):
            one, other = self.bracket("{"), self.bracket("{")
            self.steps += start == self.letters and self.commands > before + 1
            return _compute(operator.truediv, one, other) if token == r"\frac" else _count(math.comb, one, other)
        raise ValueError(f"{token or 'the end'!r} is out of place in {self.text!r}")

    def bracket(self, opening: str) -> Value:
        self.expect(opening)
        self.depth += 1
        if self.depth > DEPTH:
            raise ValueError(f"{self.text!r} has more than {DEPTH} brackets in brackets")
        value = self.expression(0)
        self.expect(_CLOSES[opening])
        self.depth -= 1
        return value

    def function(self, name: str) -> Value:
        r"""A function. An argument without brackets, as in `\sin 2x`, ends at a sign or at another function."""
        base = self.bracket("{") if name == r"\log" and self.take("_") else Fraction(10)
        exponent = self.bracket("{") if self.take("^") else Fraction(1)
        if exponent == -1 and name in _INVERTIBLE:
            name, exponent = rf"\arc{name[1:]}", Fraction(1)
        bracketed = self.left[-1] in ("(", "{")
        argument = self.operand() if bracketed else self.expression(PRODUCT)
        while not bracketed and self.at_operand() and self.left[-1] not in _FUNCTIONS:
            argument = _compute(operator.mul, argument, self.expression(PRODUCT))
        arguments = (argument, base) if name == r"\log" else (argument,)
        return _power(_call(name[1:].replace("arc", "a"), *arguments), exponent)

    def named(self, name: str) -> Value:
        """The samples of a constant, or of a variable. Its points depend on the seed."""
        self.letters += 1
        contexts = _contexts()
        if name in ("e", "i", r"\pi"):
            return [{"e": +context.e, "i": context.mpc(0, 1)}.get(name, +context.pi) for context in contexts]
        draw = random.Random(f"{self.seed} {name}")
        # All variables are positive at the first point, negative at the second, and small at the third.
        points = [draw.uniform(6, 25), -draw.uniform(6, 25), draw.choice((-1, 1)) * draw.uniform(0.6, 2.8)]
        return [context.mpf(point) for point in points for context in contexts[: len(DIGITS)]]


@functools.cache
def _contexts() -> list[Any]:
    """The context of mpmath for each sample. Its precision stays the same."""
    import mpmath

    contexts = [mpmath.MPContext() for _ in DIGITS]
    contexts[0].dps, contexts[1].dps = DIGITS
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
    """The bits of a fraction, or of the exponent of another number. For infinity and NaN it is not a number."""
    if isinstance(number, Fraction):
        return max(number.numerator.bit_length(), number.denominator.bit_length())
    return abs(number.context.mag(number)) if number else 0


def _checked(number: Any) -> Any:
    if _size(number) <= (BITS if isinstance(number, Fraction) else EXPONENT):
        return number
    raise ValueError("a value is undefined, or too large to compute")


def _is_whole(value: Value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1


def _power(base: Value, exponent: Value) -> Value:
    """The principal value; for a negative number, the real root if there is one."""
    if not (isinstance(base, Fraction) and _is_whole(exponent)):
        base = _samples(base)

    def raised(number: Any, to: Any) -> Any:
        if (_size(number) + 1) * abs(to) > (BITS if isinstance(number, Fraction) else EXPONENT):
            raise ValueError("a power is too large to compute")
        if _is_whole(exponent):
            return number**exponent.numerator
        if isinstance(exponent, Fraction) and exponent.denominator % 2 and not number.imag and number.real < 0:
            return (-1) ** exponent.numerator * (-number) ** to
        return number**to

    return _compute(raised, base, exponent)


def _count(function: Callable[..., int], *values: Value) -> Value:
    """A factorial, or a binomial coefficient, of whole numbers."""
    if not all(_is_whole(value) and 0 <= value <= FACTORIAL for value in values):
        raise ValueError(f"factorials and binomials are computed for whole numbers from 0 to {FACTORIAL}")
    return _checked(Fraction(function(*map(int, values))))


def _call(name: str, *values: Value) -> Value:
    """A function of mpmath."""
    if name not in ("ln", "log") and any(abs(number) > ARGUMENT for value in values for number in _samples(value)):
        raise ValueError(f"an argument of {name} is too large to compute")
    return _compute(lambda *numbers: getattr(numbers[0].context, name)(*numbers), *map(_samples, values))
