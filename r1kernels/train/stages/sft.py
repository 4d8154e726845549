"""Supervised fine-tuning: next-token training on the responses of samples, never on their prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from r1kernels.train.config import Recipe
from r1kernels.train.stage import Stage
from r1kernels.train.supervised import Start, SupervisedConfig, check_samples, cross_entropy, train_on_samples


@dataclass(frozen=True)
class Config(SupervisedConfig):
    """Those of `SupervisedConfig`, whose defaults are the paper's for the cold start."""

    kind: Literal["sft"]

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        check_samples(self.samples)


def run(stage: Stage) -> dict[str, Any]:
    return train_on_samples(stage, Start.of(stage), cross_entropy)
