"""From the directory of a finished run to a small result file: the curves of its RL stages and every evaluation.

    python benchmarks/recipe_result.py runs/demo_r1

writes benchmarks/results/recipe/demo_r1.json, from which README's picture and table are made. Date, device, versions
and sources are those that the trainer noted in the manifest of the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from r1kernels.train.chain import read_manifest
from r1kernels.train.log import METRICS, read_lines

FOLDER = Path(__file__).resolve().parent / "results" / "recipe"
# What must be the same in all stages. The date and the commit are those of the last one.
SAME = ("device", "instruction_set", "threads", "r1kernels", "torch", "transformers", "sources")
# Of the stages of recipes/demo_r1.yaml, for readers who do not know their names.
LABELS = {
    "base": "base", "r1_zero": "R1-Zero", "cold_start": "cold start", "reasoning": "reasoning RL", "sft": "SFT",
    "r1": "R1", "small_base": "small base", "distilled": "distilled", "small_rl": "RL instead of distillation",
    "distilled_logits": "distilled from logits", "ppo_95": "PPO, lambda 0.95", "ppo_100": "PPO, lambda 1",
}
CURVES = {"pass_at_1": "pass_at_1", "reward": "reward_accuracy", "completion_length": "length"}


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each step. Only some steps have an evaluation: elsewhere pass@1 is null."""
    return [{"step": line["step"], **{name: line.get(key) for name, key in CURVES.items()}} for line in lines]


def stage(name: str, kind: str, record: dict[str, Any]) -> dict[str, Any]:
    """The evaluation at the end of a stage; shares are in percent, lengths in tokens."""
    found = record["evaluation"]
    return {
        "name": name, "label": LABELS.get(name, name.replace("_", " ")), "kind": kind,
        "pass_at_1": 100 * found["pass_at_1"],
        "plus_minus": 100 * found["pass_at_1_se"], "language_consistency": 100 * found["language"],
        "format": 100 * found["format"], "completion_length": found["length"],
    }


def origin(run_dir: Path, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What all stages ran with. Raises SystemExit if a stage does not say it, or if two differ."""
    unknown = [name for name, record in records.items() if not record.get("origin")]
    if unknown:
        raise SystemExit(f"{run_dir}: the manifest does not say what stages {', '.join(unknown)} ran with ('origin' is "
                         "missing); run them again")
    origins = [(name, each) for name, record in records.items() for each in record["origin"]]
    _, last = max(reversed(origins), key=lambda item: item[1]["date"])  # of one day, the last
    different = [f"{name}: {field} is {each[field]!r}" for name, each in origins for field in SAME
                 if each[field] != last[field]]
    if different:
        wanted = ", ".join(f"{field} {last[field]!r}" for field in SAME)
        raise SystemExit(f"{run_dir}: stages ran with different things ({'; '.join(different)}); expected those of the "
                         f"last one ({wanted}) everywhere; run the stages again")
    return {name: last[name] for name in ("date", *SAME, "commit")}


def collect(run_dir: Path) -> dict[str, Any]:
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    records = read_manifest(run_dir)
    unfinished = [name for name in config["stages"] if records.get(name, {}).get("status") != "finished"]
    if unfinished:
        raise SystemExit(f"{run_dir}: stages {', '.join(unfinished)} are not finished; run the recipe to its end")
    kinds = {name: settings["kind"] for name, settings in config["stages"].items()}
    return {
        "format": 1, "recipe": f"recipes/{run_dir.name}.yaml",
        "seed": config["seed"], **origin(run_dir, {name: records[name] for name in kinds}),
        "precision": config["precision"],
        "curves": {name: curve(read_lines(run_dir / name / METRICS)) for name, kind in kinds.items() if kind == "grpo"},
        "stages": [stage(name, kind, records[name]) for name, kind in kinds.items() if records[name].get("evaluation")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="the directory of a finished run, such as runs/demo_r1")
    parser.add_argument("--name", help="of the result file; by default, that of the directory")
    given = parser.parse_args()
    result = collect(given.run)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{given.name or given.run.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
