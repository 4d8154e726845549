"""The judge of mathematical equality: math-verify, meant for a worker process.

The whole answer is parsed as one LaTeX expression. math-verify could also pick the last of many expressions
out of a text, but then an answer that lists every candidate would be right; and its reader of plain
expressions evaluates them as Python, which model text never is here.
"""

import functools
import logging

from math_verify import LatexExtractionConfig, parse, verify

_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]

# math-verify warns about every text it cannot parse, and about time limits being left to the caller.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


def judge(answer: str, reference: str) -> float:
    """1.0 when two LaTeX expressions are mathematically equal, else 0.0.

    It can take any time and memory: the caller limits both. (math-verify's own limit is a SIGALRM, works on
    a main thread only, and cannot interrupt a long integer power.)
    """
    expected, given = _parse(reference), _parse(answer)
    return float(verify(expected, given, timeout_seconds=None))


# The answers to one problem share its reference.
@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> list:
    return parse(f"\\boxed{{{text}}}", _LATEX, extraction_mode="first_match", parsing_timeout=None)


# The first expressions build tables and import half of sympy. A worker does that before it is ready, once for all the
# children it forks.
for _text in (r"\frac{1}{2}", r"\sqrt{2} + 1", r"x^2 - 2", r"(1, \pi)", r"\{1, 2\}", r"(-\infty, 3]"):
    judge(_text, "18")
