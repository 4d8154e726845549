"""A model from elsewhere: a directory, or a name of the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from r1kernels.train.config import Recipe
from r1kernels.train.schema import Scalar
from r1kernels.train.stage import Stage


@dataclass(frozen=True)
class Config:
    """`overrides`: fields of the model's configuration to change, such as max_position_embeddings."""

    name: str
    kind: Literal["model"]
    path: str
    overrides: dict[str, Scalar] = field(default_factory=dict)

    def check(self, recipe: Recipe) -> None:
        """What is wrong with a model shows when its tokenizer is loaded, before any work."""


def run(stage: Stage) -> dict[str, Any]:
    """Loads it, so that what is wrong with it shows before any work."""
    model, tokenizer = stage.load_model(stage.config.name)
    stage.template(tokenizer)
    return {"architecture": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
