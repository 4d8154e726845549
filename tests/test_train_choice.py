"""Multiple choice: which letter a completion settles on."""

import math
import os
import subprocess
import sys

import pytest

from r1kernels.train.rewards import Sample, accuracy


def score(completion, answer="B"):
    return accuracy(Sample("", completion, answer, kind="choice"))


@pytest.mark.parametrize(
    "written",
    [
        "B", "b", "(B)", "[B]", "B.", "B)", "B:", "(b)", " B ", "B) 42 metres", "B. Because it is red.", "(B) text",
        "B: the second", "B - the second", "B \u2014 the second", "**B**", "`B`", r"\text{B}", r"\text{(B)}",
        r"\textbf{(B)}", r"\mathrm{B}", "$B$", r"\(B\)", r"\boxed{B}", r"\boxed{\text{B}}", r"\boxed{(B)\ 12}",
        "The answer is B", "the answer is (B).", "The correct answer is: B", "Option B", "answer: B",
        "So the answer is B.", "The correct option would be B", "\uff22", "\uff08\uff22\uff09", "\u7b54\u6848\u662fB",
        "\u9009B", "B) A cat", "B. A vitamin, C or D", "B) I think so",
        "B because A is wrong", "B, since A and C fail", "B Paris", "B!", '"B"', "'B'", "B\u3002", "B\u3001\u5df4\u9ece",
        "B\uff1a\u5df4\u9ece", "B\u200b", "The answer is B because A is wrong", "B) False", "b because of C",
    ],
)  # fmt: skip
def test_the_usual_forms_are_read(written):
    assert score(f"<think>A or C?</think> <answer>{written}</answer>") == 1.0
    assert score(f"<think>B</think> <answer>{written}</answer>", "C") == 0.0


@pytest.mark.parametrize(
    "written",
    [
        "", "A", "A or B", "A, B", "A/B", "A and B", "A) or B)", "A B C D", "(A)(B)", "AB", "B or A", "B, C", "B/C",
        "B) C) D)", "(B) or (C)", "B. C. D.", "[B", "BB", "Bees", "Being so, B", "A bird", "I believe it", "neither",
        "not B", "all but B", "the answer is not B", "\u0412", "B" * 3000, "((((B", "12", "\\text{}", "\u0301" * 1900,
        "B is wrong", "B. is wrong", "B: incorrect, C is right", "B. But it could be C", "B) or maybe C", "B Is wrong",
        "B. alternatively C", "B. x C. y D. z", "B) 3 C) 4 D) 5", "B because so. Actually C", "B Not", "B and so on",
        "B\u3001C", "B \u6216 C", "B. 'C'", "B. \u2060C", "B. option C", "b paris", "B c", "B?", "I Think so", "B Or C",
    ],
)  # fmt: skip
def test_nothing_else_is_taken_for_the_letter(written):
    assert score(f"<answer>{written}</answer>") == 0.0


WORDS = [
    "The answer is ", "answer ", "answer", " answer: ", "\u9009\u62e9", "\u7b54\u6848 ", "\u7b54\u6848", "option ", "choice : ",
    "right ", "the ", "so ", "thus, ", "or ", ", ", "/", "B ", "B. ", "B or ", "( ", "\\text ", "\\", "because ", "\t", "is ",
]  # fmt: skip


def test_no_text_takes_long():
    """In a process of its own: a pattern that backtracks would hold the interpreter, and no thread could stop it."""
    program = f"""
import itertools
from r1kernels.train.rewards.choice import MAX_CHOICE, letter
words = {WORDS!r}
for a, b in itertools.product(words, words):
    for text in (a * MAX_CHOICE, (a + b) * MAX_CHOICE, (a * 40 + b) * MAX_CHOICE):
        for start in ("", "B ", "B. ", "The answer is "):
            for named in (False, True):
                letter((start + text)[:MAX_CHOICE - 1], named=named)
                letter((start + text)[:MAX_CHOICE - 1] + "~", named=named)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("It is red.\nThe answer is B.", 1.0),
        ("So the answer is (B)\n", 1.0),
        ("The answer is C.\nThe answer is B.", 1.0),
        ("The answer is B.\nThe answer is C.", 0.0),
        ("The answer is B, or so they say.\nI doubt it.", 0.0),
        ("B", 0.0),
        ("B is what I would say.", 0.0),
        ("Nobody says the answer is B.", 0.0),
        ("<think>The answer is B.", 0.0),
        ("<think>The answer is B.</think>", 0.0),
        ("<think>C</think>The answer is B.", 1.0),
        ("<answer>C</answer>\nThe answer is B.", 0.0),
        ("<answer>\nThe answer is B.", 0.0),
        (r"\boxed{C} and then \boxed{B}", 1.0),
        (r"\boxed{C}" + "\nThe answer is B.", 0.0),
        ("#### B", 1.0),
    ],
)
def test_without_a_tag_the_last_line_must_say_so(completion, value):
    assert score(completion) == value


def test_the_reference_has_the_same_forms():
    for reference in ("B", "(B)", r"\text{(B)}", "B. blue"):
        assert score("<answer>b</answer>", reference) == 1.0
    for reference in ("", "blue", "42", "A or B"):
        assert math.isnan(score("<answer>B</answer>", reference))
