"""The directory of a run: whose it is, what it may hold, and who works in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r1kernels.train.chain import MANIFEST, SUPERSEDED, read_manifest
from r1kernels.train.config import RUN_FILES, Recipe, dump_recipe, load_recipe
from r1kernels.train.files import write_atomically
from r1kernels.train.problems import data_files
from r1kernels.train.schema import ConfigError

CONFIG, LOCK = "config.yaml", ".lock"
# Files of a run beside the directories of its stages; a name with a dot is a file on its way to the one without.
_WRITTEN = (LOCK, *RUN_FILES, *(f".{name}" for name in RUN_FILES))
# And in the directory of a stage, at any depth.
_OF_STAGE = re.compile(r"\.?\w+\.jsonl?|checkpoints/(\.[a-z]+-)?step-\d+/(model/.*|state\.pt|manifest\.json)")


def run_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe; one that lies in a run means that run, wherever it was moved or copied to."""
    path = Path(path)
    recipe = load_recipe(path, overrides)
    if path.name == CONFIG and is_run(path.parent) and not any(item.startswith("run_dir=") for item in overrides):
        recipe = dataclasses.replace(recipe, run_dir=str(path.parent))
    return recipe


def is_run(path: Path) -> bool:
    """Whether a run was started here: its recipe, beside the lock or the manifest that a run writes."""
    try:
        load_recipe(path / CONFIG)
    except ConfigError:
        return False
    return (path / LOCK).exists() or (path / MANIFEST).exists()


def check_run_dir(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Refuses a directory that this recipe may not use, or not delete. Changes nothing."""
    run_dir = Path(recipe.run_dir)
    for key, path in _inputs(recipe).items():
        if path.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(f"'{key}' {str(path)!r} lies in 'run_dir' {str(run_dir)!r}; name another run_dir")
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"'run_dir' {str(run_dir)!r} is a file, expected a directory or nothing")
    foreign = _foreign(run_dir, deep=overwrite) if run_dir.is_dir() else []
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ConfigError(
            f"'run_dir' {str(run_dir)!r} holds files that are not a run's ({names}); name another directory"
        )


def _foreign(run_dir: Path, *, deep: bool) -> list[str]:
    """What no run has written; `deep` looks into the directories of stages too."""
    if not is_run(run_dir):
        return sorted(entry.name for entry in run_dir.iterdir() if entry.name != LOCK)
    stages = {stage.name for stage in load_recipe(run_dir / CONFIG).stages} | set(read_manifest(run_dir))
    found = [entry.name for entry in run_dir.iterdir() if entry.name not in (*_WRITTEN, *stages)]
    for file in run_dir.rglob("*") if deep else ():
        name = file.relative_to(run_dir).as_posix()
        top, _, inner = name.removeprefix(f"{SUPERSEDED}/").partition("/")
        if (top in stages or name.startswith(f"{SUPERSEDED}/")) and (file.is_symlink() or not file.is_dir()):
            found += [] if _OF_STAGE.fullmatch(inner) else [name]
    return sorted(found)


@contextlib.contextmanager
def claim(recipe: Recipe, *, overwrite: bool) -> Iterator[None]:
    """Makes the run directory this run's, and this process's alone until the end of the block.

    Deletes the run that `overwrite` replaces: to be called when nothing is left to fail.
    """
    run_dir = Path(recipe.run_dir)
    check_run_dir(recipe, overwrite=overwrite)
    with contextlib.ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(run_dir))
            # Again: before the lock was held, another process may have started a run here.
            check_run_dir(recipe, overwrite=overwrite)
            if overwrite:
                _delete(run_dir)
            write_atomically(run_dir / CONFIG, dump_recipe(absolute_inputs(recipe)))
        except OSError as error:
            raise ConfigError(f"'run_dir' {str(run_dir)!r} cannot be written: {error.strerror}") from error
        yield


def absolute_inputs(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths to what it reads, so that it means the same from any directory."""
    paths = {key: str(path.absolute()) for key, path in _inputs(recipe).items()}

    def renewed(config: Any, prefix: str, *keys: str) -> Any:
        return dataclasses.replace(config, **{key: paths.get(f"{prefix}.{key}", getattr(config, key)) for key in keys})

    return dataclasses.replace(
        recipe,
        data={name: renewed(data, f"data.{name}", "path", "test_path") for name, data in recipe.data.items()},
        stages=tuple(
            renewed(stage, f"stages.{stage.name}", "path") if stage.kind == "model" else stage
            for stage in recipe.stages
        ),
    )


def _inputs(recipe: Recipe) -> dict[str, Path]:
    """The files and directories read, by key; a model that is not on the disk is one of the hub."""
    named = data_files(recipe, set(recipe.data))
    named |= {f"stages.{stage.name}.path": Path(stage.path) for stage in recipe.stages if stage.kind == "model"}
    return {key: path for key, path in named.items() if path.exists()}


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Held by the open file, so that it ends with the process, however that ends."""
    with open(run_dir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"'run_dir' {str(run_dir)!r} is in use by process {file.read().strip() or 'unknown'}; wait for its "
                "end, stop it, or name another directory"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _delete(run_dir: Path) -> None:
    """Deletes a run. Its recipe and its lock stay: until the new one stands, this is still a run."""
    for entry in run_dir.iterdir():
        if entry.name in (CONFIG, LOCK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
