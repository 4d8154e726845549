"""The judge of mathematics on the answers of MATH-500."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from r1kernels.train.rewards import Judgement, Sample, Scorer, ScoringConfig, accuracy
from r1kernels.train.rewards.accuracy import MATH
from r1kernels.train.rewards.effort import is_hopeless
from r1kernels.train.rewards.math_judge import judge
from r1kernels.train.rewards.pool import Pool


@pytest.fixture(scope="module")
def gold():
    named = os.environ.get("R1KERNELS_DATA")
    path = (Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data") / "math500.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}; R1KERNELS_DATA names a directory that holds MATH-500 as math500.jsonl")
    return [json.loads(line)["answer"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def scorer():
    with Scorer({"accuracy": 1.0}, ScoringConfig(workers=2, timeout_s=60)) as scorer:
        yield scorer


def boxed(texts, answers, scorer):
    scores = scorer.score([Sample("", rf"\boxed{{{t}}}", a) for t, a in zip(texts, answers, strict=True)])
    assert scores.unscorable == {"accuracy": 0}
    return scores.parts["accuracy"]


def test_gold_answers_are_equal_to_themselves(gold, scorer):
    assert len(gold) == 500
    assert boxed(gold, gold, scorer) == [1.0] * 500
    # Also where nobody compares the texts first.
    pool = Pool([MATH], workers=2, timeout_s=60, memory_bytes=2**29)
    try:
        verdicts = pool.run([Judgement(MATH, (answer, answer)) for answer in gold])
    finally:
        pool.close()
    assert verdicts == [1.0] * 500
    assert not any(is_hopeless(answer, "18") for answer in gold)


@pytest.mark.parametrize(
    "rewritten",
    [
        lambda text: text.replace(r"\frac", r"\dfrac"),
        lambda text: re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", text),
        lambda text: text.replace(r"\left", "").replace(r"\right", ""),
        lambda text: re.sub(r"\\text\{([^}]*)\}", r"\1", text),
        lambda text: f"${text}$.",
        lambda text: f"The answer is ${text}$.",
        lambda text: text if "=" in text or r"\in" in text else f"x = {text}",
    ],
)
def test_gold_answers_written_in_another_way_are_right(gold, scorer, rewritten):
    values = boxed(map(rewritten, gold), gold, scorer)
    assert [rewritten(text) for text, value in zip(gold, values, strict=True) if value != 1.0] == []


def test_other_answers_are_wrong(gold, scorer):
    others = gold[1:] + gold[:1]
    values = boxed(others, gold, scorer)
    taken = {(other, text) for other, text, value in zip(others, gold, values, strict=True) if value and other != text}
    assert taken <= {("5", "x=5"), ("x=5", "5")}
    assert boxed([f"{text}+1" for text in gold], gold, scorer) == [0.0] * 500


def test_judging_in_the_calling_process_is_the_same():
    assert accuracy(Sample("", r"\boxed{\sqrt{324}}", "18")) == 1.0
    assert accuracy(Sample("", r"\boxed{\sqrt{325}}", "18")) == 0.0
    assert math.isnan(accuracy(Sample("", r"\boxed{9^{9^{9}}}", "18")))


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("0.0", r"\frac{1}{2^{30}}", 0.0), ("1.0", r"1-\frac{1}{2^{30}}", 0.0), ("-0.0", r"\frac{1}{2^{22}}", 0.0),
        ("0.0000000", r"\frac{1}{2^{30}}", 0.0), ("0.0", "10^{-9}", 0.0), ("0.0", r"\sqrt{2}-1.41421356", 0.0),
        (r"\frac{1}{2^{30}}", "0.0", 0.0), (r"1-\frac{1}{2^{30}}", "1.0", 0.0), (r"\frac{0}{3}", "0.0", 1.0),
        ("0.0", r"\frac{0}{3}", 1.0), ("0.0002", r"\frac{1}{5000}", 1.0), (r"\frac{1}{5000}", "0.0002", 1.0),
        ("0.333", r"\frac{1}{3}", 0.0), ("0.33", r"\frac{1}{3}", 0.0), ("0.333333", r"\frac{1}{3}", 1.0),
        ("0.3333333333333333333333", r"\frac{1}{3}", 1.0), ("0.333334", r"\frac{1}{3}", 0.0),
        ("3.14159", r"\pi", 1.0), ("3.14", r"\pi", 0.0), ("3.141592653589793238463", r"\pi", 1.0),
        ("3.14160", r"\pi", 0.0), (r"33.3333\%", r"\frac{1}{3}", 1.0), ("0.75", r"\frac{3}{4}", 1.0),
        ("x = 0.75", r"\frac{3}{4}", 1.0), ("0.75", r"x = \frac{3}{4}", 1.0), ("0.5x", r"\frac{x}{2}", 1.0),
        ("(0.5, 1)", r"(\frac{1}{2}, 1)", 1.0), ("(0.0, 1)", r"(\frac{1}{2^{30}}, 1)", 0.0), ("0.5000001",
        r"\frac12", 0.0),
        ("0.5", r"\frac{x}{2}", 0.0), ("0.5", "i", 0.0), ("0.30", r"0.1+\frac{1}{5}", 1.0),
    ],
)  # fmt: skip
def test_decimals_are_exact_or_well_rounded(answer, reference, value, scorer):
    assert boxed([answer], [reference], scorer) == [value]


@pytest.mark.parametrize("reference", ["\\frac{1", "(3,", "\\sqrt{", "3 \\cdot"])
def test_a_reference_that_is_no_expression_is_nobodys_mistake(reference):
    """No answer could be right: a silent 0 would punish them all."""
    assert math.isnan(judge("3", reference))
    with Scorer({"accuracy": 1.0}) as scorer:
        scores = scorer.score([Sample("", "\\boxed{3}", reference)])
    assert math.isnan(scores.total[0]) and scores.unscorable == {"accuracy": 1} and scores.crashes == 0
