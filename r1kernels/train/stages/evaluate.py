"""An evaluation with settings of its own, beside the one that ends every stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from r1kernels.train.config import EvalConfig, Recipe
from r1kernels.train.evaluate import PARTS, evaluate_model
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.stage import Stage, model_overrides


@dataclass(frozen=True)
class Config:
    """`problems` are data sets with held-out problems; the rest as in `EvalConfig`."""

    name: str
    kind: Literal["evaluate"]
    model: str
    problems: list[str]
    questions: int = 128
    samples: int = 64
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 64
    batch_size: int = 512

    rewards: ClassVar[dict[str, float]] = PARTS

    def check(self, recipe: Recipe) -> None:
        check_ranges(
            self,
            at_least_1=("questions", "samples", "max_new_tokens", "batch_size"),
            positive=("temperature", "top_p"),
            probability=("top_p",),
        )
        if not self.problems:
            raise ConfigError("'problems' is empty, expected the name of a data set at least")
        for name in self.problems:
            if not recipe.data[name].has_test:
                raise ConfigError(f"'problems' names {name!r}, which has no held-out problems, expected a 'test_path'")


def run(stage: Stage) -> dict[str, Any]:
    shared = {item.name for item in dataclasses.fields(EvalConfig)} - {"every"}
    settings = EvalConfig(**{name: getattr(stage.config, name) for name in shared})
    recipe = dataclasses.replace(stage.recipe, eval=settings)
    name = stage.config.model
    overrides = model_overrides(stage.recipe, name)
    return evaluate_model(recipe, stage.model_dir(name), stage.interrupt, overrides).as_dict()
