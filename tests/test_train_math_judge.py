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
