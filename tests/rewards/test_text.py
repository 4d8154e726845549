"""Which part of a completion is its final answer, and which completions are well formed."""

import random

import pytest

from r1kernels.rewards.text import final_answer, is_well_formed, same_text

OPENED = "Question? <think>"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>so</think> <answer> 18 </answer>", "18"),
        (r"The result is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"So \boxed {18}.", "18"),
        ("She has\n#### 18\n", "18"),
        (r"<answer>It is \boxed{18}, clearly.</answer>", "18"),
        ("<answer>9 + 9 =\n#### 18</answer>", "18"),
        ("no marker: 18", None),
        ("", None),
        # The last marker counts, whichever kind it is, and it alone.
        (r"\boxed{17} and so \boxed{18}", "18"),
        (r"\boxed{17}" + "\n#### 18", "18"),
        ("#### 17\n" + r"\boxed{18}", "18"),
        (r"\boxed{18} and so \boxed{17", None),
        # A heading is no answer.
        (r"So \boxed{18}." + "\n\n#### Summary\nAll is well.", "18"),
        ("#### Paris", "Paris"),
        # A thought is not an answer, even when it never ends.
        ("<think><answer>18</answer></think>", None),
        ("<think><answer>18</answer></think><answer>17</answer>", "17"),
        (r"<think>\boxed{18}", None),
        ("<answer>18</answer><think>or 17", None),
        # One pair of tags, or no answer.
        ("<answer>17</answer><answer>18</answer>", None),
        ("<answer>17 <answer>18</answer>", None),
        ("<answer>18", None),
        ("</answer>18<answer>", None),
        # Nothing that looks like another answer after it, nor two inside it.
        (r"<answer>17</answer> \boxed{18}", None),
        ("<answer>17</answer>\n#### 18", None),
        (r"<answer>\boxed{17} \boxed{18}</answer>", None),
        ("<answer>18</answer> That is all.", "18"),
    ],
)
def test_final_answer_is_unique_and_last(completion, answer):
    assert final_answer("", completion) == answer


def test_the_prompt_is_never_an_answer():
    prompt = "Example: <think>2</think> <answer>18</answer> \\boxed{18}\n#### 18"
    assert final_answer(prompt, "I do not know.") is None
    assert final_answer(OPENED, r"never closed \boxed{18}") is None
    assert final_answer(OPENED, r"9 + 9 </think> <answer>18</answer>") == "18"


@pytest.mark.parametrize(
    ("completion", "prompt", "value"),
    [
        ("<think>a</think><answer>b</answer>", "", True),
        (" <think>a</think>\n\n<answer>b</answer>\n", "", True),
        ("a</think><answer>b</answer>", OPENED, True),
        ("<think>a</think><answer>b</answer>", OPENED, False),
        ("a</think><answer>b</answer>", "", False),
        ("Sure! <think>a</think><answer>b</answer>", "", False),
        ("<think>a</think><answer>b</answer> Bye.", "", False),
        ("<think>a</think> so <answer>b</answer>", "", False),
        ("<answer>b</answer><think>a</think>", "", False),
        ("<think>a<answer>b</answer></think>", "", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", "", False),
        ("<think>a<think></think><answer>b</answer>", "", False),
        ("<think>a</think></think><answer>b</answer>", "", False),
        ("<THINK>a</THINK><answer>b</answer>", "", False),
        ("", "", False),
    ],
)
def test_format(completion, prompt, value):
    assert is_well_formed(prompt, completion) is value


@pytest.mark.parametrize("piece", [r"\boxed{", "<answer>", "####", "{", "\\", "<think>"])
def test_megabytes_are_read(piece):
    flood = piece * (1_000_000 // len(piece))
    for completion in (flood, f"<answer>{flood}</answer>", r"\boxed{" + flood, flood + "}" * 1_000_000):
        assert final_answer("", completion) in (None, "", completion[8:-9])
        assert not is_well_formed("", completion)


def test_any_text_can_be_read():
    draw = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", r"\boxed{", "}", "####", "\n", "18", "\ud800", "\0"]
    for _ in range(5000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        answer = final_answer(draw.choice(["", "<think>"]), text)
        assert answer is None or answer in text


def test_exact_text():
    assert same_text(" a\u0308 \n b") == same_text("\u00e4 b")
    assert same_text("A b") != same_text("a b")
    assert same_text("ab") != same_text("a b")
