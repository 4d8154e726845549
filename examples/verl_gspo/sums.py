"""Data and reward for verl: sums of numbers below 100, whose answers are judged by `r1kernels.rewards`.

    python examples/verl_gspo/sums.py runs/verl                        # writes train.parquet and test.parquet

verl calls `compute_score` for each response; r1_gspo.yaml names it as the reward.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import datasets

from r1kernels import rewards

QUESTION = "What is {a} + {b}? Write your thought in <think> </think> and the result in <answer> </answer>."


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> dict:
    """`score` is the reward; verl logs the other values."""
    [accuracy] = rewards.accuracy([solution_str], answer=[ground_truth])
    [form] = rewards.format([solution_str])
    if accuracy is None:
        raise ValueError(f"ground_truth is {ground_truth!r} in {data_source!r}, expected a number or a formula")
    return {"score": accuracy + 0.2 * form, "accuracy": accuracy, "format": form}


def rows(split: str, count: int) -> list[dict[str, Any]]:
    """Problems in the columns that verl reads. Sums with a + b divisible by 7 are for tests only."""
    draw, found = random.Random(split), []
    while len(found) < count:
        a, b = draw.randrange(100), draw.randrange(100)
        if ((a + b) % 7 == 0) == (split == "test"):
            found.append({
                "data_source": "sums", "prompt": [{"role": "user", "content": QUESTION.format(a=a, b=b)}],
                "ability": "math", "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"split": split, "index": len(found)}})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 4096), ("test", 256)):
        datasets.Dataset.from_list(rows(split, count)).to_parquet(folder / f"{split}.parquet")
        print(f"{folder / split}.parquet has {count} problems")
