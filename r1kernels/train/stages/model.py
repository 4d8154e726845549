"""A model from elsewhere: a directory, or a name of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1kernels.train.config import Recipe
from r1kernels.train.schema import ConfigError
from r1kernels.train.stage import Stage


@dataclass(frozen=True)
class Config:
    name: str
    kind: Literal["model"]
    path: str

    def check(self, recipe: Recipe) -> None:
        run_dir = Path(recipe.run_dir)
        if Path(self.path).resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(f"'path' {self.path!r} lies in 'run_dir' {str(run_dir)!r}; name another run_dir")


def run(stage: Stage) -> dict[str, Any]:
    """Loads it, so that what is wrong with it shows before any work."""
    model, tokenizer = stage.load_model(stage.config.name)
    stage.template(tokenizer)
    return {"architecture": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
