"""Checkpoints that are whole or absent.

    <run>/checkpoints/step-000123/model/         loads with plain transformers
                                  state.pt       everything else a resumed run needs
                                  manifest.json  format version, step, and size and SHA-256 of every file

A checkpoint is written under a hidden name, flushed to the disk, and renamed in one step, so a `step-*`
directory is always complete, whenever the process was killed. Old ones are removed only after the new one
stands.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1kernels.train.files import sha256

FORMAT = 1
MODEL, STATE, MANIFEST = "model", "state.pt", "manifest.json"
_STEP = re.compile(r"step-(\d{6,})", re.ASCII)
# Hidden names: a save under way, a checkpoint being replaced by another of the same step, one being deleted.
_WRITING, _REPLACED, _DELETED = ".writing-", ".replaced-", ".deleted-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is missing, damaged or of an unknown format; names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Args:
        path: its directory.
        model_dir: the model and tokenizer, for `from_pretrained`.
        state: what was given to `save_checkpoint`, with tensors on the CPU.
    """

    path: Path
    model_dir: Path
    state: dict[str, Any]


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    *,
    model: Any,
    tokenizer: Any,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint, and then removes old ones.

    Args:
        run_dir: the directory of the run; created if missing.
        step: the number of the step, at least 0. A checkpoint of the same step is replaced.
        model: what has `save_pretrained`.
        tokenizer: likewise, saved beside the model.
        state: tensors and plain containers of numbers and strings, so that loading it runs no code.
        keep: how many checkpoints to keep, at least 1; the one just written always stays, then the highest
            steps.

    Returns:
        The directory of the checkpoint.

    Raises:
        ValueError, TypeError: a step or keep out of range; a state that could not be loaded again.
        CheckpointError: writing failed, on a full disk say. Earlier checkpoints are as they were.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    _check_plain(state, "state")
    root = Path(run_dir) / "checkpoints"
    final = root / f"step-{step:06d}"
    writing = root / f"{_WRITING}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        _write(writing, step, model, tokenizer, state)
        _put_in_place(writing, final)
    except Exception as error:
        shutil.rmtree(writing, ignore_errors=True)
        cause: BaseException = error
        while cause.__context__ and not isinstance(cause, OSError):  # torch says which byte it missed, not why
            cause = cause.__context__
        cause = cause if isinstance(cause, OSError) else error
        raise CheckpointError(
            f"cannot write checkpoint {final}: {type(cause).__name__}: {cause}; earlier ones are untouched"
        ) from error
    _prune(root, final, keep)
    return final


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Verifies every file of a checkpoint against its manifest, then loads the state.

    Args:
        path: a checkpoint directory, as `save_checkpoint` and `latest_checkpoint` return it.

    Raises:
        CheckpointError: a file is missing or not what was written, or the format is unknown; says what else there is.
    """
    path = Path(path)
    try:
        return _load(path)
    except CheckpointError as error:
        paths = [other for _, other in sorted(_steps(path.parent).items())]
        older = paths[: paths.index(path)] if path in paths else []
        if not older:
            raise
        raise CheckpointError(f"{error}; {older[-1]} is older: remove {path} to go on from there") from error


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step in a run, or None. Changes nothing on the disk."""
    steps = _steps(Path(run_dir) / "checkpoints")
    return steps[max(steps)] if steps else None


def verify_checkpoint(path: Path) -> None:
    """Raises CheckpointError, naming the file, unless every file is what was written."""
    for name, size, digest in _manifest_entries(path):
        file = path / name
        try:
            actual = file.stat().st_size
            if actual != size:
                raise CheckpointError(f"damaged checkpoint: {file} has {actual} bytes, its manifest says {size}")
            if sha256(file) != digest:
                raise CheckpointError(f"damaged checkpoint: {file} does not match the SHA-256 in its manifest")
        except OSError as error:
            raise CheckpointError(f"damaged checkpoint: cannot read {file}: {error.strerror}") from error


def tidy_checkpoints(run_dir: str | os.PathLike[str], keep: int) -> None:
    """Removes what the last save would have removed, had it not been killed."""
    latest = latest_checkpoint(run_dir)
    if latest is not None:
        with contextlib.suppress(OSError):
            _clean(latest.parent)
            _prune(latest.parent, latest_checkpoint(run_dir), keep)


def _load(path: Path) -> Checkpoint:
    verify_checkpoint(path)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot load {path / STATE}: {error}") from error
    return Checkpoint(path, path / MODEL, state)


def _write(directory: Path, step: int, model: Any, tokenizer: Any, state: dict[str, Any]) -> None:
    model_dir = directory / MODEL
    model_dir.mkdir(parents=True)
    model.save_pretrained(model_dir)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # how it was used last would be saved with it
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(model_dir)
    with open(directory / STATE, "wb") as file:
        torch.save(state, file)
    files = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in _files(directory)
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in _files(directory):
        _sync(file)
    for folder in (model_dir, *(entry for entry in model_dir.rglob("*") if entry.is_dir()), directory):
        _sync(folder)


def _put_in_place(writing: Path, final: Path) -> None:
    """Renames a finished checkpoint to its name, setting aside one of the same step until that is done.

    A kill between the two renames leaves the earlier one under its hidden name, where `_steps` finds it.
    """
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(writing, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _steps(root: Path) -> dict[int, Path]:
    """The complete checkpoints by step."""
    found: dict[int, Path] = {}
    for entry in root.iterdir() if root.is_dir() else ():
        set_aside = entry.name.startswith(_REPLACED)
        match = _STEP.fullmatch(entry.name.removeprefix(_REPLACED))
        if match and entry.is_dir() and not (set_aside and int(match[1]) in found):
            found[int(match[1])] = entry
    return found


def _clean(root: Path) -> None:
    """Removes what a killed save left behind, and brings back a checkpoint it had only set aside."""
    for entry in list(root.iterdir()):
        if entry.name.startswith(_REPLACED):
            final = root / entry.name.removeprefix(_REPLACED)
            if not final.exists():
                os.rename(entry, final)
                continue
        if entry.name.startswith((_WRITING, _REPLACED, _DELETED)):
            shutil.rmtree(entry)


def _prune(root: Path, newest: Path, keep: int) -> None:
    others = [path for _, path in sorted(_steps(root).items()) if path != newest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        # Renamed first: a kill halfway through the deletion must not leave half a `step-*` directory.
        # Failing to delete is no reason to stop a run: the next save tries again.
        with contextlib.suppress(OSError):
            deleted = path.with_name(f"{_DELETED}{path.name}")
            os.rename(path, deleted)
            shutil.rmtree(deleted)


def _manifest_entries(path: Path) -> Iterator[tuple[str, int, str]]:
    manifest_file = path / MANIFEST
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {path}: cannot read {manifest_file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"damaged checkpoint: {manifest_file} is not JSON: {error}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{manifest_file}: format {version!r}, expected {FORMAT}")
    try:
        entries = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged checkpoint: {manifest_file} does not list its files") from error
    if not any(name == STATE for name, _, _ in entries):
        raise CheckpointError(f"damaged checkpoint: {manifest_file} does not list {STATE}")
    yield from entries


_PLAIN_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.Tensor,
    torch.dtype,
    torch.Size,
    torch.device,
)


def _check_plain(value: Any, where: str) -> None:
    """Finds, before the run depends on it, what `torch.load(weights_only=True)` would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in _PLAIN_LEAVES:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain Python values only")


def _files(directory: Path) -> list[Path]:
    return sorted(entry for entry in directory.rglob("*") if entry.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
