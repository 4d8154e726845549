r"""Strict answers to mathematical problems: whether an answer equals its reference.

An answer counts if it has one of the forms of docs/answers.md. Anything else is wrong: this module never guesses the
meaning of a text. `notation.normal` writes a text in one notation, `forms.read` says which form it has, and `_same`
compares two forms. The work is bounded for every text.
"""

import threading

from . import expression
from .forms import FUNCTION, Form, is_undone, names, read
from .notation import normal

# An answer may be this much longer than its reference.
MAX_ANSWER = 500
_UNREADABLE = (ValueError, ArithmeticError)
_LOCK = threading.Lock()  # mpmath is not safe in several threads


def grade(answer: str, reference: str) -> float | None:
    """1.0 for a right answer, else 0.0; None if the reference cannot be read."""
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
    text = normal(reference)
    try:
        with _LOCK:
            read(text)
    except _UNREADABLE as error:
        return f"the reference {reference!r} does not have a listed answer form: {error}"
    return None


def spelling(answer: str) -> str:
    """A key for majority votes: answers that differ only in notation have the same one."""
    return normal(answer[:MAX_ANSWER])


def _same(given: Form, expected: Form) -> bool:
    if expected.kind == "equation":
        return _same_equation(given, expected)
    if given.kind == "equation":
        # `x = 5` answers 5, and so does `5 = 5`; but `x = 2x + 1` must still be solved, and `f(x) = 5` too.
        unknown = names(expected, *given.items)
        if given.text in unknown or (not unknown and FUNCTION.fullmatch(given.text)):
            return False
        return all(_same(item, expected) for item in given.items)
    if given.items or expected.items:
        return given.kind == expected.kind and _same_items(given, expected)
    if "words" in (given.kind, expected.kind):
        return given.text.casefold() == expected.text.casefold()
    return _same_quantity(given, expected)


def _same_quantity(given: Form, expected: Form) -> bool:
    if is_undone(given, expected) or len({given.unit, expected.unit} - {"", "%"}) > 1:
        return False
    if expression.is_equal(given.text, expected.text):
        return True
    # 50% is the number 50 as well as 0.5: problems ask for either.
    shares = [rf"\frac{{{form.text}}}{{100}}" if form.unit == "%" else form.text for form in (given, expected)]
    return [given.unit, expected.unit].count("%") == 1 and expression.is_equal(*shares)


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
    if expected.text and len(expected.items) == 1:
        side = expected.items[0]
        if given.kind != "equation":
            return _same(given, side)
        if given.text == expected.text and all(_same(one, side) for one in given.items):
            return True
        if not names(side):
            return False  # `2x = 10` for `x = 5` must still be solved
    if not given.difference or not expected.difference:
        return False
    # One may have moved terms to the other side.
    same_sign = expression.is_equal(given.difference, expected.difference)
    return same_sign or expression.is_equal(f"-({given.difference})", expected.difference)
