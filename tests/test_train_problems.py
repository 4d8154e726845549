"""The data sets of a recipe: generated or read, and refused before any work where a stage could not use them."""

import json
import re

import pytest
import yaml

from r1kernels.train.config import load_recipe
from r1kernels.train.data import DataError, Demonstration, Pair
from r1kernels.train.problems import check_data, data_files, load_demonstrations, load_pairs, load_problems
from r1kernels.train.prompt import Template, render
from r1kernels.train.schema import ConfigError

BASE = {"name": "base", "kind": "pretrain"}
GRPO = {"name": "rl", "kind": "grpo", "model": "base", "problems": ["file"]}
SFT = {"name": "sft", "kind": "sft", "model": "base", "samples": ["file"]}
SCORES = {"name": "scores", "kind": "preference", "model": "base", "pairs": "file"}
EVALUATE = {"name": "more", "kind": "evaluate", "model": "base", "problems": ["file"]}


@pytest.fixture
def make(tmp_path):
    """A recipe with the data set `file`, of lines, for one stage beside a base model."""

    def made(stage=None, *, train=None, test=None, **keys):
        file = {"kind": "jsonl", **keys}
        for key, lines in (("path", train), ("test_path", test)):
            if lines is not None:
                file[key] = str(tmp_path / f"{key}.jsonl")
                (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = {
            "run_dir": str(tmp_path / "run"), "eval": {"questions": 3},
            "data": {"sums": {"kind": "arithmetic", "min_terms": 2, "max_terms": 3, "train_size": 10}, "file": file},
            "stages": [BASE, stage] if stage else [BASE],
        }
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(tmp_path / "x.yaml")

    return made


def sums(*numbers, **keys):
    return [{"question": f"{number} + 0?", "answer": str(number), **keys} for number in numbers]


def test_generated_problems_are_as_many_as_asked_for(make):
    recipe = make(train=sums(1))
    train, test = load_problems(recipe, "sums", "train"), load_problems(recipe, "sums", "test")
    assert (len(train), len(test)) == (10, 3)
    assert not {problem.question for problem in train} & {problem.question for problem in test}


def test_files_are_read_by_their_kind(make):
    recipe = make(train=sums(1, 2), test=sums(3, 4, 5, 6))
    assert [problem.answer for problem in load_problems(recipe, "file", "train")] == ["1", "2"]
    assert [problem.answer for problem in load_problems(recipe, "file", "test")] == ["3", "4", "5"]  # eval.questions
    assert {key: path.name for key, path in data_files(recipe, {"sums", "file"}).items()} == {
        "data.file.path": "path.jsonl", "data.file.test_path": "test_path.jsonl"
    }


def test_gsm8k_and_math_have_their_own_shape(make, tmp_path):
    recipe = make(train=[{"question": "q", "answer": "so #### 4"}], kind="gsm8k")
    assert load_problems(recipe, "file", "train")[0].answer == "4"
    recipe = make(train=[{"problem": "q", "answer": "4"}], test=[{"problem": "r", "answer": "5"}], kind="math")
    assert load_problems(recipe, "file", "train")[0].question == "q"
    assert load_problems(recipe, "file", "test")[0].question == "r"


@pytest.mark.parametrize("kind", ["jsonl", "math"])
def test_questions_of_the_test_are_not_trained_on(make, kind):
    key = "problem" if kind == "math" else "question"
    lines = [{key: f"{number}?", "answer": "1"} for number in range(4)]
    recipe = make(train=lines[:2], test=lines[1:3], kind=kind)
    with pytest.raises(ConfigError, match=r"'data.file.test_path' '.*' shares questions with its path '.*'"):
        check_data(recipe)


def test_what_every_stage_will_ask_for_is_read_before_any_work(make):
    responses = [{"question": "hi", "response": "hello"}]
    pairs = [{"question": "hi", "chosen": "hello", "rejected": "what"}]
    assert check_data(make(GRPO, train=sums(1))) == {"math"}
    assert check_data(make(GRPO, train=[{"question": "hi", "kind": "open"}])) == {"math", "open"}
    check_data(make(SFT, train=responses, test=sums(1)))
    check_data(make(SCORES, train=pairs, test=sums(1)))
    check_data(make(EVALUATE, test=sums(1)))


BAD = [
    (GRPO, {"train": []}, "path.jsonl holds nothing; expected one JSON object a line"),
    (GRPO, {"train": [*sums(1), {"question": "x"}]}, "path.jsonl, line 2: no 'answer', found: question"),
    (GRPO, {"train": sums(1), "test": [{"question": "x"}]}, "test_path.jsonl, line 1: no 'answer', found: question"),
    (GRPO, {"test": sums(1)}, "'data.file.path' is missing, expected a file"),
    (GRPO, {"path": "nowhere"}, "cannot read data file nowhere ('data.file.path'): no such file"),
    (GRPO, {"path": "."}, "cannot read data file . ('data.file.path'): no such file"),
    (SFT, {"train": sums(1)}, "path.jsonl, line 1: no 'response', found: answer, question"),
    (SFT, {"train": []}, "path.jsonl holds nothing"),
    (SFT, {"train": sums(1), "kind": "gsm8k"}, "'samples' names the data set 'file' of kind 'gsm8k', which has"),
    (SCORES, {"train": sums(1)}, "path.jsonl, line 1: no 'chosen', found: answer, question"),
    (SCORES, {"train": sums(1), "kind": "math"}, "'pairs' names the data set 'file' of kind 'math', which has"),
    (None, {"test": [{"question": "x"}]}, "test_path.jsonl, line 1: no 'answer'"),
    (EVALUATE, {"test": []}, "test_path.jsonl holds nothing"),
]


@pytest.mark.parametrize(("stage", "keys", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_data_that_a_stage_cannot_use_is_named(make, stage, keys, message):
    with pytest.raises((DataError, ConfigError), match=re.escape(message)):
        check_data(make(stage, **keys))


def test_an_evaluation_needs_held_out_problems(make):
    with pytest.raises(ConfigError, match="stage 'more': 'problems' names 'file', which has no held-out problems"):
        make(EVALUATE, train=sums(1))


def test_demonstrations_are_rendered_and_an_opened_thought_is_not_opened_again(make):
    lines = [{"question": " hi ", "response": "<think>so</think> hello"}, {"question": "x", "completion": "y"}]
    recipe = make(train=lines)
    plain, opened = (Template("r1_zero", None, open_think=opened) for opened in (False, True))
    assert load_demonstrations(recipe, "file", plain) == [
        Demonstration("file-0", render("hi"), "<think>so</think> hello"), Demonstration("file-1", render("x"), "y")
    ]
    assert load_demonstrations(recipe, "file", opened)[0] == Demonstration(
        "file-0", render("hi", open_think=True), "so</think> hello"
    )


def test_greetings_serve_as_problems_demonstrations_and_pairs(make):
    recipe = make(kind="greetings", train_size=5)
    problems = load_problems(recipe, "file", "train")
    assert len(problems) == 5 and {problem.kind for problem in problems} == {"open"}
    template = Template("r1_zero", None)
    assert len(load_demonstrations(recipe, "file", template)) == len(load_pairs(recipe, "file")) == 5
    for stage in (GRPO, SFT, SCORES):
        check_data(make(stage, kind="greetings", train_size=5))
        with pytest.raises(ConfigError, match="train_size' is 100000, expected at most"):
            check_data(make(stage, kind="greetings", train_size=100_000))


def test_pairs_are_read(make):
    recipe = make(train=[{"question": "q", "chosen": "a", "rejected": "b"}])
    assert load_pairs(recipe, "file") == [Pair("path-1", "q", "a", "b")]
