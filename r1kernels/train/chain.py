"""Runs the stages of a recipe in order, and decides which of them are new, finished, interrupted or out of date.

A finished stage is kept while its settings, its data, the outputs that it starts from, and the version of r1kernels
stay the same. When it runs again, its old directory is kept as `.replaced-NAME` until the new one is finished.
"""

from __future__ import annotations

import contextlib
import graphlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

import r1kernels
from r1kernels.train import evaluate, grpo, reject, reward_model, supervised
from r1kernels.train.checkpoint import MODEL, latest_checkpoint, sha256, tidy_checkpoints, write_file
from r1kernels.train.errors import ConfigError, StorageError
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.log import Console
from r1kernels.train.recipe import LEAVES, RESERVED_NAMES, FileData, Recipe
from r1kernels.train.recipe_file import dump_recipe, load_recipe, read_yaml, references
from r1kernels.train.stage import SELECTED, Stage, model_overrides, model_path, run_model

CONFIG, MANIFEST, LOCK, PID, FORMAT = "config.yaml", "manifest.json", ".lock", ".pid", 2
RUN = {
    "model": run_model, "pretrain": supervised.run_pretrain, "sft": supervised.run_sft, "grpo": grpo.run,
    "distill": supervised.run_distill, "reject": reject.run, "preference": reward_model.run, "evaluate": evaluate.run,
}
HASHED_SIZE = 2**24  # larger files of a pretrained model count by their size and the time of their last change


@dataclass(frozen=True)
class Plan:
    """What happens with a stage: `run`, `skip`, `continue`, `rerun` or `refuse`, and why."""

    name: str
    action: str
    why: str


def order(recipe: Recipe) -> list[str]:
    """Names of the stages, each after those it depends on, otherwise as in the recipe, pretrained models first."""
    needs = {name: dependencies(recipe, name) for name in recipe.stages}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        raise ConfigError(f"'stages' depend on each other in a circle: {' <- '.join(error.args[1])}") from None
    waiting, done = sorted(needs, key=lambda name: recipe.stages[name].kind != "model"), []
    while waiting:
        done.append(next(name for name in waiting if needs[name] <= set(done)))
        waiting.remove(done[-1])
    return done


def dependencies(recipe: Recipe, name: str) -> set[str]:
    """The stages that a stage takes something from."""
    return {other for _, other, _ in references(recipe.stages[name])} - set(recipe.data)


def read_manifest(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """The records of the stages that ran, by name."""
    path = Path(run_dir) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"format": FORMAT, "stages": {}}
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
        for record in content["stages"].values():
            [record[key] for key in ("kind", "status", "version", "settings", "output", "seconds", "evaluation")]
        return content["stages"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or of another version of r1kernels: {error!r}") from error


class Chain:
    """The stages of a recipe in its run directory.

    Args:
        start: run this stage and all that depend on it again.
        ignore_version: reuse stages that another version of r1kernels ran.
    """

    def __init__(self, recipe: Recipe, *, start: str | None = None, ignore_version: bool = False) -> None:
        self.recipe, self.run_dir, self.ignore_version = recipe, Path(recipe.run_dir), ignore_version
        self.order, self.records = order(recipe), read_manifest(recipe.run_dir)
        if start is not None and start not in self.order:
            raise ConfigError(f"--from {start!r}: no such stage; expected one of {', '.join(self.order)}")
        self.forced = {start}
        for name in self.order:
            if self.forced & dependencies(recipe, name):
                self.forced.add(name)

    def plan(self) -> list[Plan]:
        """What `run` would do. A stage behind one that runs is kept after all if it starts from the same outputs."""
        plans: list[Plan] = []
        for name in self.order:
            plans.append(self._decide(name, {plan.name for plan in plans if plan.action != "skip"}))
        return plans

    def run(self, console: Console, interrupt: Interrupt) -> None:
        """Runs the stages and evaluates the models that they leave. Raises Interrupted once the state is saved."""
        for name, record in self.records.items():  # after a crash between the renaming and the new manifest
            if record["status"] == "finished" and not (self.run_dir / name).exists() and self._replaced(name).exists():
                self._replaced(name).rename(self.run_dir / name)
        for plan in self.plan():
            _check(plan)
        for number, name in enumerate(self.order, start=1):
            interrupt.check()
            plan = self._decide(name, set())
            _check(plan)
            console.stage(name, number, len(self.order), f"{plan.action}: {plan.why}")
            if plan.action != "skip":
                self._run(name, plan.action, console, interrupt)
            self._evaluate(name, console, interrupt)

    def _run(self, name: str, action: str, console: Console, interrupt: Interrupt) -> None:
        settings, directory, started = self.recipe.stages[name], self.run_dir / name, time.monotonic()
        replaced = self._replaced(name)
        record = {
            "kind": settings.kind, "status": "running", "version": r1kernels.__version__, "output": None, "summary": {},
            "seconds": self.records[name]["seconds"] if action == "continue" else 0.0, "evaluation": None,
            "settings": self._settings(name),
        }
        try:
            if action != "continue" and directory.exists():
                if replaced.exists():  # a finished stage is kept there, and this one was not finished
                    shutil.rmtree(directory)
                else:
                    directory.rename(replaced)
            self.records[name] = record
            self._write()
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {directory}: {error.strerror}; the existing output was kept") from error
        before = self.records.get(getattr(settings, "model", ""), {}).get("evaluation")
        try:
            summary = RUN[settings.kind](Stage(self.recipe, settings, directory, console, interrupt, before))
        except BaseException:
            record["seconds"] += time.monotonic() - started
            with contextlib.suppress(StorageError):  # the first error is the one to report
                self._write()
            console.say(f"stage '{name}' is not finished; its work so far is in {directory}")
            raise
        tidy_checkpoints(directory, self.recipe.checkpoint.keep)
        evaluation = summary.pop("evaluation", None)
        if evaluation and (action != "continue" or settings.kind == "evaluate"):  # else with older settings, perhaps
            record["evaluation"] = {**evaluation, "settings": self._eval_settings()}
        record |= {"status": "finished", "summary": summary, "output": self._output(name)}
        record["seconds"] += time.monotonic() - started
        self.forced.discard(name)
        self._write()
        shutil.rmtree(replaced, ignore_errors=True)

    def _evaluate(self, name: str, console: Console, interrupt: Interrupt) -> None:
        """Measures the model that a stage left, unless that was done with the same settings."""
        record, settings, started = self.records[name], self._eval_settings(), time.monotonic()
        if LEAVES[record["kind"]] != "model" or (record["evaluation"] or {}).get("settings") == settings:
            return
        console.phase(f"{name}: evaluating")
        path = model_path(self.recipe, self.run_dir, name)
        evaluation = evaluate.evaluate_model(self.recipe, path, interrupt, model_overrides(self.recipe, name))
        record["evaluation"] = {**evaluation, "settings": settings, "seconds": time.monotonic() - started}
        self._write()
        console.evaluation(name, record["evaluation"])

    def _decide(self, name: str, stale: set[str]) -> Plan:
        """What to do with a stage, if the `stale` ones run before it."""
        record, settings = self.records.get(name), self.recipe.stages[name]
        if record is None:
            return Plan(name, "run", "new")
        if name in self.forced:
            return Plan(name, "rerun", "requested by --from")
        finished = record["status"] == "finished"
        old, new = _flat(record["settings"]), _flat(self._settings(name))
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        own = [key for key in changed if not key.startswith("inputs.")]
        why = [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
        why += [f"{other} runs first" for other in sorted(dependencies(self.recipe, name) & stale)]
        steps = f"stages.{name}.steps"
        longer = settings.kind == "grpo" and changed == [steps] and len(why) == 1 and new[steps] > old[steps]
        longer = longer and not any(item.last_steps for item in settings.preference)  # else past steps would differ
        if own and not longer and not finished:
            return Plan(name, "refuse", f"it was interrupted, and its settings changed ({'; '.join(why)}); change them "
                        f"back to continue, or use --from {name} to run it again")
        if why and not longer:
            return Plan(name, "rerun", "; ".join(why))
        if record["version"] != r1kernels.__version__ and not self.ignore_version:
            return Plan(name, "refuse", f"r1kernels {record['version']} ran it, and this is {r1kernels.__version__}; "
                        f"use --ignore-version to reuse it, or --from {name} to run it again")
        if longer or not finished:
            return Plan(name, "continue", why[0] if why else "it was interrupted")
        if self._output(name) != record["output"]:
            return Plan(name, "rerun", "its output is missing or damaged")
        return Plan(name, "skip", "finished, and nothing changed")

    def _settings(self, name: str) -> dict[str, Any]:
        """All that the result of a stage depends on, except the version."""
        settings = self.recipe.stages[name]
        scores = settings.kind in ("grpo", "reject", "evaluate")
        data = sorted({other for _, other, _ in references(settings)} & self.recipe.data.keys())
        outputs = {other: self.records.get(other, {}).get("output") for other in dependencies(self.recipe, name)}
        shared = self._shared(data, scores, "test_path" if settings.kind == "evaluate" else "path")
        return _plain({"stages": {name: settings.model_dump()}, **shared, "inputs": outputs})

    def _shared(self, data: Iterable[str], scores: bool, path: str) -> dict[str, Any]:
        recipe, sets = self.recipe, {name: self.recipe.data[name].model_dump() for name in data}
        for name, values in sets.items():
            if isinstance(recipe.data[name], FileData):  # files count by their content, wherever they are
                file = values[path]
                values |= {"path": None, "test_path": None, "content": file and sha256(Path(file))[:16]}
        shared = {key: getattr(recipe, key) for key in ("seed", "template", "open_think")} | {"data": sets}
        return {**shared, "scoring": recipe.scoring.model_dump(exclude={"workers"})} if scores else shared

    def _eval_settings(self) -> str:
        """A hash of what an evaluation depends on besides the model."""
        shared = self._shared(self.recipe.eval_problems, True, "test_path")
        return _digest({**shared, "eval": self.recipe.eval.model_dump(exclude={"every"})})

    def _output(self, name: str) -> str | None:
        """A hash of what a finished stage left; None if it is missing."""
        kind, directory = self.recipe.stages[name].kind, self.run_dir / name
        with contextlib.suppress(OSError, ValueError, KeyError):
            if kind == "model":
                return _model_hash(Path(self.recipe.stages[name].path))
            if LEAVES[kind] == "samples":
                return sha256(directory / SELECTED)[:16]
            if LEAVES[kind] == "measurements":
                return "measured"
            checkpoint = latest_checkpoint(directory)
            if checkpoint is not None:
                files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
                if all((checkpoint / file).stat().st_size == entry["size"] for file, entry in files.items()):
                    return _digest({file: entry["sha256"] for file, entry in files.items() if file.startswith(MODEL)})
        return None

    def _replaced(self, name: str) -> Path:
        return self.run_dir / f".replaced-{name}"

    def _write(self) -> None:
        content = {"format": FORMAT, "name": self.run_dir.absolute().name, "order": self.order, "stages": self.records}
        write_file(self.run_dir / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _check(plan: Plan) -> None:
    if plan.action == "refuse":
        raise ConfigError(f"stage '{plan.name}': {plan.why}")


def _model_hash(path: Path) -> str:
    """A hash of a pretrained model: the files of its directory, or its name on the hub."""
    files = {file: file.stat() for file in sorted(path.rglob("*")) if file.is_file()}
    return _digest([str(path) if not files else "", *(
        [str(file.relative_to(path)), sha256(file) if stat.st_size <= HASHED_SIZE else [stat.st_size, stat.st_mtime_ns]]
        for file, stat in files.items())])


def _plain(values: Any) -> Any:
    """Values as they are after a round trip through JSON."""
    return json.loads(json.dumps(values, default=str))


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys."""
    if not isinstance(values, dict):
        return {key: values}
    return {k: v for name in values for k, v in _flat(values[name], f"{key}.{name}".lstrip(".")).items()}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(_plain(values), sort_keys=True).encode()).hexdigest()[:16]


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe. The config.yaml of a run means that run, wherever it was moved."""
    recipe, run_dir = load_recipe(path, overrides), Path(path).parent
    if Path(path).name == CONFIG and is_run(run_dir) and not any(item.startswith("run_dir=") for item in overrides):
        return recipe.model_copy(update={"run_dir": str(run_dir)})
    return recipe


def is_run(path: Path) -> bool:
    """Whether a run was started in a directory: its recipe is there, and its lock or manifest."""
    try:
        values = read_yaml((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"run_dir", "stages"} <= values.keys() and any(
        (path / name).exists() for name in (LOCK, MANIFEST))


def check_run_dir(recipe: Recipe) -> None:
    """Refuses a directory with files that no run wrote, and inputs inside the directory."""
    run_dir = Path(recipe.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"'run_dir' {str(run_dir)!r} is a file; expected a directory")
    if run_dir.exists() and not is_run(run_dir) and any(entry.name != LOCK for entry in run_dir.iterdir()):
        raise ConfigError(f"'run_dir' {str(run_dir)!r} contains files that no run wrote; use another directory")
    for name, item in {**recipe.data, **recipe.stages}.items():
        for path in (getattr(item, "path", None), getattr(item, "test_path", None)):
            if path and Path(path).is_absolute() and Path(path).resolve().is_relative_to(run_dir.resolve()):
                raise ConfigError(f"'{name}' reads {path!r}, which is inside 'run_dir' {str(run_dir)!r}")


def claim(recipe: Recipe, *, overwrite: bool) -> filelock.AcquireReturnProxy:
    """Locks the run directory for this process, deletes what an older run wrote if wanted, and writes config.yaml."""
    run_dir = Path(recipe.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(run_dir / LOCK).acquire(blocking=False)
    except filelock.Timeout:
        owner = (run_dir / PID).read_text().strip() if (run_dir / PID).exists() else "unknown"
        raise ConfigError(f"'run_dir' {str(run_dir)!r} is in use by process {owner}; wait until it finishes, stop it, "
                          "or use another directory") from None
    except OSError as error:
        raise StorageError(f"'run_dir' {str(run_dir)!r} cannot be written: {error.strerror}") from error
    check_run_dir(recipe)
    write_file(run_dir / PID, f"{os.getpid()}\n")
    written = {run_dir / name for name in (*read_manifest(run_dir), *RESERVED_NAMES, "report.html")}
    for path in [*written, *run_dir.glob(".replaced-*"), run_dir / MANIFEST] if overwrite else []:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_file(run_dir / CONFIG, dump_recipe(recipe))
    return held
