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


def origins(*changes: dict) -> dict[str, dict]:
    """Records of stages whose origins differ from one of an example."""
    fine = {"date": "2026-01-01", "device": "Example, 1 thread", "threads": 1, "instruction_set": "avx2",
            "r1kernels": "0.2.0", "torch": "2.13.0", "transformers": "5.0", "sources": "0123456789abcdef",
            "commit": "a1"}
    return {f"stage {number}": {"origin": [fine | change]} for number, change in enumerate(changes)}


def test_a_result_of_a_recipe_has_the_origin_of_its_stages() -> None:
    records = origins({}, {"date": "2026-01-02", "commit": "b2"}, {})
    found = recipe_result.origin(Path("runs/a"), records)
    assert (found["date"], found["commit"], found["torch"]) == ("2026-01-02", "b2", "2.13.0")
    assert recipe_result.origin(Path("runs/a"), origins({}, {"commit": "b2"}))["commit"] == "b2"


@pytest.mark.parametrize("field, value", [("torch", "2.11.0"), ("device", "Other"), ("sources", "fedcba9876543210")])
def test_a_recipe_that_ran_with_different_things_is_refused(field: str, value: str) -> None:
    with pytest.raises(SystemExit, match=f"stage 1.*{field}.*{value}"):
        recipe_result.origin(Path("runs/a"), origins({}, {field: value}, {"date": "2026-01-02"}))


def test_a_recipe_whose_origin_is_unknown_is_refused() -> None:
    records = origins({}, {}) | {"stage 1": {"status": "finished"}}
    with pytest.raises(SystemExit, match="stage 1"):
        recipe_result.origin(Path("runs/a"), records)
