"""The scorer: which rewards apply, batches in the background, and the same scores however they come."""

import math
import os
import random
import threading
import time
from concurrent.futures import CancelledError

import pytest

from r1kernels.train.rewards import REWARDS, Reward, Sample, Scorer, Scores, ScoringConfig

SURD = Sample("", r"<think>a</think> <answer>\sqrt{324}</answer>", "18")


def test_scoring_goes_on_in_the_background(monkeypatch):
    allowed, main = threading.Event(), threading.get_ident()

    def patient(sample):
        assert allowed.wait(10) and threading.get_ident() != main
        return float(sample.completion)

    monkeypatch.setitem(REWARDS, "patient", Reward(score=patient))
    with Scorer({"patient": 2.0}) as scorer:
        futures = [scorer.submit([Sample("", str(number), "")] * number) for number in range(5)]
        assert not any(future.done() for future in futures)
        allowed.set()
        assert [future.result().total for future in futures] == [[2.0 * n] * n for n in range(5)]


def test_what_goes_wrong_in_the_background_reaches_the_caller(monkeypatch):
    def broken(sample):
        raise KeyError(sample.completion)

    monkeypatch.setitem(REWARDS, "broken", Reward(score=broken))
    with Scorer({"broken": 1.0}) as scorer:
        future = scorer.submit([Sample("", "first", "")])
        with pytest.raises(KeyError, match="first"):
            future.result()
        # And the thread is there for the next batch.
        assert scorer.score([]).total == []


def test_closing_cancels_and_scoring_again_starts_anew(monkeypatch):
    monkeypatch.setattr("r1kernels.train.rewards.effort.MAX_DEPTH", 1000)
    threads = threading.active_count()
    scorer = Scorer({"accuracy": 1.0}, ScoringConfig(timeout_s=60))
    assert scorer.score([SURD]).total == [1.0]
    # Nested brackets take the judge for ever.
    nested = Sample("", "#### " + "(" * 100 + "17" + ")" * 100, "18")
    under_way, waiting = scorer.submit([nested]), scorer.submit([SURD])
    time.sleep(0.2)
    start = time.monotonic()
    scorer.close()
    assert time.monotonic() - start < 10
    for future in (under_way, waiting):
        with pytest.raises(CancelledError):
            future.result()
    assert threading.active_count() == threads
    assert scorer.score([SURD]).total == [1.0]
    scorer.close()
    scorer.close()


@pytest.mark.parametrize(
    ("kind", "completion", "answer", "value"),
    [
        ("exact", "<answer>caf\u00e9  au\n lait</answer>", "cafe\u0301 au lait", 1.0),
        ("exact", "<answer>cafe au lait</answer>", "caf\u00e9 au lait", 0.0),
        ("exact", "<answer>1.0</answer>", "1", 0.0),
        ("exact", r"\boxed{x y}", " x  y ", 1.0),
        ("exact", "x y", "x y", 0.0),
        ("exact", "<answer>x</answer>", " ", math.nan),
        ("exact", "<answer>" + "\u0301\u0323" * 500_000 + "</answer>", "x", 0.0),
        ("choice", "<answer>(B)</answer>", "B", 1.0),
        ("math", "<answer>1.0</answer>", "1", 1.0),
        ("code", "<think>a", '{"stdio": [{"input": "", "output": "1"}]}', 0.0),
    ],
)
def test_accuracy_depends_on_the_kind(kind, completion, answer, value):
    with Scorer({"accuracy": 1.0}) as scorer:
        scores = scorer.score([Sample("", completion, answer, kind=kind)])
    assert scores.total == pytest.approx([value], nan_ok=True)
    assert scores.unscorable == {"accuracy": int(math.isnan(value))}


def test_a_reward_that_does_not_apply_is_left_out():
    samples = [
        Sample("", "<think>so</think><answer>18</answer>", "18"),
        Sample("", "<think>so</think><answer>Hello</answer>", "Hi", kind="open"),
        Sample("", "<think>so</think><answer>18</answer>", ""),
    ]
    with Scorer({"accuracy": 1.0, "format": 0.5}) as scorer:
        scores = scorer.score(samples)
    assert scores.total[:2] == [1.5, 0.5]
    assert math.isnan(scores.total[2])
    assert [math.isnan(value) for value in scores.parts["accuracy"]] == [False, True, True]
    assert scores.unscorable == {"accuracy": 1, "format": 0}
    with pytest.raises(ValueError, match="a sample of kind 'poem' has no accuracy"):
        REWARDS["accuracy"].score(Sample("", "", "", kind="poem"))


def test_scores_do_not_depend_on_the_batches():
    draw = random.Random(0)
    answers = [r"\sqrt{324}", r"18 + \sqrt{2} - \sqrt{2}", r"\frac{36}{2}", "17", "", "(1,2)", r"\{18\}", "x^2"]
    answers += ["9^{9^9}", r"\begin{pmatrix}", "\ud800", "18!", r"(x+1)^{100000}", rf"\sqrt[3]{{{18**3}}}", "7=18"]
    samples = [
        Sample("", f"<think>so \u6240</think> <answer>{draw.choice(answers)}</answer>", reference)
        for reference in draw.choices(["18", r"\sqrt{324}"], k=300)
    ]
    settings = ScoringConfig(workers=2, timeout_s=120)

    def scored(order, size):
        values = {}
        with Scorer({"accuracy": 1.0, "format": 0.5, "language": 0.25}, settings) as scorer:
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            futures = [scorer.submit([samples[index] for index in batch]) for batch in batches]
            for batch, future in zip(batches, futures, strict=True):
                scores = future.result()
                for place, index in enumerate(batch):
                    values[index] = (scores.total[place], *(part[place] for part in scores.parts.values()))
        return [repr(values[index]) for index in range(len(samples))]

    straight = list(range(len(samples)))
    expected = scored(straight, 300)
    assert len(set(expected)) == 3
    for size in (1, 37):
        assert scored(draw.sample(straight, 300), size) == expected


def test_batches_are_joined_in_the_order_of_the_samples():
    first = Scores({"a": [1.0, 2.0]}, [3.0, 4.0], 1, 2, 3, {"a": 1}, "")
    second = Scores({"a": [5.0]}, [6.0], 10, 20, 30, {"a": 2}, "refused")
    joined = Scores.joined([first, second], [[2, 0], [1]])
    assert joined == Scores({"a": [2.0, 5.0, 1.0]}, [4.0, 6.0, 3.0], 11, 22, 33, {"a": 3}, "refused")


def test_nothing_is_left_behind(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Scorer({"accuracy": 1.0}) as scorer:
            scorer.score([SURD])
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # the listing itself
