"""pass@1, cons@k and their standard errors, against numpy; and what is stored with them."""

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from rl_cases import make_model, make_tokenizer, stage_of

from r1kernels.rewards import Scorer
from r1kernels.train.data import Problem, Template
from r1kernels.train.evaluate import (
    PARTS,
    consensus,
    evaluate,
    evaluate_model,
    reflective_words,
)
from r1kernels.train.recipe import Eval
from r1kernels.train.rollout import Completions, TransformersSampler

render = Template("r1_zero", None).render
PROBLEMS = [Problem("a", "2 + 2?", "4"), Problem("b", "3 + 3?", "6"), Problem("c", "4 + 4?", "8")]


def boxed(value) -> str:
    return rf"<think>so it is</think> <answer>\boxed{{{value}}}</answer>"


class Scripted:
    """A sampler that says what it was given to say; each word is a token."""

    def __init__(self, texts, finished=None):
        self.texts, self.finished, self.asked = texts, finished, None

    def sample(self, prompts, sampling):
        self.asked, self.sampling = list(prompts), sampling
        lengths = [len(text.split()) for text in self.texts]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        zeros = torch.zeros(mask.shape)
        finished = torch.ones(len(lengths), dtype=torch.bool) if self.finished is None else torch.tensor(self.finished)
        return Completions(zeros.long(), mask, zeros.long(), mask, zeros, list(self.texts), finished)


@pytest.fixture(scope="module")
def scorer():
    with Scorer(PARTS, timeout_s=60) as made:
        yield made


def measure(scorer, texts, problems=PROBLEMS, *, finished=None, seed=0, **settings):
    sampler = Scripted(texts, finished)
    settings = Eval(**{"samples": len(texts) // len(problems), **settings})
    return sampler, evaluate(sampler, problems, scorer, settings, template=Template("r1_zero", None), seed=seed)


def test_means_and_standard_errors_are_those_of_numpy(scorer):
    texts = [
        boxed(4), boxed(4), boxed(5), boxed(5), boxed(5),  # 2 of 5, and 5 is the most frequent
        boxed(6), boxed(6), boxed(7), "no idea", boxed(6) + " but well",  # 3 of 5
        boxed(8), boxed(9), boxed(8), boxed(9), "none",  # 2 of 5, a tie
    ]
    sampler, result = measure(scorer, texts)
    lengths = np.array([len(text.split()) for text in texts]).reshape(3, 5).mean(1)
    expected = {"pass_at_1": np.array([0.4, 0.6, 0.4]), "cons_at_k": np.array([0.0, 1.0, 0.5]), "length": lengths}
    for name, values in expected.items():
        assert result[name] == pytest.approx(values.mean())
        assert result[f"{name}_se"] == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert (result["k"], result["questions"], result["unscorable"]) == (5, 3, 0)
    assert result["format"] == pytest.approx(12 / 15)  # "no idea", "none", and words after the tags
    assert result["reflective"] == pytest.approx(1 / 15)  # "but"
    assert [example["question"] for example in result["examples"]] == ["2 + 2?", "3 + 3?", "4 + 4?"]
    assert result["examples"][0] == {"question": "2 + 2?", "answer": "4", "completion": boxed(4), "accuracy": 1.0}
    assert sampler.asked == [render(problem.question) for problem in PROBLEMS for _ in range(5)]
    json.dumps(result, allow_nan=False)


def test_how_it_was_measured_is_stored(scorer):
    settings = {"temperature": 0.3, "top_p": 0.7, "max_new_tokens": 9, "batch_size": 2}
    sampler, result = measure(scorer, [boxed(4)] * 3, finished=[True, False, False], **settings)
    prompts = "\0".join(render(problem.question) for problem in PROBLEMS)
    assert result["prompt_hash"] == hashlib.sha256(prompts.encode()).hexdigest()[:16]
    assert (result["temperature"], result["top_p"], result["max_new_tokens"]) == (0.3, 0.7, 9)
    assert dataclasses.astuple(sampler.sampling)[:4] == (0.3, 9, 0.7, 2)
    assert result["truncated"] == pytest.approx(2 / 3)
    assert measure(scorer, [boxed(4)] * 2, PROBLEMS[:2])[1]["prompt_hash"] != result["prompt_hash"]
    # It is of the questions, not of how often they are asked.
    assert measure(scorer, [boxed(1)] * 6, samples=2)[1]["prompt_hash"] == result["prompt_hash"]


def test_the_same_seed_draws_the_same_and_disturbs_nobody(scorer):
    torch.manual_seed(5)
    before = torch.rand(())
    torch.manual_seed(5)
    drawn = [measure(scorer, [boxed(4)] * 3, seed=seed)[0].sampling.seed for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.rand(()), before)


def test_one_question_has_no_standard_error(scorer):
    _, result = measure(scorer, [boxed(4), boxed(5)], PROBLEMS[:1])
    assert result["pass_at_1"] == 0.5 and result["pass_at_1_se"] is result["cons_at_k_se"] is None


class Unscorable:
    """Scores as `scorer` does, except for some rows."""

    def __init__(self, scorer, rows):
        self.scorer, self.rows = scorer, rows

    def score(self, completions, **columns):
        scores = self.scorer.score(completions, **columns)
        for row in self.rows:
            scores.parts["accuracy"][row] = math.nan
        return scores


def test_samples_without_a_score_are_left_out_and_counted(scorer):
    texts = [boxed(4), boxed(5), boxed(6), boxed(6), boxed(1), boxed(2)]
    _, result = measure(Unscorable(scorer, [1, 4, 5]), texts)
    assert result["unscorable"] == 3
    assert result["pass_at_1"] == 1.0 and result["pass_at_1_se"] == 0  # the third question has no score at all
    assert result["cons_at_k"] == 0.75  # the answer without a score is as frequent as the right one
    _, nothing = measure(Unscorable(scorer, range(6)), texts)
    assert all(nothing[key] is None for key in ("pass_at_1", "pass_at_1_se", "cons_at_k", "cons_at_k_se"))
    assert nothing["unscorable"] == 6 and nothing["examples"][0]["accuracy"] is None
    _, result = measure(scorer, ["Hello!", boxed(4)], [Problem("o", "Hi?", "", "open"), PROBLEMS[0]])
    assert (result["unscorable"], result["pass_at_1"]) == (1, 1.0)


def vote(*answers, kind="math", correct=None):
    texts = [boxed(answer) if answer is not None else "nothing" for answer in answers]
    return consensus(kind, "p", texts, correct or [float(answer in (1, "1", "1.0")) for answer in answers])


@pytest.mark.parametrize(("answers", "expected"), [
    ((1, 1, 2), 1.0),
    ((1, 2, 2), 0.0),
    ((1, 2), 0.5),  # both are as frequent: each has its share
    ((1, 2, 3), 1 / 3),
    ((1, 1, 2, 2, 3), 0.5),
    ((1, "1.0", "1", 2, 2), 1.0),  # right answers are one answer, however they are written
    ((None, None, 1), 1.0),  # without an answer there is no vote
    ((None, None), 0.0),
    ((1,), 1.0),
])
def test_the_most_frequent_answer_decides(answers, expected):
    assert vote(*answers) == pytest.approx(expected)


def test_what_has_no_score_has_the_vote_of_a_wrong_answer():
    nan = math.nan
    assert vote(2, 2, 1, correct=[nan, nan, 1.0]) == 0.0
    assert vote(2, 3, 1, 1, correct=[nan, nan, 1.0, 1.0]) == 1.0
    assert math.isnan(vote(2, 1, correct=[nan, nan])) and math.isnan(vote(None, correct=[nan]))
    assert math.isnan(vote(1, 1, kind="code"))  # programs are not compared
    assert vote(1, 1, 2, correct=[1.0, 0.0, 0.0]) == pytest.approx(1 / 3)  # the text around an answer may count too


@pytest.mark.parametrize(("kind", "answers", "expected"), [
    ("math", ["17", "17.0", "18"], 0.0),  # wrong answers that are read as the same number
    ("exact", ["a b", "c  d", "c d"], 0.0),
    ("choice", ["B", "A", "(A)"], 0.0),
    ("choice", ["B", "A", "C"], 1 / 3),
])
def test_wrong_answers_are_the_same_that_are_read_as_the_same(kind, answers, expected):
    right = {"math": "18", "exact": "a b", "choice": "B"}[kind]
    texts = [rf"\boxed{{{answer}}}" for answer in answers]
    assert consensus(kind, "", texts, [float(answer == right) for answer in answers]) == pytest.approx(expected)


def test_reflective_words_are_whole_words_in_any_case():
    assert reflective_words("Wait, but I should check. WRONG!") == 4
    assert reflective_words("waiter butter checks evaluated") == 0
    assert reflective_words("我check一下 wait不对") == 2


def test_a_models_evaluation_is_repeatable(scorer):
    tokenizer = make_tokenizer()
    sampler = TransformersSampler(make_model(tokenizer, end_scale=1.0), tokenizer)
    settings = Eval(samples=3, max_new_tokens=6)
    found = [evaluate(sampler, PROBLEMS, scorer, settings, template=Template("r1_zero", tokenizer), seed=seed)
             for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0]["examples"] != found[2]["examples"]


def test_the_model_of_a_stage_is_measured_as_the_recipe_says(tmp_path):
    found = evaluate_model(stage_of(tmp_path, [".eval.questions=3"]), "base")
    assert (found["questions"], found["k"], found["max_new_tokens"]) == (3, 2, 6)
