"""Accuracy: whether the final answer of a completion equals the reference.

Most answers are plain numbers or literally the reference, and are settled here with exact decimals. The rest
is mathematics that a model wrote, which can hang or exhaust any computer algebra system: it goes to
`math_judge`, in a worker process that can be killed.
"""

import math

from .answers import MAX_ANSWER, final_answer, is_prose, number_in_prose, plain_number, unwrap
from .base import Sample


def triage(sample: Sample) -> float | tuple[str, str]:
    """Settles a sample without any computer algebra, or returns (answer, reference) for `math_judge.judge`.

    Returns 0.0 for a missing, ambiguous or absurdly long answer, and NaN when the reference is blank.
    """
    reference = unwrap(sample.answer)
    if not reference:
        return math.nan
    answer = final_answer(sample.prompt, sample.completion)
    if answer is None or len(answer) > MAX_ANSWER:
        return 0.0
    answer = unwrap(answer)
    if answer == reference:
        return 1.0
    if not answer:
        return 0.0
    expected = plain_number(reference)
    if expected is None:
        return answer, reference
    given = plain_number(answer)
    if given is None and is_prose(answer):
        given = number_in_prose(answer)
        if given is None:
            return 0.0
    if given is None:
        return answer, reference
    if given[0] == expected[0]:
        return 1.0
    # 50% and 0.5 are the same number; only the judge knows when.
    return 0.0 if given[1] == expected[1] else (answer, reference)


def accuracy(sample: Sample) -> float:
    """1.0 when the final answer equals the reference, else 0.0; NaN when the reference is blank.

    In the calling process and without a time limit, for texts you trust; `Scorer` is for what a model wrote.
    """
    settled = triage(sample)
    if isinstance(settled, float):
        return settled
    from .math_judge import judge

    return judge(*settled)
