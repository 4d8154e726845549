"""Stages that do nothing but write down that they ran, so that chains of them take no time."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import yaml

from r1kernels.train import chain
from r1kernels.train.chain import Chain, Plan
from r1kernels.train.checkpoint import latest_checkpoint, save_checkpoint
from r1kernels.train.config import load_recipe
from r1kernels.train.console import Console
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.stages import KINDS


@dataclasses.dataclass(frozen=True)
class Config:
    """Leaves `text`, or one that follows from all it is given."""

    name: str
    kind: Literal["fake"]
    model: str | None = None
    teacher: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    text: str | None = None
    steps: int = 1

    grows = ("steps",)

    def check(self, recipe: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Saved:
    """A "model" of one file."""

    text: str

    def save_pretrained(self, directory: Path) -> None:
        (directory / "weights").write_text(self.text)


@dataclasses.dataclass(frozen=True)
class Measured:
    text: str
    examples: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"pass_at_1": 0.5, "length": 1.0, "of": self.text}


class World:
    """A run directory and a recipe of fake stages; `ran` and `measured` name what was done since they were read."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
        self.log: list[str] = []
        self.fail: dict[str, BaseException] = {}  # by stage: raised after its work was saved, before it ends
        self.values: dict[str, Any] = {"run_dir": str(self.run_dir), "data": {"sums": {"kind": "arithmetic"}}}
        module = ModuleType("r1kernels.train.stages.fake")
        module.Config, module.run = Config, self._work
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(KINDS, "fake", "model")
        monkeypatch.setattr(chain, "evaluate_model", self._measure)

    def stages(self, **stages: dict[str, Any]) -> None:
        self.values["stages"] = [{"name": name, "kind": "fake", **keys} for name, keys in stages.items()]

    def chain(self, *overrides: str, **options: Any) -> Chain:
        self.path.write_text(yaml.safe_dump(self.values))
        return Chain(load_recipe(self.path, overrides), **options)

    def plan(self, *overrides: str, **options: Any) -> dict[str, Plan]:
        return {plan.name: plan for plan in self.chain(*overrides, **options).plan()}

    def actions(self, *overrides: str, **options: Any) -> str:
        return " ".join(plan.action for plan in self.plan(*overrides, **options).values())

    def run(self, *overrides: str, **options: Any) -> str:
        """Runs the chain; returns what ran and was measured."""
        self.log.clear()
        self.run_dir.mkdir(exist_ok=True)
        made = self.chain(*overrides, **options)
        made.run(Console(plain=True), Interrupt())
        return " ".join(self.log)

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "manifest.json").read_text())["stages"]

    def left_by(self, name: str) -> str:
        return (latest_checkpoint(self.run_dir / name) / "model" / "weights").read_text()

    def _work(self, stage: Any) -> dict[str, Any]:
        config = stage.config
        self.log.append(config.name)
        given = [str((Path(stage.model_dir(name)) / "weights").read_text()) for name in (config.model, config.teacher)
                 if name is not None]
        text = config.text if config.text is not None else f"{config.name}({','.join(given)})x{config.steps}"
        save_checkpoint(
            stage.directory, config.steps, model=Saved(text), tokenizer=Saved(text), state={}, keep=2
        )
        if config.name in self.fail:
            raise self.fail.pop(config.name)
        return {"steps": config.steps}

    def _measure(self, recipe: Any, path: Path, interrupt: Interrupt, overrides: dict[str, Any]) -> Measured:
        self.log.append(f"{path.parents[2].name}?")
        if f"{path.parents[2].name}?" in self.fail:
            raise self.fail.pop(f"{path.parents[2].name}?")
        return Measured((path / "weights").read_text())
