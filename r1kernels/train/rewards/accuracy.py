"""Accuracy: whether the final answer of a completion equals the reference.

Most answers are plain numbers or literally the reference, and are settled here with exact decimals. The rest
is mathematics that a model wrote, which can hang or exhaust any computer algebra system: it goes to
`math_judge`, in a worker process that can be killed. So do programs, to the judge that `code.triage` names.
"""

import importlib
import math
import re
from collections.abc import Callable

from .answers import MAX_ANSWER, braced, final_answer, is_prose, number_in_prose, plain_number, unwrap
from .base import Judgement, Outcome, Sample
from .choice import choice, chosen
from .effort import is_hopeless
from .exact import exact, normal
from .settings import ScoringConfig

MATH = "math_judge:judge"
# The `x = ` of an answer to what x is.
_NAMED = re.compile(r"^[A-Za-z]\s*=\s*(?=[^=]*$)")


def prepare_accuracy(settings: ScoringConfig) -> Callable[[Sample], Outcome]:
    """`triage` under these settings."""
    return lambda sample: triage(sample, settings)


def triage(sample: Sample, settings: ScoringConfig = ScoringConfig()) -> Outcome:  # noqa: B008
    """Settles a sample where that is cheap and safe, or names the judgement that does."""
    if sample.kind == "math":
        return _math(sample)
    if sample.kind == "choice":
        return choice(sample)
    if sample.kind == "exact":
        return exact(sample)
    if sample.kind == "code":
        # code.triage(sample, settings) returns a float, or Judgement("code_judge:judge", (...), timeout_s=...): with
        # the tests, and of the settings the sandbox and its limits, in its arguments.
        from . import code

        return code.triage(sample, settings)
    raise ValueError(f"a sample of kind {sample.kind!r} has no accuracy; it is for math, choice, exact and code")


def _math(sample: Sample) -> Outcome:
    """Settles a sample without any computer algebra, or leaves (answer, reference) to `math_judge.judge`.

    Returns 0.0 for a missing, ambiguous or absurdly long answer, and NaN when the reference is blank or the answer
    would take the judge longer than any limit (see `effort`).
    """
    reference = unwrap(sample.answer)
    if not reference:
        return math.nan
    answer = final_answer(sample.prompt, sample.completion)
    if answer is None or len(answer) > MAX_ANSWER + len(reference):
        return 0.0
    answer = unwrap(answer)
    if "=" not in reference:
        answer = _NAMED.sub("", answer)
    if answer == reference:
        return 1.0
    if not answer:
        return 0.0
    expected = plain_number(reference)
    if expected is None:
        return _judged(answer, reference)
    given = plain_number(answer)
    if given is None and is_prose(answer):
        given = number_in_prose(answer)
        if given is None:
            return 0.0
    if given is None:
        return _judged(answer, reference)
    if given[0] == expected[0]:
        return 1.0
    # 50% and 0.5 are the same number; only the judge knows when.
    return 0.0 if given[1] == expected[1] else _judged(answer, reference)


def spelling(sample: Sample) -> tuple[str, object] | None:
    """What the completion's final answer says, as far as that is seen without computer algebra; None without one.

    Equal answers need not have equal spellings; different ones have different ones.
    """
    if sample.kind == "choice":
        named = chosen(sample)
        return None if named is None else ("choice", named)
    answer = final_answer(sample.prompt, sample.completion)
    if answer is None:
        return None
    if sample.kind != "math":
        return "exact", normal(answer)
    if len(answer) > MAX_ANSWER:
        return "long", answer
    answer = _NAMED.sub("", unwrap(answer))
    number = plain_number(answer) or (is_prose(answer) and number_in_prose(answer))
    return ("number", number) if number else ("text", answer)


def _judged(answer: str, reference: str) -> Outcome:
    if braced(answer + "}", 0) != answer:
        return 0.0  # the judge would read it up to the brace that is too many
    return math.nan if is_hopeless(answer, reference) else Judgement(MATH, (answer, reference))


def accuracy(sample: Sample) -> float:
    """1.0 when the final answer equals the reference, else 0.0; NaN when the reference is blank.

    In the calling process and without a time limit, for texts you trust; `Scorer` is for what a model wrote.
    """
    settled = triage(sample)
    if not isinstance(settled, Judgement):
        return settled
    module, _, function = settled.judge.partition(":")
    judge = getattr(importlib.import_module(f".{module}", __package__), function)
    return float(judge(*settled.arguments))
