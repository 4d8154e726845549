"""Checkpoints that are complete or absent, and files that are replaced as a whole.

    <stage>/checkpoints/step-000123/model/         loads with plain transformers
                                    state.pt       everything else that a resumed run needs
                                    manifest.json  format, step, and the size and SHA-256 of every file

A checkpoint is written under a hidden name, flushed to the disk and renamed. So a directory `step-*` is always
complete, whenever the process was killed. Old checkpoints are removed after the new one is in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1kernels.train.errors import CheckpointError, StorageError

FORMAT = 1
MODEL, STATE, MANIFEST = "model", "state.pt", "manifest.json"
_STEP = re.compile(r"step-(\d{6,})", re.ASCII)
# Hidden names: a checkpoint that is being written or deleted, and one that another of the same step is replacing.
_PARTIAL, _REPLACED = ".partial-", ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory, its model for `from_pretrained`, and its state with tensors on the CPU."""

    path: Path
    model_dir: Path
    state: dict[str, Any]


def save_checkpoint(
    directory: Path, step: int, *, model: Any, tokenizer: Any, state: dict[str, Any], keep: int
) -> Path:
    """Writes the checkpoint of a step, in place of an earlier one of that step, and keeps the last `keep` checkpoints.

    Args:
        state: tensors and plain containers of numbers and strings, so that loading it runs no code.

    Raises:
        TypeError: the state holds something else.
        StorageError: writing failed, for example on a full disk. Earlier checkpoints are unchanged.
    """
    root = Path(directory) / "checkpoints"
    final = root / f"step-{step:06d}"
    tidy_checkpoints(directory, keep)
    try:
        partial = root / f"{_PARTIAL}{final.name}"
        _write(partial, step, model, tokenizer, state)
        if final.exists():  # a kill between the two renames leaves it under a name that `_steps` knows
            os.rename(final, root / f"{_REPLACED}{final.name}")
        for log in Path(directory).glob("*.jsonl"):  # a run that continues relies on the lines before
            _sync(log)
        os.rename(partial, final)
        _sync(root)
    except TypeError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__context__ and not isinstance(cause, OSError):  # torch names the byte and not the reason
            cause = cause.__context__
        reason = cause if isinstance(cause, OSError) else error
        raise StorageError(f"cannot write the checkpoint {final}: {reason}; earlier ones are unchanged") from error
    finally:
        tidy_checkpoints(directory, keep)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Verifies every file of a checkpoint, then loads its state. Raises CheckpointError, which names an older one."""
    try:
        verify_checkpoint(path)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (CheckpointError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        known = isinstance(error, CheckpointError)
        message = str(error) if known else f"cannot load {path / STATE}: {type(error).__name__}"
        paths = [other for _, other in sorted(_steps(path.parent).items())]
        older = paths[: paths.index(path)] if path in paths else []
        hint = f"; delete {path} to continue from {older[-1].name}" if older else ""
        raise CheckpointError(f"{message}{hint}") from error
    return Checkpoint(path, path / MODEL, state)


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step in a stage's directory, or None. Changes nothing on the disk."""
    steps = _steps(Path(directory) / "checkpoints")
    return steps[max(steps)] if steps else None


def verify_checkpoint(path: Path) -> None:
    """Raises CheckpointError, naming the file, unless every file has the size and hash that were written."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{file} has the format {manifest['format']!r}; expected {FORMAT}")
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if STATE not in entries:
            raise CheckpointError(f"damaged checkpoint: {file} does not list {STATE}")
        for name, expected in entries.items():
            file = path / name
            if (file.stat().st_size, sha256(file)) != expected:
                raise CheckpointError(f"damaged checkpoint: the size or SHA-256 of {file} is not the one in {MANIFEST}")
    except OSError as error:
        raise CheckpointError(f"damaged checkpoint: cannot read {file}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged checkpoint: {file} is not a list of files with sizes and hashes") from error


def tidy_checkpoints(directory: Path, keep: int) -> None:
    """Removes what a killed save left and all but the last `keep` checkpoints. A failure is left to the next call."""
    root = Path(directory) / "checkpoints"
    with contextlib.suppress(OSError):
        for entry in list(root.iterdir()):
            final = root / entry.name.removeprefix(_REPLACED)
            if entry.name.startswith(_REPLACED) and not final.exists():
                os.rename(entry, final)  # it was set aside, and nothing replaced it
            elif entry.name.startswith((_PARTIAL, _REPLACED)):
                shutil.rmtree(entry)
        for _, path in sorted(_steps(root).items())[:-keep]:
            partial = root / f"{_PARTIAL}{path.name}"
            os.rename(path, partial)  # so that a kill never leaves half a directory `step-*`
            shutil.rmtree(partial)


def write_file(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole. Raises StorageError if that fails; the old file is unchanged then."""
    aside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(aside, "wb") as file:
            file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise StorageError(f"{path} cannot be written: {error.strerror}; the old file is unchanged") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(directory: Path, step: int, model: Any, tokenizer: Any, state: dict[str, Any]) -> None:
    (directory / MODEL).mkdir(parents=True)
    model.save_pretrained(directory / MODEL)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # padding and truncation of the last call would be saved
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(directory / MODEL)
    with open(directory / STATE, "wb") as file:  # given a path, torch would not say why it cannot write
        torch.save(state, file)
    try:
        torch.load(directory / STATE, mmap=True, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition(". ")[0]
        raise TypeError(f"the state of a checkpoint may hold tensors and plain values only: {reason}") from error
    files = [entry for entry in sorted(directory.rglob("*")) if entry.is_file()]
    entries = {
        str(file.relative_to(directory)): {"size": file.stat().st_size, "sha256": sha256(file)} for file in files
    }
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=2) + "\n")
    for entry in (*directory.rglob("*"), directory):
        _sync(entry)


def _steps(root: Path) -> dict[int, Path]:
    """The complete checkpoints by step."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    found = [(match, name) for name in names if (match := _STEP.fullmatch(name.removeprefix(_REPLACED)))]
    return {int(match[1]): root / name for match, name in found}  # `step-*` sorts after `.replaced-*` and wins


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
