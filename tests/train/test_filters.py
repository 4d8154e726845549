# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Which texts the filters of rejection sampling let pass, in English and in Chinese."""

import math
import random

import pytest

from r1kernels.train import reject
from r1kernels.train.data import Problem
from r1kernels.train.recipe import Filters
from r1kernels.train.reject import loops

LIMITS = Filters()

ENGLISH = """\
Let me set up the equation. If Natalia sold 48 clips in April and half as many in May, then in May she sold 48 / 2 = 24.

The question asks for both months together, so I add them: 48 + 24 = 72.

Wait, let me check that "half as many" refers to April. It does. So $x = 72$, which is \\(\\frac{3}{2} \\cdot 48\\)."""
CHINESE = """\
我们先设小明有 x 个苹果。题目说小红的苹果是小明的两倍，所以小红有 2x 个。

两个人一共有 36 个苹果，因此 x + 2x = 36，也就是 3x = 36，解得 x = 12。

再检查一遍：12 + 24 = 36，正好等于题目给出的总数，所以答案是对的。"""
# A real way of models trained by rules alone: a thought that changes language half-way.
MIXED = """\
Let me think about the triangle. The two sides are equal, 所以底角相等，每个底角是 70 度。那么顶角就是 180 减去 140，
等于 40 度。Therefore the answer is 40."""


def fault(prompt: str, completion: str, kind: str, language: str, limits: Filters, *scored) -> str | None:
    problem = Problem("1", "a question", "72", kind, language)
    return reject.fault(reject.Sample(problem, prompt, completion, *scored), limits)


def why(thought: str, answer: str = "72", *, kind: str = "math", language: str = "en", **limits) -> str | None:
    """The filter that a completion in the format fails."""
    completion = f"<think>\n{thought}\n</think>\n<answer>{answer}</answer>"
    return fault("User: a question. Assistant:", completion, kind, language, Filters(**limits))


def test_a_good_thought_passes_every_filter():
    assert why(ENGLISH) is None and why(CHINESE, "12", language="zh") is None


def test_the_first_filter_that_fails_is_named():
    bad = f"{MIXED}\n```python\nprint(40)\n```"
    assert why(bad) == "mixed language"
    assert why(f"{bad}</think>") == "unreadable"
    assert fault("", bad, "math", "en", LIMITS, math.nan, False) == "unscorable"
    assert fault("", bad, "math", "en", LIMITS, 0.0, False) == "wrong"
    assert fault("", bad, "open", "en", LIMITS, math.nan, False) == "unfinished"
    assert fault("", f"<think>{bad}</think><answer>1</answer>", "math", "en", Filters(language=None)) == "code block"
    assert fault("", f"<think>{bad}</think><answer>1</answer>", "math", "en",
                 Filters(language=None, code_blocks=True)) is None


@pytest.mark.parametrize("completion", [
    "The answer is 72.",
    "<think>48 + 24</think> 72",
    "<think>48 + 24 <answer>72</answer>",
    "<think></think>\n<answer></answer>",
    "   \n ",
    "",
    "<think>48 + \ufffd\ufffd = 72</think>\n<answer>72</answer>",
    "<think>48 +\x00 24</think>\n<answer>72</answer>",
])
def test_unreadable(completion):
    assert fault("Assistant:", completion, "math", "en", LIMITS) == "unreadable"


def test_the_format_is_that_of_the_prompt_and_can_be_left_to_the_model():
    assert fault("Assistant: <think>", "48 + 24 = 72</think>\n<answer>72</answer>", "math", "en", LIMITS) is None
    assert fault("Assistant:", "The answer is 72.", "math", "en", LIMITS) == "unreadable"
    assert fault("Assistant:", "The answer is 72.", "math", "en", Filters(format=False)) is None


@pytest.mark.parametrize(("text", "language", "mixed"), [
    (MIXED, "en", True),
    (MIXED, "zh", True),
    (ENGLISH, "zh", True),
    (CHINESE, "en", True),
    ("5 + 7 = 12\n12 + 30 = 42", "en", False),
    ("5 + 7 = 12\n12 + 30 = 42", "zh", False),
    # A term or a name in another script is how people write.
    ("根据勾股定理（Pythagorean theorem），斜边的平方等于两条直角边的平方之和，所以斜边的长度是 5。", "zh", False),
    ("The city 北京 has a population of about twenty-two million people, which is more than that of any city in the "
     "country but Shanghai and Chongqing, so the answer is the third one on the list.", "en", False),
])
def test_mixed_language(text, language, mixed):
    assert (why(text, language=language) == "mixed language") is mixed


def test_a_long_paragraph_is_one_line_of_many_words():
    line = "First we note that the sum of the two numbers is even, and so both are odd or both are even. "
    loose = {"line_repeats": None}
    assert why(line * 5, **loose) is None
    assert why(line * 15, **loose) == "long paragraph"
    assert why((line + "\n") * 15, **loose) is None
    clause = "我们注意到两个数的和是偶数，因此它们同为奇数或者同为偶数。"
    assert why(clause * 5, language="zh", **loose) is None
    assert why(clause * 15, language="zh", **loose) == "long paragraph"
    assert why("x" * 10_000) == "long paragraph"  # no way around it without spaces
    assert why(line * 15, paragraph=None, **loose) is None


@pytest.mark.parametrize("block", [
    "```python\nprint(48 + 24)\n```",
    "So I run ```print(48 + 24)``` and get 72.",
    "~~~\n48 + 24\n~~~",
    "\\begin{verbatim}\n48 + 24\n\\end{verbatim}",
    "<code>48 + 24</code>",
])
def test_code_block(block):
    assert why(f"Let me compute it.\n{block}\nDone.") == "code block"


def test_inline_code_is_no_block_and_answers_to_coding_questions_are_code():
    assert why("Let `n` be the number of clips, and ~ means roughly.") is None
    solution = "```python\ndef add(a, b):\n    return a + b\n```"
    assert why("The sum of both.", solution) == "code block"
    assert why("The sum of both.", solution, kind="code") is None
    assert why(f"The sum of both.\n{solution}", solution, kind="code") == "code block"
    assert fault("", solution, "code", "en", Filters(format=False)) is None


@pytest.mark.parametrize("text", [
    "Let me check this again.\n" * 4,
    "48 + 24 = 72\n72 - 24 = 48\n" * 4,
    "\n".join(f"In case {n % 3}, the number of ways to choose the remaining items equals {n % 3} times ten."
              for n in range(12)),
])
def test_repetition(text):
    assert why(text) == "repetition" and why(text, line_repeats=None) is None


@pytest.mark.parametrize("text", [
    "4+5=9\n9+3=12\n12+7=19\n19+1=20",
    "0.3333333333333333 is about one third",
    "Wait, let me check.\n48 + 24 = 72.\nWait, let me check.\n72 / 3 = 24.\nWait, let me check.\nYes.",
    "| x | y |\n|---|---|\n| 1 | 1 |\n| 2 | 4 |\n| 3 | 9 |\n|---|---|\n---\n---\n---\n---",
    "\n".join(f"For n = {n}, the sum is {n * (n + 1) // 2}." for n in range(1, 12)),
    ENGLISH + "\n\n" + ENGLISH.split("\n\n")[1],
])
def test_no_repetition(text):
    assert why(text) is None


def test_a_loop_is_found_wherever_it_is_and_only_then():
    assert loops(list("xyabababq"), 3, 4) and not loops(list("xyababq"), 3, 4)
    assert not loops(list("abcdabcdabcd"), 3, 3) and loops(list("abcdabcdabcd"), 3, 4)
    assert not loops([], 2, 8) and not loops(["a"], 2, 8) and loops(["a", "a"], 2, 8)


def test_loops_are_those_of_the_plain_definition():
    rng = random.Random(0)
    for _ in range(300):
        items = [rng.choice("ab") for _ in range(rng.randint(0, 14))]
        repeats, longest = rng.randint(2, 4), rng.randint(1, 4)
        plain = any(
            items[start : start + period] * repeats == items[start : start + period * repeats]
            for period in range(1, longest + 1) for start in range(len(items) - period * repeats + 1)
        )
        assert loops(items, repeats, longest) == plain, (items, repeats, longest)


@pytest.mark.parametrize("text", ["a" * 10**6, "`" * 10**6, "a " * 300_000, "\n" * 10**6, "<think>" * 100_000,
                                  "\\begin{" * 100_000, "我" * 300_000, "$x" * 300_000, "\\" * 10**6])
def test_a_megabyte_is_filtered(text):
    """No filter may backtrack. A quadratic one would take hours here, and the suite would not end."""
    for limits in (Filters(format=False), Filters(format=False, language=None, paragraph=None, code_blocks=True)):
        fault("", text, "math", "en", limits)
