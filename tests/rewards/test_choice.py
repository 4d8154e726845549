"""Multiple choice: which letter a completion settles on."""

# ruff: noqa: RUF001
import itertools
import json
import os
from pathlib import Path

import pytest

from r1kernels.rewards.choice import MAX_CHOICE, letter
from r1kernels.rewards.text import final_answer

LISTED = [
    "B", "b", "(B)", "[B]", "B.", "B)", "B:", "(b)", " B ", "B!", "B。", "**B**", "`B`", '"B"', "'B'", "<b>B</b>", "Ｂ",
    "（Ｂ）", "𝐁", "B\u200b", r"\text{B}", r"\text{(B)}", r"\textbf{(B)}", r"\mathrm{B}", "$B$", r"\(B\)", r"\boxed{B}",
    r"\{B\}", r"\boxed{(B)\ 12}",
    # The text of the option.
    "B) 42 metres", "B. Because it is red.", "(B) text", "B: the second", "B - the second", "B — the second",
    "B (Paris)", "B) A cat", "B) False", "B. none of these", "B. 3 or 4", r"B. \text{Paris}", "B、巴黎", "B：巴黎",
    # A phrase before it.
    "The answer is B", "the answer is (B).", "The correct answer is: B", "Option B", "option (b)", "answer: B",
    "So the answer is B.", "The correct option would be B", "The correct answer is option B", "I guess B", "答案是B",
    "选B", "故选B", "因此，正确答案是：B", "I considered (A), but it is incorrect. Final answer: B.",
    # A reason after it.
    "B because A is wrong", "B not C", "The answer is B because it is red",
]  # fmt: skip
UNLISTED = [
    "", "A", "A or B", "A, B", "A/B", "A and B", "A) or B)", "A B C D", "(A)(B)", "AB", "B or A", "B, C", "B/C", "B|C",
    "B) C) D)", "(B) or (C)", "B. C. D.", "[B", "BB", "Bees", "Being so, B", "A bird", "I believe it", "neither",
    "not B", "all but B", "anything but B", "the answer is not B", "В", "B" * 3000, "((((B", "12", r"\text{}",
    "B is wrong", "B. is wrong", "B: incorrect, C is right", "B. But it could be C", "B) or maybe C", "B Is wrong",
    "B. alternatively C", "B. x C. y D. z", "B) 3 C) 4 D) 5", "B because so. Actually C", "B Not", "B and so on",
    "B、C", "B 或 C", "B. 'C'", "B. \u2060C", "B. option C", "b paris", "B c", "B?", "B??", "I Think so", "B Or C",
    "¬B", "-B", r"\not B", "B^c", "B_1", "B -> C", "B-C", "B\n\nC", r"B \\ C", "B \u202e C", "B.C.", "B - C",
    "B because C is right", "B because B is wrong, so C", "B. The answer is C", "B. Final answer: C", "B. Actually C",
    "B. Paris or Rome (C)", "B. Paris; C. Rome", "B. Paris, but Rome also", "B: no; C: yes", "B. no. C", "B. (c)",
    "The answer is B. The answer is C.", "The answer is B or C", "answer", "B because the answer is C", "B ≠ C",
]  # fmt: skip


def chosen(prompt, completion):
    return letter(final_answer(prompt, completion) or "")


@pytest.mark.parametrize("pattern", ["<think>A or C?</think> <answer>%s</answer>", r"\boxed{%s}"])
def test_listed_forms_and_no_others(pattern):
    assert [text for text in LISTED if chosen("", pattern.replace("%s", text)) != "B"] == []
    assert [text for text in UNLISTED if chosen("", pattern.replace("%s", text)) == "B"] == []


def test_shared_cases():
    named = os.environ.get("R1KERNELS_SHARED")
    path = (Path(named) if named else Path(__file__).resolve().parents[3] / "shared") / "cases" / "choices.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}; R1KERNELS_SHARED names a directory that holds cases/choices.jsonl")
    for case in map(json.loads, path.read_text().splitlines()):
        for pattern in (r"\boxed{%s}", "%s" if "<answer>" in case["answer"] else "<answer>%s</answer>"):
            found = chosen("", pattern % case["answer"])
            assert (found == letter(case["reference"])) == case["right"], (case, pattern, found)


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("The answer is B.", None),
        ("B", None),
        ("<think>The answer is B.", None),
        ("<think>C</think>The answer is B.", None),
        ("<answer>C</answer>\nThe answer is B.", "C"),
        ("<answer>\nThe answer is B.", None),
        (r"\boxed{C} and then \boxed{B}", "B"),
        (r"\boxed{C}" + "\nThe answer is B.", "C"),
        ("#### B", "B"),
    ],
)
def test_a_choice_needs_a_marker(completion, found):
    assert chosen("", completion) == found


def test_the_reference_has_the_same_forms():
    assert [letter(text) for text in ("B", "(B)", r"\text{(B)}", "B. blue")] == ["B"] * 4
    assert [letter(text) for text in ("", "blue", "42", "A or B")] == [None] * 4


def test_long_texts_are_read():
    """Each would take minutes if a pattern backtracked."""
    pieces = ["The answer is ", "answer ", " answer: ", "选择", "option ", "the ", "so ", ", ", "B ", "B. ", "( ", "\\"]
    pieces += ["\\text ", "because ", "\t", "is ", "A is wrong ", ". "]
    for first, second in itertools.product(pieces, pieces):
        for start in ("", "B ", "B. ", "B because ", "The answer is "):
            text = (start + (first + second) * MAX_CHOICE)[: MAX_CHOICE - 1]
            letter(text + "~")
            letter(f"The answer is {text}")
