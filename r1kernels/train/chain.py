"""The chain of a recipe: which stages must run, in which order, and the manifest that remembers what they came from.

A finished stage whose configuration, code, data and inputs have not changed is skipped. One that changed is run again,
and so is what depends on it, if its output differs. What it replaces is moved to `superseded/`, never deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import graphlib
import hashlib
import json
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from r1kernels.train.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from r1kernels.train.checkpoint import MODEL, CheckpointError, latest_checkpoint, tidy_checkpoints
from r1kernels.train.config import Recipe, as_dict, references
from r1kernels.train.console import Console
from r1kernels.train.evaluate import evaluate_model
from r1kernels.train.files import sha256, write_atomically
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.problems import data_files
from r1kernels.train.schema import ConfigError, differences
from r1kernels.train.stage import SELECTED, Stage, model_dir, model_overrides
from r1kernels.train.stages import KINDS, stage_module

MANIFEST, SUPERSEDED, FORMAT = "manifest.json", "superseded", 1
_RECORD = ("kind", "status", "config", "hashes", "output", "summary", "seconds", "evaluation")  # of a stage
# Modules that show results and compute none, so that a change of them makes no stage stale.
_SHOWS = (
    "cli", "columns", "console", "curves", "follow", "record", "report", "report_html", "tables", "trackers", "watch"
)
# Files up to this size are hashed whole; of larger ones of a model from elsewhere, name, size and time of change count.
_WHOLE = 2**24


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done with a stage: `skip`, `run`, `continue`, `rerun` or `refuse`, and why."""

    name: str
    action: str
    why: str


def order(recipe: Recipe) -> list[str]:
    """Names of stages, each after those it depends on, else in the order of the recipe, models from elsewhere first.

    Raises:
        ConfigError: stages depend on each other in a circle.
    """
    needs = {stage.name: dependencies(recipe, stage) for stage in recipe.stages}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        raise ConfigError(f"'stages' depend on each other in a circle: {' <- '.join(error.args[1])}") from None
    names = [stage.name for stage in sorted(recipe.stages, key=lambda stage: stage.kind != "model")]
    done: list[str] = []
    while len(done) < len(names):
        done.append(next(name for name in names if name not in done and needs[name] <= set(done)))
    return done


def dependencies(recipe: Recipe, stage: Any) -> set[str]:
    """The stages that a stage takes something from."""
    return {name for _, name in references(stage)} - set(recipe.data)


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """The records of the stages, by name; none where nothing was run yet.

    Raises:
        ConfigError: the manifest is damaged or of an unknown format.
    """
    path = Path(run_dir) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("stages"), dict):
        raise ConfigError(f"{path} is damaged or of another version, expected format {FORMAT} with 'stages'")
    for name, record in content["stages"].items():
        missing = [key for key in _RECORD if not isinstance(record, dict) or key not in record]
        if missing:
            raise ConfigError(f"{path} is damaged: the record of stage '{name}' has no '{missing[0]}'")
    return content["stages"]


class Chain:
    """The stages of a recipe in its run directory.

    Args:
        start: this stage and all that depend on it are run again.
        trust_code: a change of the code alone makes no stage stale.
    """

    def __init__(self, recipe: Recipe, *, start: str | None = None, trust_code: bool = False) -> None:
        self.recipe, self.run_dir, self.trust_code = recipe, Path(recipe.run_dir), trust_code
        self.order = order(recipe)
        if start is not None and start not in self.order:
            raise ConfigError(f"--from {start!r}: no such stage, expected one of {', '.join(self.order)}")
        self.records = read_manifest(self.run_dir)
        self.start, self.forced = start, {start} if start else set()
        for name in self.order:
            if self.forced & self._needs(name):
                self.forced.add(name)

    def plan(self) -> list[Plan]:
        """What `run` would do now. Stages behind one that runs are skipped after all if its output stays the same."""
        stale: set[str] = set()
        plans = []
        for name in self.order:
            plan = self._decide(name, stale)
            if plan.action != "skip":
                stale.add(name)
            plans.append(plan)
        return plans

    def run(self, console: Console, interrupt: Interrupt) -> None:
        """Runs what is to be run, each stage followed by an evaluation of its model.

        Raises:
            Interrupted: after the stage at work has saved its state.
        """
        for index, name in enumerate(self.order):
            interrupt.check()
            plan = self._decide(name, set())
            console.stage(name, index + 1, len(self.order), f"{plan.action}: {plan.why}")
            if plan.action == "refuse":
                raise ConfigError(
                    f"stage '{name}' was interrupted, and {plan.why}: --trust-code continues it, --from {name} begins "
                    "anew"
                )
            if plan.action != "skip":
                try:
                    self._run(name, plan, console, interrupt)
                except BaseException:
                    console.say(f"stage '{name}' did not finish; what it has done so far is in {self.run_dir / name}")
                    raise
            elif self.trust_code:
                self.records[name]["hashes"]["code"] = code_hash()
                self._write()
            self._evaluate(name, console, interrupt)

    def _run(self, name: str, plan: Plan, console: Console, interrupt: Interrupt) -> None:
        config, started = self.recipe.stage(name), time.monotonic()
        directory = self.run_dir / name
        spent = self.records[name]["seconds"] if plan.action == "continue" else 0.0
        record = {
            "kind": config.kind, "status": "running", "config": self._settings(name), "hashes": self._hashes(name),
            "output": None, "summary": {}, "seconds": spent, "evaluation": None,
        }
        record["fingerprint"] = _digest(record["hashes"])
        try:
            if plan.action in ("run", "rerun") and directory.exists():
                self._supersede(directory)
            self.records[name] = record
            self._write()
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be made: {error.strerror}; what was there stands") from error
        stage = Stage(self.recipe, config, directory, console, interrupt, before=self._before(config))
        try:
            summary = stage_module(config.kind).run(stage)
        except BaseException:
            record["seconds"] = spent + time.monotonic() - started
            with contextlib.suppress(ConfigError):  # what ended the stage is to be said, not what followed from it
                self._write()
            raise
        tidy_checkpoints(directory, self.recipe.checkpoint.keep)
        evaluation = summary.pop("evaluation", None)
        if evaluation and plan.action != "continue":  # measured by the stage itself, with the settings of now
            record["evaluation"] = {**evaluation, "settings": self._measured_with()}
        record |= {
            "status": "finished", "summary": summary, "output": self._output(name, summary),
            "seconds": spent + time.monotonic() - started,
        }
        self.forced.discard(name)
        self._write()

    def _evaluate(self, name: str, console: Console, interrupt: Interrupt) -> None:
        """Measures the model that a stage left, unless that was done with the same settings."""
        if KINDS[self.recipe.stage(name).kind] != "model":
            return
        record = self.records[name]
        if record["evaluation"] and record["evaluation"]["settings"] == self._measured_with():
            return
        console.phase(f"{name}: evaluating")
        path, started = model_dir(self.recipe, self.run_dir, name), time.monotonic()
        evaluation = evaluate_model(self.recipe, path, interrupt, model_overrides(self.recipe, name)).as_dict()
        seconds = time.monotonic() - started
        record["evaluation"] = {**evaluation, "settings": self._measured_with(), "seconds": seconds}
        self._write()
        console.evaluation(name, record["evaluation"])

    def _measured_with(self) -> str:
        """A hash of what an evaluation depends on beside the model."""
        data = self.recipe.eval_problems
        return _digest([
            {**as_dict(self.recipe.eval), "every": None}, self._shared(data, True),
            self._data_hashes(data, "test_path"),
        ])

    def _before(self, config: Any) -> dict[str, Any] | None:
        """The evaluation of the model that a stage starts from."""
        return (self.records.get(getattr(config, "model", None)) or {}).get("evaluation")

    def _decide(self, name: str, stale: set[str]) -> Plan:
        record = self.records.get(name)
        if record is None:
            return Plan(name, "run", "new")
        waits = sorted(self._needs(name) & stale)
        why = [f"asked for by --from {self.start}"] if name in self.forced else []
        config = self.recipe.stage(name)
        grows, now = getattr(config, "grows", ()), self._settings(name)
        changed = differences(record["config"], now)
        grown = [item for item in changed if item.partition(":")[0] in {f"stage.{key}" for key in grows}]
        more = all(now["stage"][key] >= record["config"]["stage"].get(key, 0) for key in grows)
        why += [item for item in changed if item not in grown or not more]
        hashes = self._hashes(name)
        other_code = hashes["code"] != record["hashes"]["code"] and not self.trust_code
        if other_code and record["status"] == "finished":
            why.append("the code or a library changed (--trust-code lets it stand)")
        why += [f"{key} changed" for key, value in hashes["data"].items() if record["hashes"]["data"].get(key) != value]
        why += [f"{dependency} is run first" for dependency in waits]
        why += [
            f"the output of {key} changed" for key, value in hashes["inputs"].items()
            if key not in stale and record["hashes"]["inputs"].get(key) != value
        ]
        if why:
            return Plan(name, "rerun", "; ".join(why))
        if record["status"] != "finished":
            # Not run again by itself: what it has done may have taken weeks.
            return Plan(name, "refuse", "the code or a library changed since") if other_code else Plan(
                name, "continue", "it was interrupted")
        if grown:
            return Plan(name, "continue", "; ".join(grown))
        if not self._stands(name):
            return Plan(name, "rerun", "its output is missing or damaged")
        return Plan(name, "skip", "finished, and nothing changed")

    def _needs(self, name: str) -> set[str]:
        return dependencies(self.recipe, self.recipe.stage(name))

    def _settings(self, name: str) -> dict[str, Any]:
        """All settings that a stage's result depends on."""
        config = self.recipe.stage(name)
        data = {other for _, other in references(config)} & set(self.recipe.data)
        judged = getattr(config, "pairs", None) in {stage.name for stage in self.recipe.stages}
        scored = hasattr(config, "rewards") or judged
        return {"stage": as_dict(config)} | self._shared(data, scored)

    def _shared(self, data: Any, scored: bool) -> dict[str, Any]:
        recipe = as_dict(self.recipe)
        scoring = {key: value for key, value in recipe["scoring"].items() if key != "workers"}
        return {
            **{key: recipe[key] for key in ("seed", "template", "open_think")},
            # Files count by what they hold, wherever they lie.
            "data": {key: {**recipe["data"][key], "path": None, "test_path": None} for key in sorted(data)},
            "scoring": scoring if scored else None,
        }

    def _hashes(self, name: str) -> dict[str, Any]:
        config = self.recipe.stage(name)
        data = {other for _, other in references(config)} & set(self.recipe.data)
        return {
            "config": _digest(self._settings(name)),
            "code": code_hash(),
            "data": self._data_hashes(data, "test_path" if config.kind == "evaluate" else "path"),
            "inputs": {key: (self.records.get(key) or {}).get("output") for key in sorted(self._needs(name))},
        }

    def _data_hashes(self, names: Iterable[str], key: str) -> dict[str, str]:
        files = data_files(self.recipe, set(names))
        return {name: _file_hash(path) for name, path in files.items() if name.endswith(f".{key}")}

    def _stands(self, name: str) -> bool:
        record = self.records[name]
        try:
            return self._output(name, record["summary"]) == record["output"]
        except (OSError, ConfigError, CheckpointError, ValueError, KeyError):
            return False

    def _output(self, name: str, summary: dict[str, Any]) -> str:
        """A hash of what a finished stage left."""
        config = self.recipe.stage(name)
        if config.kind == "model":
            return _model_hash(config.path)
        if KINDS[config.kind] == "samples":
            return _file_hash(self.run_dir / name / SELECTED)
        if KINDS[config.kind] == "measurements":
            return _digest(summary)
        checkpoint = latest_checkpoint(self.run_dir / name)
        if checkpoint is None:
            raise ConfigError(f"stage '{name}' left no checkpoint in {self.run_dir / name}")
        files = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))["files"]
        for file, entry in files.items():
            if (checkpoint / file).stat().st_size != entry["size"]:
                raise CheckpointError(f"damaged checkpoint: {checkpoint / file}")
        return _digest({file: entry["sha256"] for file, entry in files.items() if file.startswith(f"{MODEL}/")})

    def _supersede(self, directory: Path) -> None:
        shelf = self.run_dir / SUPERSEDED
        shelf.mkdir(exist_ok=True)
        parts = [entry.name.rpartition("-") for entry in shelf.iterdir()]
        taken = [int(number) for name, _, number in parts if name == directory.name and number.isdecimal()]
        directory.rename(shelf / f"{directory.name}-{max(taken, default=0) + 1}")

    def _write(self) -> None:
        content = {"format": FORMAT, "name": self.run_dir.absolute().name, "order": self.order, "stages": self.records}
        write_atomically(self.run_dir / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@functools.cache
def code_hash() -> str:
    """Of the sources of r1kernels that compute, its compiled kernels, and the versions of the libraries."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(
        path for pattern in ("*.py", "_C*.so") for path in root.rglob(pattern)
        if not (path.parent.name == "train" and path.stem in _SHOWS)
    )
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "math-verify")}
    return _digest({path.relative_to(root).as_posix(): _file_hash(path) for path in files} | versions)


def _model_hash(path: str) -> str:
    """Of a model from elsewhere: the files of a directory, or the name and the snapshot of one of the hub."""
    if not Path(path).is_dir():
        return _digest(path)
    return _digest({
        file.relative_to(path).as_posix(): _file_hash(file) if file.stat().st_size <= _WHOLE
        else [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(Path(path).rglob("*")) if file.is_file()
    })


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
