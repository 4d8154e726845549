r"""The judge of mathematical equality: math-verify, meant for a worker process.

The whole answer is parsed as one LaTeX expression. math-verify could also pick the last of many expressions
out of a text, but then an answer that lists every candidate would be right; and its reader of plain
expressions evaluates them as Python, which model text never is here.

Where one side is a plain decimal and the other an exact number, math-verify would round both to six places, so that
`0.0` would be any small number. Here the decimal is right when it is the number exactly (`0.0002` for
`\frac{1}{5000}`), or when it has at least six significant digits and is the number correctly rounded to what is written
(`0.333333` for `\frac{1}{3}`, not `0.333`): so never a zero for what is none.
"""

import functools
import logging
import math
from decimal import Decimal

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from .answers import plain_number

_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
# Significant digits that a rounded decimal must have, and those to which the exact number is computed.
_SIGNIFICANT, _DIGITS = 6, 120
# Decimal places of a float within a larger expression: its own precision.
_PLACES = 14

# math-verify warns about every text it cannot parse, and about time limits being left to the caller.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


def judge(answer: str, reference: str) -> float:
    """1.0 when two LaTeX expressions are mathematically equal, else 0.0; NaN where the reference is no expression.

    It can take any time and memory: the caller limits both. (math-verify's own limit is a SIGALRM, works on
    a main thread only, and cannot interrupt a long integer power.)
    """
    expected, given = _parse(reference), _parse(answer)
    if all(isinstance(item, str) for item in expected):
        return math.nan
    for text, parsed in ((answer, expected), (reference, given)):
        number = plain_number(text)
        if number is not None and "." in text.rstrip("."):
            exact = _value(parsed)
            if exact is not None:
                return float(_rounds_to(exact, *number))
    return float(verify(expected, given, float_rounding=_PLACES, timeout_seconds=None))


def _value(parsed: list) -> sympy.Expr | None:
    """The real number that an expression, or an equation `x = number`, is; None for anything else."""
    value = parsed[0] if parsed else None
    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol:
        value = value.rhs
    if not isinstance(value, sympy.Expr) or value.free_symbols:
        return None
    value = value.doit()
    return value if value.is_real else None


def _rounds_to(exact: sympy.Expr, number: Decimal, percent: bool) -> bool:
    shift = 2 if percent else 0
    written = sympy.Rational(str(number.scaleb(-shift)))
    value = exact.evalf(_DIGITS) if not exact.is_Rational else exact
    if exact.has(sympy.Float):
        return bool(abs(value - written) < sympy.Rational(1, 10**_PLACES)) and bool(value) == bool(written)
    if exact.is_Rational and value == written:
        return True
    _, digits, exponent = number.as_tuple()
    if len("".join(map(str, digits)).lstrip("0")) < _SIGNIFICANT:
        return False
    return bool(2 * abs(value - written) <= sympy.Rational(10) ** (exponent - shift))


# The answers to one problem share its reference.
@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> list:
    return parse(f"\\boxed{{{text}}}", _LATEX, extraction_mode="first_match", parsing_timeout=None)


# The first expressions build tables and import half of sympy. A worker does that before it is ready, once for all the
# children it forks.
for _text in (r"\frac{1}{2}", r"\sqrt{2} + 1", r"x^2 - 2", r"(1, \pi)", r"\{1, 2\}", r"(-\infty, 3]", "0.25"):
    judge(_text, "18")
