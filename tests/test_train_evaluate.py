"""pass@1, cons@k and their standard errors, against numpy; and what is stored beside them."""

import dataclasses
import hashlib
import math
import time

import numpy as np
import pytest
import torch

from r1kernels.train.config import EvalConfig
from r1kernels.train.data import Problem
from r1kernels.train.evaluate import PARTS, consensus, evaluate
from r1kernels.train.prompt import Template, render
from r1kernels.train.rewards import Sample, Scorer, ScoringConfig, accuracy
from r1kernels.train.rollout import Completions

PROBLEMS = [Problem("a", "2 + 2?", "4"), Problem("b", "3 + 3?", "6"), Problem("c", "4 + 4?", "8")]


def boxed(value) -> str:
    return rf"<think>so it is</think> <answer>\boxed{{{value}}}</answer>"


class Scripted:
    """A sampler that says what it was given to say; each word is a token."""

    def __init__(self, texts, finished=None):
        self.texts, self.finished, self.asked = texts, finished, None

    def sample(self, prompts, sampling, on_batch=None):
        self.asked, self.sampling, self.drawn = list(prompts), sampling, torch.rand(()).item()
        lengths = [len(text.split()) for text in self.texts]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        zeros = torch.zeros(mask.shape)
        finished = torch.ones(len(lengths), dtype=torch.bool) if self.finished is None else torch.tensor(self.finished)
        return Completions(
            prompt_ids=zeros.long(), prompt_mask=mask, token_ids=zeros.long(), mask=mask, logprobs=zeros,
            texts=list(self.texts), finished=finished,
        )


@pytest.fixture(scope="module")
def scorer():
    with Scorer(PARTS, ScoringConfig(timeout_s=60)) as made:
        yield made


def measure(scorer, texts, problems=PROBLEMS, *, finished=None, seed=0, **settings):
    sampler = Scripted(texts, finished)
    settings = EvalConfig(**{"samples": len(texts) // len(problems), **settings})
    return sampler, evaluate(sampler, problems, scorer, settings, template=Template("r1_zero", None), seed=seed)


def test_means_and_standard_errors_are_those_of_numpy(scorer):
    texts = [
        boxed(4), boxed(4), boxed(5), boxed(5), boxed(5),  # 2 of 5, and 5 is the most frequent
        boxed(6), boxed("6.0"), boxed(7), "no idea", boxed(6) + " but well",  # 3 of 5
        boxed(8), boxed(9), boxed(8), boxed(9), "none",  # 2 of 5, a tie
    ]
    sampler, result = measure(scorer, texts)
    shares = np.array([0.4, 0.6, 0.4])
    agreed = np.array([0.0, 1.0, 0.5])
    lengths = np.array([len(text.split()) for text in texts]).reshape(3, 5).mean(1)
    for name, values in (("pass_at_1", shares), ("cons_at_k", agreed), ("length", lengths)):
        assert getattr(result, name) == pytest.approx(values.mean())
        assert getattr(result, f"{name}_se") == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert (result.k, result.questions, result.unscorable) == (5, 3, 0)
    assert result.format == pytest.approx(12 / 15)  # "no idea", "none", and words after the tags
    assert result.reflective == pytest.approx(1 / 15)  # "but"
    assert [example["question"] for example in result.examples] == ["2 + 2?", "3 + 3?", "4 + 4?"]
    assert result.examples[0] == {"question": "2 + 2?", "answer": "4", "completion": boxed(4), "accuracy": 1.0}
    # Of one question its samples in a row, each with the prompt.
    assert sampler.asked == [render(problem.question) for problem in PROBLEMS for _ in range(5)]


def test_how_it_was_measured_is_stored(scorer):
    settings = {"temperature": 0.3, "top_p": 0.7, "max_new_tokens": 9, "batch_size": 2}
    sampler, result = measure(scorer, [boxed(4)] * 3, finished=[True, False, False], **settings)
    prompts = "\0".join(render(problem.question) for problem in PROBLEMS)
    assert result.prompt_hash == hashlib.sha256(prompts.encode()).hexdigest()[:16]
    assert (result.temperature, result.top_p, result.max_new_tokens) == (0.3, 0.7, 9)
    assert dataclasses.astuple(sampler.sampling)[:4] == (0.3, 9, 0.7, 2)
    assert result.truncated == pytest.approx(2 / 3)
    _, other = measure(scorer, [boxed(4)] * 2, PROBLEMS[:2])
    assert other.prompt_hash != result.prompt_hash
    _, again = measure(scorer, [boxed(1)] * 6, samples=2)
    assert again.prompt_hash == result.prompt_hash  # of the questions, not of how often they are asked


def test_the_same_seed_draws_the_same_and_disturbs_nobody(scorer):
    torch.manual_seed(5)
    before = torch.rand(())
    torch.manual_seed(5)
    drawn = [measure(scorer, [boxed(4)] * 3, seed=seed)[0].drawn for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.rand(()), before)


def test_one_question_has_no_standard_error(scorer):
    _, result = measure(scorer, [boxed(4), boxed(5)], PROBLEMS[:1])
    assert result.pass_at_1 == 0.5 and math.isnan(result.pass_at_1_se)
    stored = result.as_dict()
    assert stored["pass_at_1_se"] is None and stored["cons_at_k_se"] is None and stored["pass_at_1"] == 0.5


class Unscorable:
    """Scores as `scorer` does, but for those samples that it cannot score."""

    def __init__(self, scorer, rows):
        self.scorer, self.rows = scorer, rows

    def score(self, samples):
        scores = self.scorer.score(samples)
        for row in self.rows:
            scores.parts["accuracy"][row] = math.nan
        return scores


def test_samples_without_a_score_are_left_out_and_counted(scorer):
    texts = [boxed(4), boxed(5), boxed(6), boxed(6), boxed(1), boxed(2)]
    _, result = measure(Unscorable(scorer, [1, 4, 5]), texts)
    assert result.unscorable == 3
    values = np.array([1.0, 1.0])  # the third question has no score at all
    assert result.pass_at_1 == values.mean() and result.pass_at_1_se == 0
    assert result.cons_at_k == 0.75  # the answer without a score is as frequent as the right one
    _, nothing = measure(Unscorable(scorer, range(6)), texts)
    stored = nothing.as_dict()
    assert all(stored[key] is None for key in ("pass_at_1", "pass_at_1_se", "cons_at_k", "cons_at_k_se"))
    assert stored["unscorable"] == 6 and stored["examples"][0]["accuracy"] is None


def test_an_open_problem_has_no_score(scorer):
    _, result = measure(scorer, ["Hello!", boxed(4)], [Problem("o", "Hi?", "", "open"), PROBLEMS[0]])
    assert (result.unscorable, result.pass_at_1) == (1, 1.0)


def vote(*answers, kind="math", correct=None):
    samples = [Sample("p", boxed(a) if a is not None else "nothing", "1", kind=kind) for a in answers]
    return consensus(samples, correct or [float(a in (1, "1", "1.0", "01")) for a in answers])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((1, 1, 2), 1.0),
        ((1, 2, 2), 0.0),
        ((1, 2), 0.5),  # both are as frequent: each has its share
        ((1, 2, 3), 1 / 3),
        ((1, 1, 2, 2, 3), 0.5),
        ((1, "1.0", "01", 2, 2), 1.0),  # the same number, written in several ways
        ((0, "0.0", 1), 0.0),
        ((None, None, 1), 1.0),  # who has no answer has no vote
        ((None, None), 0.0),
        ((" x ", "x", 1), 0.0),
        ((1,), 1.0),
    ],
)
def test_the_most_frequent_answer_decides(answers, expected):
    assert vote(*answers) == pytest.approx(expected)


def test_what_has_no_score_has_the_vote_of_a_wrong_answer():
    nan = math.nan
    assert vote(2, 2, 1, correct=[nan, nan, 1.0]) == 0.0
    assert vote(2, 3, 1, 1, correct=[nan, nan, 1.0, 1.0]) == 1.0
    assert math.isnan(vote(2, 1, correct=[nan, nan]))
    assert math.isnan(vote(None, correct=[nan]))
    assert math.isnan(vote(1, 1, kind="code"))  # programs are not compared


def test_equal_answers_judged_differently_are_not_one():
    """The same plain answer may be right in one sample alone, where what surrounds it is judged too."""
    assert vote(1, 1, 2, correct=[1.0, 0.0, 0.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("kind", "reference", "completions", "expected"),
    [
        ("choice", "B", ["The answer is B"] * 3, 1.0),
        ("choice", "B", [r"\boxed{B}", r"\boxed{(B)}", "The answer is B.", r"\boxed{A}", r"\boxed{A}"], 1.0),
        ("choice", "B", [r"\boxed{A}", r"\boxed{(A)}", "The answer is A.", r"\boxed{B}", r"\boxed{B}"], 0.0),
        ("exact", "a b", [r"\boxed{a b}", r"\boxed{a  b}", r"\boxed{c}"], 1.0),
        ("exact", "a b", [r"\boxed{c d}", r"\boxed{c  d}", r"\boxed{a b}"], 0.0),
        ("math", "5", [r"\boxed{x=5}", r"\boxed{5}", r"\boxed{6}", r"\boxed{7}"], 1.0),
        ("math", "5", [r"\boxed{x=6}", r"\boxed{6}", r"\boxed{5}"], 0.0),
        ("math", "18", [r"\boxed{18\text{ dollars}}", r"\boxed{\$18}", r"\boxed{18}", *[r"\boxed{17}"] * 2], 1.0),
        ("math", "18", [r"\boxed{17\text{ dollars}}", r"\boxed{\$17}", r"\boxed{17.0}", *[r"\boxed{18}"] * 2], 0.0),
        ("math", "18", [r"\boxed{17 dollars}", r"\boxed{It is 17}", r"\boxed{18}"], 0.0),
        ("math", "18", [*[r"\boxed{9^{9^{9^9}}}"] * 15, r"\boxed{18}"], 0.0),
        ("math", "18", [*["no idea"] * 15, r"\boxed{18}"], 1.0),
    ],
)  # fmt: skip
def test_answers_are_the_same_that_are_read_as_the_same(kind, reference, completions, expected):
    samples = [Sample("", completion, reference, kind=kind) for completion in completions]
    assert consensus(samples, [accuracy(sample) for sample in samples]) == expected


def test_counting_long_answers_is_cheap():
    samples = [Sample("", r"\boxed{" + r"\(" * 9990 + "}", "18")] * 200
    start = time.monotonic()
    assert consensus(samples, [0.0] * 200) == 0.0
    assert time.monotonic() - start < 5
