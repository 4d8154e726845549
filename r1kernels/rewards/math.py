r"""Strict answers to mathematical problems: whether an answer equals its reference.

An answer counts when it has one of the forms of docs/answers.md. Anything else is wrong: nothing here guesses what a
text may mean. An answer is read in three steps:

1. `notation.normal` writes it in one notation.
2. `forms.read` classifies it: a `Number`, `Words`, an `Expression`, a `Group` (list, tuple ...) or an `Equation`.
3. `_same` compares two of these forms. Numbers are exact fractions.

`settle` does this in the calling process, in time linear in the text. Where expressions must be compared it returns
NEEDS_JUDGE. Then `judge` asks a computer algebra system, and should run in a process that can be killed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable

from . import expression
from .forms import Equation, Expression, Form, Group, Number, Words, expressions, is_function, names, read
from .notation import normal

# An answer may be this much longer than its reference.
MAX_ANSWER = 500


class Verdict(enum.Enum):
    """What `settle` says where it cannot say 1.0 or 0.0."""

    NEEDS_JUDGE = "needs judge"


NEEDS_JUDGE = Verdict.NEEDS_JUDGE


def settle(answer: str, reference: str) -> float | Verdict | None:
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
        form = read(text)
        for part in [] if isinstance(form, Number) else expressions(form):
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
    except (ValueError, TypeError, AttributeError, ArithmeticError, NotImplementedError, RecursionError):
        return False  # what the computer algebra system raises for an answer without a value


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
    except (ValueError, RecursionError):
        return 0.0
    except _UnreadableReference:
        return None


def _same(given: Form, expected: Form, decide: Decide) -> bool:
    if isinstance(expected, Equation):
        return _same_equation(given, expected, decide)
    if isinstance(given, Equation):
        # `x = 5` answers 5, and so does `5 = 5`; but `x = 2x + 1` must still be solved, and `f(x) = 5` too.
        unknown = names(expected) | names(Group("list", given.sides))
        named = given.name not in unknown and (bool(unknown) or not is_function(given.name))
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
    (one,), (other,) = expressions(given), expressions(expected)
    return one == other or decide(one, other, False)


def _same_items(given: Group, expected: Group, decide: Decide) -> bool:
    if len(given.items) != len(expected.items):
        return False
    if expected.kind not in ("list", "union"):
        return all(_same(one, other, decide) for one, other in zip(given.items, expected.items, strict=True))
    given_names, expected_names = (
        {item.name for item in group.items if isinstance(item, Equation)} for group in (given, expected)
    )
    if len(given_names) > 1 and not expected_names:
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
        if not names(side):
            return False  # `2x = 10` for `x = 5` must still be solved
    if not isinstance(given, Equation) or not given.difference or not expected.difference:
        return False
    return decide(given.difference, expected.difference, True)
