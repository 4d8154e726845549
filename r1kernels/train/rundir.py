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

from r1kernels.train.config import Config, dump_config, load_config
from r1kernels.train.schema import ConfigError, differences

CONFIG, LOCK = "config.yaml", ".lock"
# What may change when a run is resumed: it alters no step that was already made.
MAY_CHANGE = ("grpo.steps", "checkpoint.", "run_dir", "threads", "reward.workers")

# Everything a run writes; the names with a dot are files on their way to the name without.
_WRITTEN = re.compile(
    r"\.lock|\.?config\.yaml|curves\.png|report\.md|(base/)?\.?metrics\.jsonl|\.?samples\.jsonl"
    r"|(base/)?checkpoints/(\.[a-z]+-)?step-\d+/(model/.*|state\.pt|manifest\.json)"
)


def run_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe; one that lies in a run means that run, wherever it was moved or copied to."""
    recipe = Path(recipe)
    config = load_config(recipe, overrides)
    if recipe.name == CONFIG and is_run(recipe.parent) and not any(item.startswith("run_dir=") for item in overrides):
        config = dataclasses.replace(config, run_dir=str(recipe.parent))
    return config


def is_run(path: Path) -> bool:
    """Whether a run was started here: a configuration of ours, beside something else that a run writes."""
    try:
        load_config(path / CONFIG)
    except ConfigError:
        return False
    return any((path / name).exists() for name in (LOCK, "base", "checkpoints", "metrics.jsonl"))


def check_run_dir(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuses a directory that a run with these settings may not use. Changes nothing."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given, expected at most one")
    run_dir = Path(config.run_dir)
    for key, path in _inputs(config).items():
        if path.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(f"'{key}' {str(path)!r} lies in 'run_dir' {str(run_dir)!r}; name another run_dir")
    if resume:
        if not is_run(run_dir):
            raise ConfigError(f"--resume: {run_dir} holds no run (no {CONFIG} that a run wrote)")
        saved = absolute_inputs(load_config(run_dir / CONFIG))
        changed = [item for item in differences(saved, absolute_inputs(config)) if not item.startswith(MAY_CHANGE)]
        if changed:
            raise ConfigError(f"--resume: settings differ from those of {run_dir}: {'; '.join(changed)}")
    elif run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"'run_dir' {str(run_dir)!r} is a file, expected a directory or nothing")
    elif run_dir.is_dir() and any(entry.name != LOCK for entry in run_dir.iterdir()):
        if is_run(run_dir):
            foreign = [name for name in _files(run_dir) if not _WRITTEN.fullmatch(name)]
        else:
            foreign = sorted(entry.name for entry in run_dir.iterdir())
        if foreign:
            names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise ConfigError(
                f"'run_dir' {str(run_dir)!r} holds files that are not a run's ({names}); name another directory"
            )
        if not overwrite:
            raise ConfigError(f"'run_dir' {str(run_dir)!r} holds a run; give --resume or --overwrite")


@contextlib.contextmanager
def claim(config: Config, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Makes the run directory this run's, and this process's alone until the end of the block.

    Deletes the run that `overwrite` replaces: to be called when nothing is left to fail.
    """
    run_dir = Path(config.run_dir)
    check_run_dir(config, resume=resume, overwrite=overwrite)
    with contextlib.ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(run_dir))
            # Again: before the lock was held, another process may have started a run here.
            check_run_dir(config, resume=resume, overwrite=overwrite)
            if overwrite:
                _delete(run_dir)
            aside = run_dir / f".{CONFIG}"
            aside.write_text(dump_config(absolute_inputs(config)), encoding="utf-8")
            aside.replace(run_dir / CONFIG)
        except OSError as error:
            raise ConfigError(f"'run_dir' {str(run_dir)!r} cannot be written: {error.strerror}") from error
        yield


def absolute_inputs(config: Config) -> Config:
    """The configuration with absolute paths to what it reads, so that it means the same from any directory."""
    paths = {key: str(path.absolute()) for key, path in _inputs(config).items()}
    data, model = config.data, config.model
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data, path=paths.get("data.path", data.path), test_path=paths.get("data.test_path", data.test_path)
        ),
        model=dataclasses.replace(model, path=paths.get("model.path", model.path)),
    )


def _inputs(config: Config) -> dict[str, Path]:
    """The files and directories read, by key; a model that is not on the disk is one of the hub."""
    named = {"model.path": config.model.path}
    if config.data.kind == "gsm8k":
        named |= {"data.path": config.data.path, "data.test_path": config.data.test_path}
    return {key: Path(path) for key, path in named.items() if path is not None and Path(path).exists()}


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
    """Deletes a run. Its configuration and its lock stay: until the new one stands, this is still a run."""
    for name in ("checkpoints", "base"):
        if (run_dir / name).exists():
            shutil.rmtree(run_dir / name)
    for name in _files(run_dir):
        if _WRITTEN.fullmatch(name) and name not in (CONFIG, LOCK):
            (run_dir / name).unlink()


def _files(run_dir: Path) -> list[str]:
    """What lies in a directory at any depth, but for the directories themselves."""
    return sorted(
        path.relative_to(run_dir).as_posix()
        for path in run_dir.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
