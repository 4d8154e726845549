"""Rewards: what counts as an answer, and when it is right."""

import math
import random
import subprocess
import time
from decimal import Decimal

import pytest

from r1kernels.train.prompt import render
from r1kernels.train.rewards import Judgement, Sample, Scorer, ScoringConfig, accuracy, format_reward
from r1kernels.train.rewards.accuracy import triage
from r1kernels.train.rewards.answers import final_answer, plain_number
from r1kernels.train.rewards.prose import number_in_prose


def tagged(answer):
    return f"<think>reasons</think> <answer>{answer}</answer>"


@pytest.fixture(scope="module")
def scorer():
    with Scorer({"accuracy": 1.0, "format": 0.5}, ScoringConfig(timeout_s=30)) as scorer:
        yield scorer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>so</think> <answer> 18 </answer>", "18"),
        (r"The result is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
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
    opened = render("9 + 9?", open_think=True)
    assert final_answer(opened, r"never closed \boxed{18}") is None
    assert final_answer(opened, r"9 + 9 </think> <answer>18</answer>") == "18"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"),
        ("18.", "18"),
        ("18.00", "18"),
        ("-1,234,567.5", "-1234567.5"),
        ("1{,}234", "1234"),
        (r"1,\!234", "1234"),
        ("1 234", "1234"),
        ("$18", "18"),
        (r"-\$18.50", "-18.5"),
        ("$-3", "-3"),
        ("\u22125", "-5"),
        (".5", "0.5"),
        ("9" * 60, "9" * 60),
        *[(text, None) for text in ("3,4", "1,2345", "1 2", "1e3", "--1", "-$-1", "0x10", "1/2", "x", "", ".")],
        *[(text, None) for text in ("\uff11\uff18", "\u0661\u0668", "1_000", "9" * 65, "1.2.3", "inf", "NaN")],
    ],
)
def test_plain_numbers_are_exact(text, value):
    number = plain_number(text)
    assert number == (None if value is None else (Decimal(value), False))


def test_percent_is_noted():
    assert plain_number("50%") == plain_number(r"50\%") == (Decimal(50), True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18 dollars", 18),
        ("The answer is $18.", 18),
        ("**18**", 18),
        ("18 or 19", None),
        ("either 18 or so", None),
        ("minus 18", None),
        ("18 hundred", None),
        ("none at all", None),
    ],
)
def test_one_number_in_prose(text, value):
    number = number_in_prose(text)
    assert (number and number[0]) == value


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("18", "18", 1.0),
        ("18.0", "18", 1.0),
        ("$18$", "18", 1.0),
        ("The total is $18$ dollars.", "18", 1.0),
        ("1,000", "1000", 1.0),
        ("50%", "50", 1.0),
        (r"\frac{1}{2}", r"\frac{1}{2}", 1.0),
        ("19", "18", 0.0),
        ("-18", "18", 0.0),
        ("17, 18", "18", 0.0),
        ("18 19 20", "18", 0.0),
        ("18 " * 400, "18", 0.0),
        ("", "18", 0.0),
        ("several words and no number", "18", 0.0),
        ("0." + "3" * 40, "0.3", 0.0),
    ],
)
def test_simple_answers_need_no_worker(answer, reference, value, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started a worker"))
    sample = Sample("", tagged(answer), reference)
    assert accuracy(sample) == value
    with Scorer({"accuracy": 1}) as scorer:
        assert scorer.score([sample]).total == [value]


@pytest.mark.parametrize(
    ("completion", "opened", "value"),
    [
        ("<think>a</think><answer>b</answer>", False, 1.0),
        (" <think>a</think>\n\n<answer>b</answer>\n", False, 1.0),
        ("a</think><answer>b</answer>", True, 1.0),
        ("<think>a</think><answer>b</answer>", True, 0.0),
        ("a</think><answer>b</answer>", False, 0.0),
        ("Sure! <think>a</think><answer>b</answer>", False, 0.0),
        ("<think>a</think><answer>b</answer> Bye.", False, 0.0),
        ("<think>a</think> so <answer>b</answer>", False, 0.0),
        ("<answer>b</answer><think>a</think>", False, 0.0),
        ("<think>a<answer>b</answer></think>", False, 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False, 0.0),
        ("<think>a<think></think><answer>b</answer>", False, 0.0),
        ("<think>a</think></think><answer>b</answer>", False, 0.0),
        ("<THINK>a</THINK><answer>b</answer>", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_format(completion, opened, value):
    assert format_reward(Sample(render("1 + 1?", open_think=opened), completion, "2")) == value


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        (r"\frac{36}{2}", "18", 1.0),
        ("x = 18", "18", 1.0),
        ("9 * 2 = 18", "18", 1.0),
        (r"50\%", "0.5", 1.0),
        (r"1 + x^2", "x^2+1", 1.0),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", 1.0),
        (r"0.333333", r"\frac{1}{3}", 1.0),
        ("17, 18", "18", 0.0),
        ("18 or 19", r"\frac{36}{2}", 0.0),
        (r"\pm 18", "18", 0.0),
        (r"\{17, 18\}", "18", 0.0),
        (r"\frac{0}{0}", "18", 0.0),
        ("__import__('os').abort()", "18", 0.0),
        ("{18", "18", 0.0),
        ("\ud800\x00\u202e", "18", 0.0),
    ],
)
def test_the_judge(answer, reference, value, scorer):
    scores = scorer.score([Sample("", tagged(answer), reference)])
    assert scores.parts["accuracy"] == [value]
    assert (scores.timeouts, scores.crashes) == (0, 0)


def test_any_text_can_be_read():
    draw = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", r"\boxed{", "}", "####", "$", r"\(", "(", ")", "18", ","]
    pieces += [".", "-", "%", r"\%", "=", "or", "x", "^", r"\frac", "1,8", r"\u", "\u0661", "\ud800", "\0"]
    for _ in range(20_000):
        text = draw.choice(["", " ", "\n"]).join(draw.choices(pieces, k=draw.randint(1, 12)))
        sample = Sample(draw.choice(["", "<think>"]), text, draw.choice(["18", r"\frac{1}{2}", text]))
        outcome = triage(sample)
        if isinstance(outcome, Judgement):
            answer, reference = outcome.arguments
            assert answer
            assert reference
            assert answer != reference
            assert answer in text
        elif math.isnan(outcome):
            assert sample.answer == text
        else:
            assert outcome in (0.0, 1.0)
        assert format_reward(sample) in (0.0, 1.0)


@pytest.mark.parametrize("text", [r"\boxed{", "<answer>", "####", "(", "$", "{", "\\", "<think>", "1,"])
def test_megabyte_completions_are_cheap(text):
    flood = text * (1_000_000 // len(text))
    start = time.monotonic()
    for completion in (flood, tagged(flood), r"\boxed{" + flood, flood + "}" * 1_000_000):
        sample = Sample("", completion, "18")
        assert triage(sample) == 0.0
        format_reward(sample)
    assert time.monotonic() - start < 2


def test_totals_weigh_the_parts_and_ignore_weight_zero():
    samples = [Sample("", tagged("18"), "18"), Sample("", "18", "18"), Sample("", tagged("18"), "")]
    with Scorer({"accuracy": 1.0, "format": 0.5}) as scorer:
        scores = scorer.score(samples)
    assert scores.total[:2] == [1.5, 0.0]
    assert math.isnan(scores.total[2])
    with Scorer({"accuracy": 0.0, "format": 0.5}) as scorer:
        scores = scorer.score(samples)
    assert scores.total == [0.5, 0.0, 0.5]
    assert math.isnan(scores.parts["accuracy"][2])
    with Scorer({"format": 1}) as scorer:
        assert scorer.score([]).total == []


@pytest.mark.parametrize(
    ("parts", "limits", "message"),
    [
        ({"accuracy": 1, "speed": 1}, {}, "unknown reward 'speed'; known rewards: accuracy, format"),
        ({}, {}, "at least one of: accuracy, format"),
        ({"format": math.nan}, {}, "weight of reward 'format' must be a finite number, got nan"),
        ({"format": "1"}, {}, "weight of reward 'format' must be a finite number, got '1'"),
        ({"format": 1}, {"workers": 0}, "workers must be positive, got 0"),
        ({"format": 1}, {"timeout_s": -1.0}, "timeout_s must be positive, got -1.0"),
        ({"format": 1}, {"memory_mb": 0}, "memory_mb must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(parts, limits, message):
    with pytest.raises(ValueError, match=message):
        Scorer(parts, ScoringConfig(**limits))


@pytest.mark.parametrize(
    ("reference", "answers"),
    [
        ("58500", [
            r"\text{58500 dollars}", "\u2248 58500", r"\approx 58500", "\u20ac58500", r"58,500^\circ", r"\text{58,500}",
            r"\textbf{58,500}", "(58,500)", "{58,500}", "Total = $58,500", "58000 + 500 = 58,500", r"\mathbf{58500}",
            r"58{,}500\text{ cm}^2", r"58,\!500 \text{ km}", r"\left(58500\right)", "58500\u20ac",
            r"58\,500\ \mathrm{m}",
        ]),
        ("18", ["18 square inches", "18 dollars!", "**18**", "**18** dollars", "\uff11\uff18", "18 m\u00b2"]),
        ("3", [
            "3 square feet", "3 times", "increased by 3", "3 km/h", "3 (three)", "x is 3", "3\u4e2a", "3\u3002",
            "\u7b54\u6848\u662f3", "\u4e00\u5171\u67093\u4e2a", "\uff13", "3\u200b", "\ufeff3", "It is 3.", "`3`",
        ]),
        ("20000", ["20 thousand", "20 thousand dollars"]),
        ("2500000", ["2.5 million"]),
        ("1000", ["1\uff0c000", "1\u00a0000", r"1\;000", "1~000", "1\u202f000", r"1{,}000"]),
        ("3,4", ["$3$ or $4$", r"3 \text{ or } 4"]),
        (r"\frac{14}{3}", [
            r"**\frac{14}{3}**", r"The answer is \frac{14}{3}.", r"The answer is $\frac{14}{3}$.",
            r"\mathbf{\frac{14}{3}}",
            r"\boxed{\mathbf{\frac{14}{3}}}", r"\boxed {\frac{14}{3}}",
        ]),
    ],
)  # fmt: skip
def test_right_answers_in_their_usual_dress(reference, answers, scorer):
    values = scorer.score([Sample("", tagged(answer), reference) for answer in answers]).parts["accuracy"]
    assert [answer for answer, value in zip(answers, values, strict=True) if value != 1.0] == []


@pytest.mark.parametrize(
    ("reference", "answers"),
    [
        ("4", [
            "not $4$", "$4$ is wrong", "half of $4$", "one more than $4$", "$4$ or five", "any number except 4",
            "the opposite of 4", "less than 4", "4 dozens", "4 hundreds", "4 tenths", "twenty 4", r"\text{not } 4",
            "4 is false", "seven times 4", "the square of 4", "4 thousandths", "4 thousand", "3=5=4", r"\fbox{4} 5",
            "4 isn't it", "twenty $4$", "$4$ dozens", "\\(4\\) maybe", "\u4e0d\u662f4", "4\u4e07", "4\u6216\u4e94",
            "two 4",
            "multiple of 4", "4 fewer than that", "4 million", "(4 or so)", "4-fold or five", "4 bn", "4 mil",
            "4 x/y", "4 m/n", "4 pi/e", "\u8d85\u8fc74", "\u6839\u53f74", "4\u6b21\u65b9", "4\u4ee5\u4e0a", "4 k",
            "$4k", r"\approx 4 or 5",
        ]),
        ("7", [
            r"7\text{ million}", r"7\text{ minus 2}", r"7\text{ not}", "!7", "7:1", r"\text{not }7", "7_2",
            r"7\equiv 7",
            r"7\text{ or }8", r"\text{7 million}", r"7\mathrm{ million}", "7 wrong",
        ]),
        (r"\frac{14}{3}", [r"not $\frac{14}{3}$", r"half of $\frac{14}{3}$", r"$\frac{14}{3}$ is wrong"]),
    ],
)  # fmt: skip
def test_words_that_change_a_number_are_heard(reference, answers, scorer):
    values = scorer.score([Sample("", tagged(answer), reference) for answer in answers]).parts["accuracy"]
    assert [answer for answer, value in zip(answers, values, strict=True) if value != 0.0] == []


def test_a_heading_is_no_answer():
    assert final_answer("", r"So \boxed{18}." + "\n\n#### Summary\nAll is well.") == "18"
    assert final_answer("", r"So \boxed {18}.") == "18"
    assert final_answer("", "#### Paris") == "Paris"
