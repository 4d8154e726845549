"""Files that are whole or as they were, whenever the process is killed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from r1kernels.train.schema import ConfigError


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file, under a name with a dot until all is on the disk.

    Raises:
        ConfigError: it cannot be written, on a full disk say; what was there stands.
    """
    aside = path.with_name(f".{path.name}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}; it is as it was") from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
