"""Blocks of numbers say how a reader must read them."""

import json
import re
from pathlib import Path

import make_numbers
import number_blocks
import pytest
import recipe_result
import yaml

ROOT = make_numbers.ROOT


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(number_blocks, "TWO_THREADS", tmp_path)
    return tmp_path


def row(**more: object) -> dict:
    return {"op": "trl_step", "shape": "N", "implementation": "ours", "peak_extra_bytes": 2**20, "median_s": 2.0,
            "ratio": 0.5, "rounds": 7, **more}


def test_the_comparison_with_trl_has_rounds_and_spread(results: Path) -> None:
    ranges = {"range_s": [1.0, 3.0], "range_of_ratios": [0.25, 0.75]}
    (results / "trl_step.json").write_text(json.dumps({"results": [row(**ranges)]}))
    text = number_blocks.trl_step().text
    assert "| 2.00 s (1.00 s to 3.00 s) | 0.50 (0.25 to 0.75) |" in text and "7 rounds" in text
    assert "not recorded" not in text


def test_a_spread_that_was_not_recorded_is_said_to_be_missing(results: Path) -> None:
    (results / "trl_step.json").write_text(json.dumps({"results": [row()]}))
    text = number_blocks.trl_step().text
    assert "| 2.00 s | 0.50 |" in text and "7 rounds" in text and "not recorded" in text


def test_every_stage_of_the_recipe_that_is_shown_has_a_label() -> None:
    recipe = yaml.safe_load((ROOT / "recipes/demo_r1.yaml").read_text(encoding="utf-8"))
    shown = json.loads((ROOT / "benchmarks/results/recipe/demo_r1.json").read_text(encoding="utf-8"))["stages"]
    assert {stage["name"] for stage in shown} == set(recipe_result.LABELS) <= set(recipe["stages"])
    found = {"pass_at_1": 0.5, "pass_at_1_se": 0.1, "language": 1.0, "format": 1.0, "length": 9.0}
    stages = [recipe_result.stage(name, "grpo", {"evaluation": found}) for name in (*recipe_result.LABELS, "my_stage")]
    table = number_blocks.stages({"recipe": "recipes/demo_r1.yaml", "seed": 0, "stages": stages})
    head = re.split(r" \| ", table.splitlines()[0].strip("| "))
    assert head[1:] == [*recipe_result.LABELS.values(), "my stage"]
    assert {"R1-Zero", "PPO, lambda 0.95", "PPO, lambda 1", "RL instead of distillation"} < set(head)
