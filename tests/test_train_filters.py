# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Which texts the filters of rejection sampling let pass, in English and in Chinese."""

import dataclasses
import math
import random
import time

import pytest

from r1kernels.train.filters import (
    FILTERS,
    REASONS,
    FilterConfig,
    code_block,
    long_paragraph,
    loop,
    mixed_language,
    reject,
    repeated_share,
    repetition,
    unreadable,
)
from r1kernels.train.rewards import Sample

LIMITS = FilterConfig()

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


def sample(thought: str, answer: str = "72", *, kind: str = "math", language: str = "en") -> Sample:
    completion = f"<think>\n{thought}\n</think>\n<answer>{answer}</answer>"
    return Sample("User: a question. Assistant:", completion, answer, kind=kind, language=language)


def why(text: Sample, limits: FilterConfig = LIMITS, accuracy: float | None = 1.0, finished: bool = True) -> str | None:
    return reject(text, limits, accuracy=accuracy, finished=finished)


GOOD = {"en": sample(ENGLISH), "zh": sample(CHINESE, "12", language="zh")}


@pytest.mark.parametrize("language", GOOD)
def test_a_good_thought_passes_every_filter(language):
    assert [name for name, holds in FILTERS.items() if holds(GOOD[language], LIMITS)] == []
    assert why(GOOD[language]) is None


def test_reasons_come_in_their_order():
    bad = sample(f"{MIXED}\n```python\nprint(40)\n```")
    assert why(bad, accuracy=math.nan, finished=False) == "unscorable"
    assert why(bad, accuracy=0.0, finished=False) == "wrong"
    assert why(bad, accuracy=1.0, finished=False) == "unfinished"
    assert why(bad) == "mixed language"
    assert why(dataclasses.replace(bad, completion=bad.completion.replace("</think>", ""))) == "unreadable"
    assert why(bad, FilterConfig(language=None)) == "code block"
    assert why(bad, FilterConfig(language=None, code_blocks=True)) is None
    assert REASONS == ("unscorable", "wrong", "unfinished", "unreadable", "mixed language", "long paragraph",
                       "code block", "repetition", "duplicate", "surplus")


def test_without_an_answer_to_compare_the_other_filters_decide():
    assert why(GOOD["en"], accuracy=None) is None
    assert why(GOOD["en"], accuracy=None, finished=False) == "unfinished"
    assert why(sample(MIXED), accuracy=None) == "mixed language"


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
    assert unreadable(Sample("Assistant:", completion, "72"), LIMITS)


def test_the_format_is_that_of_the_prompt_and_can_be_left_to_the_model():
    opened = Sample("Assistant: <think>", "48 + 24 = 72</think>\n<answer>72</answer>", "72")
    assert not unreadable(opened, LIMITS)
    free = Sample("Assistant:", "The answer is 72.", "72")
    assert unreadable(free, LIMITS) and not unreadable(free, FilterConfig(format=False))


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
    assert mixed_language(sample(text, language=language), LIMITS) is mixed


def test_a_long_paragraph_is_one_line_of_many_words():
    line = "First we note that the sum of the two numbers is even, and so both are odd or both are even. "
    assert not long_paragraph(sample(line * 5), LIMITS)
    assert long_paragraph(sample(line * 15), LIMITS)
    assert not long_paragraph(sample((line + "\n") * 15), LIMITS)
    clause = "我们注意到两个数的和是偶数，因此它们同为奇数或者同为偶数。"
    assert not long_paragraph(sample(clause * 5, language="zh"), LIMITS)
    assert long_paragraph(sample(clause * 15, language="zh"), LIMITS)
    assert long_paragraph(sample("x" * 10_000), LIMITS)  # no way around it without spaces
    assert not long_paragraph(sample(line * 15), FilterConfig(paragraph=None))


@pytest.mark.parametrize("block", [
    "```python\nprint(48 + 24)\n```",
    "So I run ```print(48 + 24)``` and get 72.",
    "~~~\n48 + 24\n~~~",
    "\\begin{verbatim}\n48 + 24\n\\end{verbatim}",
    "<code>48 + 24</code>",
])
def test_code_block(block):
    assert code_block(sample(f"Let me compute it.\n{block}\nDone."), LIMITS)


def test_inline_code_is_no_block_and_answers_to_coding_questions_are_code():
    assert not code_block(sample("Let `n` be the number of clips, and ~ means roughly."), LIMITS)
    solution = "```python\ndef add(a, b):\n    return a + b\n```"
    assert code_block(sample("The sum of both.", solution), LIMITS)
    assert not code_block(sample("The sum of both.", solution, kind="code"), LIMITS)
    assert code_block(sample(f"The sum of both.\n{solution}", solution, kind="code"), LIMITS)


@pytest.mark.parametrize("text", [
    "Let me check this again.\n" * 4,
    "48 + 24 = 72\n72 - 24 = 48\n" * 4,
    "So the answer is 72. " + "I think that is right. " * 8,
    "所以答案是十二。" * 8,
    "The answer is " + "0 " * 40,
    "1/7 = 0." + "142857" * 200,
    # A text that says everything twice, a sentence apart.
    "\n".join(f"In case {n % 9}, the number of ways to choose the remaining items equals {n % 9} times ten."
              for n in range(30)),
])
def test_repetition(text):
    assert repetition(sample(text), LIMITS)


@pytest.mark.parametrize("text", [
    "4+5=9\n9+3=12\n12+7=19\n19+1=20",
    "0.3333333333333333 is about one third",
    "Wait, let me check.\n48 + 24 = 72.\nWait, let me check.\n72 / 3 = 24.\nWait, let me check.\nYes.",
    "| x | y |\n|---|---|\n| 1 | 1 |\n| 2 | 4 |\n| 3 | 9 |\n|---|---|\n---\n---\n---\n---",
    "\n".join(f"For n = {n}, the sum is {n * (n + 1) // 2}." for n in range(1, 12)),
    ENGLISH + "\n\n" + ENGLISH.split("\n\n")[1],
])
def test_no_repetition(text):
    assert not repetition(sample(text), LIMITS)


def test_every_limit_of_repetition_can_be_turned_off():
    none = FilterConfig(line_repeats=None, word_repeats=None, ngram_share=None)
    assert not repetition(sample("Let me check this again.\n" * 400), none)


def test_a_loop_is_found_wherever_it_is_and_only_then():
    assert loop(list("xyabababq"), 3, 4) and not loop(list("xyababq"), 3, 4)
    assert not loop(list("abcdabcdabcd"), 3, 3) and loop(list("abcdabcdabcd"), 3, 4)
    assert not loop([], 2, 8) and not loop(["a"], 2, 8) and loop(["a", "a"], 2, 8)
    assert not loop(["a"] * 9, 3, 8, least=10) and loop(["a"] * 10, 3, 8, least=10)


def test_loops_are_those_of_the_plain_definition():
    rng = random.Random(0)
    for _ in range(300):
        items = [rng.choice("ab") for _ in range(rng.randint(0, 14))]
        repeats, longest = rng.randint(2, 4), rng.randint(1, 4)
        plain = any(
            items[start : start + period] * repeats == items[start : start + period * repeats]
            for period in range(1, longest + 1) for start in range(len(items) - period * repeats + 1)
        )
        assert loop(items, repeats, longest) == plain, (items, repeats, longest)


def test_the_share_of_repeated_runs():
    words = list(map(str, range(60)))
    assert repeated_share(words, 4) == 0
    assert repeated_share(words + words, 4) == pytest.approx(57 / 117)
    assert repeated_share(["a"] * 20, 4) == 0  # too short to say


@pytest.mark.parametrize("text", ["a" * 10**6, "`" * 10**6, "a " * 300_000, "\n" * 10**6, "<think>" * 100_000,
                                  "\\begin{" * 100_000, "我" * 300_000, "$x" * 300_000])
def test_a_megabyte_takes_no_more_than_its_length(text):
    """No filter may backtrack; a quadratic one would take hours here."""
    started = time.monotonic()
    for holds in FILTERS.values():
        holds(Sample("", text, "1"), LIMITS)
    assert time.monotonic() - started < 60
