"""Checkpoints that are complete or absent, and files that are replaced as a whole.

    <stage>/checkpoints/step-000123/model/         loads with plain transformers
                                    state.pt       everything else that a resumed run needs
                                    manifest.json  the size and SHA-256 of every file

A checkpoint is written under a hidden name, flushed to the disk and renamed. So a directory `step-*` is always
complete, whenever the process was killed. It never changes: equal steps of a run have equal states.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from r1kernels.train.errors import CheckpointError, StorageError

MODEL, STATE, MANIFEST, PARTIAL = "model", "state.pt", "manifest.json", ".partial-"


def save_checkpoint(directory: Path, step: int, *, model: Any, tokenizer: Any, state: dict, keep: int) -> None:
    """Writes checkpoint number `step`, unless it exists, and removes all but the last `keep`.

    `state` holds tensors and plain containers of numbers and strings, so that loading it runs no code. Raises
    StorageError if writing fails, for example on a full disk.
    """
    root = Path(directory) / "checkpoints"
    final, partial = root / f"step-{step:06d}", root / f"{PARTIAL}step-{step:06d}"
    tidy_checkpoints(directory, keep)
    if final.exists():
        return
    try:
        (partial / MODEL).mkdir(parents=True)
        model.save_pretrained(partial / MODEL)
        tokenizer.save_pretrained(partial / MODEL)
        with open(partial / STATE, "wb") as file:  # with a path, torch would not say why it cannot write
            torch.save(state, file)
        torch.load(partial / STATE, mmap=True, map_location="cpu", weights_only=True)  # fails if it would run code
        files = {file.relative_to(partial).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
                 for file in sorted(partial.rglob("*")) if file.is_file()}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
        for entry in (*partial.rglob("*"), partial, *Path(directory).glob("*.jsonl")):  # the lines of earlier steps too
            _sync(entry)
        partial.rename(final)
        _sync(root)
    except Exception as error:
        reason: BaseException = error
        while reason.__context__ and not isinstance(reason, OSError):  # torch names the byte but not the reason
            reason = reason.__context__
        raise StorageError(f"cannot write the checkpoint {final}: {reason}; earlier ones are unchanged") from error
    finally:
        tidy_checkpoints(directory, keep)


def load_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """Verifies every file of a checkpoint. Returns the directory of its model, and its state with tensors on the CPU.
    Raises CheckpointError."""
    verify_checkpoint(path)
    try:
        return path / MODEL, torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot load {path / STATE}: {type(error).__name__}") from error


def verify_checkpoint(path: Path) -> None:
    """Raises CheckpointError, which names the file, if a file has changed since it was written."""
    file = path / MANIFEST
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        for name in (STATE, *sorted(files.keys() - {STATE})):
            file = path / name
            if sha256(file) != files[name]["sha256"]:
                raise ValueError("its SHA-256 differs")
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged checkpoint: {file} does not match {path / MANIFEST} ({error!r}); "
                              f"delete {path}, and its stage continues from an earlier one or begins again") from error


def latest_checkpoint(directory: Path) -> Path | None:
    """The last checkpoint in a stage's directory, or None."""
    return (_complete(Path(directory) / "checkpoints") or [None])[-1]


def tidy_checkpoints(directory: Path, keep: int) -> None:
    """Removes the rest of a killed save and all but the last `keep` checkpoints. The next call retries a failure."""
    root = Path(directory) / "checkpoints"
    with contextlib.suppress(OSError):
        for path in list(root.glob(f"{PARTIAL}*")):
            shutil.rmtree(path)
        for path in _complete(root)[:-keep]:
            shutil.rmtree(path.rename(root / f"{PARTIAL}{path.name}"))  # a kill never leaves half of a `step-*`


def write_file(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole. Raises StorageError if that fails; the old file is unchanged then."""
    aside = path.with_name(f".{path.name}")
    path.parent.mkdir(exist_ok=True)
    try:
        aside.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        _sync(aside)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror}; the old file is unchanged") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _complete(root: Path) -> list[Path]:
    """The checkpoints in their order."""
    steps = {path: path.name.removeprefix("step-") for path in root.glob("step-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
