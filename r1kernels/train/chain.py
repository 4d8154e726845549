"""Runs the stages of a recipe in order, and decides which of them are new, finished, interrupted or out of date.

A finished stage is kept while its settings, its data, the outputs that it starts from, and the version of r1kernels
stay the same. When it runs again, its old directory is deleted first.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import filelock

import r1kernels
from r1kernels._origin import content_hash, note_origin, origin
from r1kernels.train import evaluate, grpo, reject, reward_model, supervised
from r1kernels.train.checkpoint import MODEL, latest_checkpoint, write_file
from r1kernels.train.errors import ConfigError, Interrupt, naming
from r1kernels.train.log import Console
from r1kernels.train.parallel import check, first, rank, report_activity
from r1kernels.train.recipe import LEAVES, Recipe
from r1kernels.train.recipe_file import dump_recipe, references
from r1kernels.train.stage import SELECTED, Stage

CONFIG, MANIFEST = "config.yaml", "manifest.json"
RUN: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "model": lambda stage: {},  # its evaluation loads it
    "pretrain": supervised.run_pretrain, "sft": supervised.run_sft, "distill": supervised.run_distill,
    "grpo": lambda stage: grpo.GRPOTrainer(stage).run(), "reject": reject.run, "preference": reward_model.run,
}


def read_manifest(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """The records of the stages that ran, by name."""
    path = Path(run_dir, MANIFEST)
    with naming(f"{path} is damaged (use another 'run_dir')", (ValueError, KeyError, TypeError)):
        return json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}


class Chain:
    """The stages of a recipe in its run directory. `start` and all stages that depend on it run again."""

    recipe: Recipe
    run_dir: Path
    records: dict[str, dict[str, Any]]
    forced: set[str | None]
    origin: dict[str, Any]

    def __init__(self, recipe: Recipe, *, start: str | None = None) -> None:
        self.recipe, self.run_dir = recipe, Path(recipe.run_dir)
        self.records, self.forced = first(lambda: read_manifest(recipe.run_dir)), {start}
        if start is not None and start not in recipe.stages:
            raise ConfigError(f"--from {start!r}: no such stage; expected one of {list(recipe.stages)}")
        for name in recipe.stages:
            if self.forced & self._named_by(name):
                self.forced.add(name)

    def plan(self) -> dict[str, tuple[str, str]]:
        """What `run` would do with each stage, and why. A stage after one that runs again is still skipped if that one
        leaves the same output. Raises ConfigError for a stage that can neither be kept nor continue."""
        plans: dict[str, tuple[str, str]] = {}
        for name in self.recipe.stages:
            plans[name] = self._decide(name, {other for other, (action, _) in plans.items() if action != "skip"})
        return plans

    def run(self, console: Console, interrupt: Interrupt) -> None:
        """Runs the stages and evaluates the models that they leave. Raises Interrupted once the state is saved. All
        ranks run it; the first one decides, and writes."""
        first(self.plan)  # raises before any work
        self._write()
        first(lambda: write_file(self.run_dir / CONFIG, dump_recipe(self.recipe)))
        self.origin = first(lambda: origin(self.recipe.device, trainer=True))
        console.say(f"device {self.recipe.device}, models compute in {self.recipe.dtype}")
        for number, (name, settings) in enumerate(self.recipe.stages.items(), start=1):
            check(interrupt)
            action, why = first(lambda name=name: self._decide(name, set()))
            console.say(f"[{number}/{len(self.recipe.stages)}] {name}: {action}: {why}")
            report_activity(name)
            before = self.records.get(getattr(settings, "model", None), {}).get("evaluation")
            stage = Stage(self.recipe, settings, self.run_dir / name, console, interrupt, before)
            if action != "skip":
                self._run(stage, resumed=action == "continue")
            if LEAVES[settings.kind] == "model":
                self._evaluate(stage)

    def _run(self, stage: Stage, resumed: bool) -> None:
        name, kind = stage.settings.name, stage.settings.kind
        if not resumed:
            self.records.pop(name, None)
            self._write()  # first, so that after a kill the old directory is not taken for the new one
            first(lambda: (shutil.rmtree(stage.directory, ignore_errors=True), stage.directory.mkdir()))
            self.records[name] = {
                "kind": kind, "status": "running", "origin": [], "output": None,
                "settings": first(lambda: self._inputs(stage.settings, self._named_by(name))), "summary": {},
                "seconds": 0.0, "evaluation": None}
        self._note_origin(name)
        record, started = self.records[name], time.monotonic()
        try:
            summary = RUN[kind](stage)
        finally:
            record["seconds"] += time.monotonic() - started
            if rank() == 0:
                self._write_manifest()
        evaluation = summary.pop("evaluation", None)
        if evaluation and not resumed:  # else perhaps with older settings
            record["evaluation"] = {**evaluation, "settings": self._eval_settings()}
        record |= {"status": "finished", "summary": summary, "output": first(lambda: self._output(name))}
        self.forced.discard(name)
        self._write()

    def _note_origin(self, name: str) -> None:
        note_origin(self.records[name]["origin"], self.origin)
        self._write()

    def _evaluate(self, stage: Stage) -> None:
        """Measures the model that a stage left, unless that was done with the same settings."""
        name, settings = stage.settings.name, self._eval_settings()
        if (self.records[name]["evaluation"] or {}).get("settings") != settings:
            stage.console.say(f"{name}: evaluating")
            self._note_origin(name)
            started, found = time.monotonic(), evaluate.evaluate_model(stage, name)
            self.records[name]["evaluation"] = found | {"settings": settings, "seconds": time.monotonic() - started}
            self._write()
            share = "-" if found["pass_at_1"] is None else f"{found['pass_at_1']:.1%}"
            stage.console.say(f"{name}: pass@1 {share}, length {found['length']:.1f} tokens")

    def _eval_settings(self) -> dict[str, Any]:
        return first(lambda: self._inputs(self.recipe.eval, self.recipe.eval_problems))

    def _decide(self, name: str, stale: set[str]) -> tuple[str, str]:
        """What to do with a stage, and why, if the `stale` ones run before it."""
        record, named = self.records.get(name), self._named_by(name)
        if record is None:
            return "run", "new"
        if name in self.forced:
            return "rerun", "requested by --from"
        finished, old = record["status"] == "finished", record["settings"]
        new = self._inputs(self.recipe.stages[name], named)
        changed = [key for key in old | new if old.get(key) != new.get(key)]
        why = "; ".join([f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
                        + [f"{other} runs first" for other in sorted(named & stale)])
        if not finished and any(not key.startswith("output of") for key in changed):
            raise ConfigError(f"stage '{name}' was interrupted, and its settings changed ({why}); change them back to "
                              f"continue, or use --from {name} to run it again")
        if why:
            return "rerun", why
        if not record.get("origin"):
            raise ConfigError(f"{self.run_dir / MANIFEST} does not say which version ran stage '{name}'; use --from "
                              f"{name} to run it again with r1kernels {r1kernels.__version__}")
        version = record["origin"][-1]["r1kernels"]
        if version != r1kernels.__version__:
            raise ConfigError(f"r1kernels {version} ran stage '{name}', and this is {r1kernels.__version__}; install "
                              f"that version to continue, or use --from {name} to run it again")
        if not finished:
            return "continue", "it was interrupted"
        if self._output(name) != record["output"]:
            return "rerun", "its output is missing or damaged"
        return "skip", "finished, and nothing changed"

    def _named_by(self, name: str) -> set[str]:
        """The stages and data sets that a stage works on."""
        return {other for _, other, _ in references(self.recipe.stages[name])}

    def _inputs(self, settings: Any, names: Iterable[str]) -> dict[str, Any]:
        """Everything that a stage or an evaluation depends on, except the version, in the form of the manifest.
        `names` are the data sets and stages that it works on; their content counts."""
        found = {key: getattr(self.recipe, key) for key in (
            "seed", "gradient_checkpointing", "optimizer_state", "compile", "template", "open_think")}
        found |= settings.model_dump(exclude={"every"}) | {"precision": str(self.recipe.dtype)}
        if getattr(settings, "kind", "eval") in ("grpo", "reject", "eval"):
            found["scoring"] = self.recipe.scoring.model_dump(exclude={"workers"})
        for name in names:
            if name in self.recipe.data:
                data = self.recipe.data[name].model_dump()
                files = {key: content_hash(data[key]) for key in ("path", "test_path") if data.get(key)}
                found[f"data {name}"] = data | files
            else:
                found[f"output of {name}"] = self.records.get(name, {}).get("output")
        return json.loads(json.dumps(found, default=str))

    def _output(self, name: str) -> str | None:
        """A hash of what a finished stage left; None if it is missing."""
        settings, checkpoint = self.recipe.stages[name], latest_checkpoint(self.run_dir / name)
        if settings.kind == "model":
            return content_hash(settings.path)
        path = self.run_dir / name / SELECTED if settings.kind == "reject" else checkpoint and checkpoint / MODEL
        return content_hash(path) if path and path.exists() else None

    def _write(self) -> None:
        first(self._write_manifest)

    def _write_manifest(self) -> None:
        content = {"order": list(self.recipe.stages), "stages": self.records}
        write_file(self.run_dir / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def claim(recipe: Recipe) -> filelock.AcquireReturnProxy[Any]:
    """Locks the run directory for this process. Refuses a directory with files that no run wrote."""
    run_dir = Path(recipe.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / MANIFEST).exists() and any(not path.name.startswith(".") for path in run_dir.iterdir()):
            raise ConfigError(f"'run_dir' {recipe.run_dir!r} contains files that no run wrote; use another directory")
        return filelock.FileLock(run_dir / ".lock").acquire(blocking=False)
    except (filelock.Timeout, OSError) as error:
        why = "another process uses it" if isinstance(error, filelock.Timeout) else error.strerror
        raise ConfigError(f"'run_dir' is {recipe.run_dir!r}, which cannot be used: {why}") from error
