"""The README of examples/extensions is a recipe whose functions are found and used."""

import gzip
import itertools
import json
import math

import pytest
import torch
from supervised_cases import EXAMPLES, stage_of

import r1kernels
from r1kernels.rewards import EndpointError, Scorer
from r1kernels.train.data import load_problems
from r1kernels.train.recipe_file import build_recipe
from r1kernels.train.supervised import run_pretrain


@pytest.fixture
def stage(tmp_path):
    """The stage `base` of the README's recipe."""
    text = (EXAMPLES / "extensions" / "README.md").read_text(encoding="utf-8")
    recipe = text.partition("```yaml\n")[2].partition("```")[0].replace("../examples", str(EXAMPLES))
    return stage_of(recipe, "base", tmp_path)


def test_the_data_set(stage):
    train, test = (load_problems(stage.recipe, "products", split) for split in ("train", "test"))
    assert len(train) > len(test) > 10 and train[0].question.startswith("What is ")
    assert not {one.question for one in train} & {one.question for one in test}


def test_the_data_set_from_a_file_of_humaneval(stage, tmp_path):
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass"}
    with gzip.open(tmp_path / "rows.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    data = {"kind": "function", "function": "my_extensions:humaneval", "options": {"path": f"{tmp_path}/rows.gz"}}
    recipe = build_recipe(stage.recipe.model_dump() | {"data": {"code": data}} | {"stages": {
        "base": {"kind": "model", "path": "x"}}})
    [problem] = load_problems(recipe, "code", "test")
    assert (problem.id, problem.kind) == ("HumanEval/0", "code") and "def f():" in problem.question
    assert json.loads(problem.answer) == {key: row[key] for key in ("prompt", "entry_point", "test")}


def test_the_reward(stage):
    rewards = stage.recipe.stages["rl"].rewards
    with Scorer({name: weight for name, weight in rewards.items() if ":" in name}) as scorer:
        scores = scorer.score(["12", "It is 12", "12"], answer=["12", "12", ""], kind=["math", "math", "open"])
    assert scores.parts["my_extensions:brevity"][:2] == [1.0, 0.5]
    assert math.isnan(scores.parts["my_extensions:brevity"][2])


def test_the_reward_that_asks_a_language_model(stage, monkeypatch):
    stage.recipe.stages["rl"].objective.build()  # finds the module
    import my_extensions

    class FakeJudge:
        def __init__(self, url, model):
            assert (url, model) == ("http://localhost:1/v1", "m")

        def compare(self, question, first, second):
            if first == "lost":
                raise EndpointError("no answer")
            return 1.0 if len(first) > len(second) else -0.5

    monkeypatch.setattr(my_extensions, "Judge", FakeJudge)
    monkeypatch.setenv("JUDGE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("JUDGE_MODEL", "m")
    texts = ["<think>a</think> Hello", "Hi", "lost", "<think>a", "18"]
    with Scorer({"my_extensions:preferred": 1.0, "accuracy": 1.0}) as scorer:
        scores = scorer.score(texts, question=["Q?"] * 5, answer=["Hey"] * 4 + ["18"], kind=["open"] * 4 + ["math"],
                              prompts=["Q?"] * 5)
    assert scores.parts["my_extensions:preferred"] == pytest.approx([1.0, 0.25, math.nan, 0.0, 0.0], nan_ok=True)
    assert scores.unscorable == {"my_extensions:preferred": 1, "accuracy": 0}


def test_the_objective(stage):
    """Near a ratio of 1 its gradient is that of the ratio; far from it, there is none."""
    objective = stage.recipe.stages["rl"].objective.build()
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -3.0]])
    loss = r1kernels.policy_loss(
        logprobs, torch.tensor([2.0]), old_logprobs=old, ref_logprobs=None, mask=torch.ones(1, 2), objective=objective
    ).loss
    loss.backward()
    assert loss.item() == pytest.approx((-2.0 - 2.2) / 2)
    assert logprobs.grad[0, 0].item() == pytest.approx(-1.0) and abs(logprobs.grad[0, 1].item()) < 1e-6


def test_the_corpus(stage):
    settings = stage.settings.corpus
    first, again = (list(itertools.islice(settings.load()(0, 3, **settings.options), 50)) for _ in range(2))
    assert first == again and all(head.endswith(tuple("23456789")) for head, _ in first)
    assert run_pretrain(stage)["steps"] == 4
