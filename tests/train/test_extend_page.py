"""The functions of docs/extend.md are one module, and the recipe of that page finds and uses them."""

import math
import re
from pathlib import Path

import pytest

from r1kernels.rewards import Scorer
from r1kernels.train.data import load_problems
from r1kernels.train.recipe_file import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    blocks = {language: re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
              for language in ("python", "yaml")}
    (tmp_path / "my_functions.py").write_text("\n".join(blocks["python"]), encoding="utf-8")
    [yaml] = blocks["yaml"]
    (tmp_path / "mine.yaml").write_text(yaml, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)  # restores what the recipe adds to the search path
    return load_recipe(tmp_path / "mine.yaml")


def test_the_recipe_of_the_page_finds_all_functions(recipe):
    stage = recipe.stages["rl"]
    assert stage.objective.build().is_token_local

    train, test = (load_problems(recipe, "lengths", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 10)  # `most` of the recipe is 40
    assert not {one.question for one in train} & {one.question for one in test}

    with Scorer(stage.rewards) as scorer:
        right = train[0].answer
        texts = [f"<answer>{right}</answer>", f"<answer>{right.split()[0]}</answer>", "<answer>7 cm</answer>"]
        scores = scorer.score([*texts, "<answer>7</answer>"], answer=[right] * 3 + ["7"])
    assert scores.parts["accuracy"] == [1.0, 1.0, 0.0, 1.0]
    assert scores.parts["my_functions:states_a_unit"][:3] == [1.0, 0.0, 1.0]
    assert math.isnan(scores.parts["my_functions:states_a_unit"][3]) and scores.total[:3] == [1.5, 1.0, 0.5]
