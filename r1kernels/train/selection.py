"""Selected samples on the disk, batch by batch, so that a stage killed at any moment goes on at the next batch.

    .selected.jsonl    the samples of complete batches, and perhaps what a killed run wrote of the next one
    progress.json      how many batches are complete, the bytes they take, and their counts
    selected.jsonl     all of them, once the last batch is complete
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1kernels.train.data import DataError
from r1kernels.train.files import write_atomically
from r1kernels.train.stage import SELECTED

PROGRESS = "progress.json"


class Selection:
    """What a stage has selected so far in its directory.

    Raises:
        DataError: the progress of an earlier run cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / SELECTED
        self._growing, self._progress = directory / f".{SELECTED}", directory / PROGRESS
        self.batches, self._bytes, self.counts = 0, 0, Counter()
        if self._progress.exists():
            self._restore()
        self._seen = self._known()
        with self._writing():
            self._file = None if self.path.exists() else self._growing.open("ab")
            if self._file:
                self._file.truncate(self._bytes)

    def add(self, rows: list[dict[str, Any]], counts: Counter[str]) -> None:
        """Completes a batch."""
        with self._writing():
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.batches, self._bytes, self.counts = self.batches + 1, self._file.tell(), self.counts + counts
        progress = {"batches": self.batches, "bytes": self._bytes, "counts": dict(self.counts)}
        write_atomically(self._progress, json.dumps(progress) + "\n")

    def has(self, prompt: str, completion: str) -> bool:
        """Whether exactly this has been kept."""
        return _digest(prompt, completion) in self._seen

    def keep(self, prompt: str, completion: str) -> None:
        """Remembers a sample of the batch under way for `has`."""
        self._seen.add(_digest(prompt, completion))

    def finish(self) -> None:
        """Gives the file its name."""
        if self._file:
            with self._writing():
                self._file.close()
                self._growing.replace(self.path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._growing} cannot be written: {error.strerror}; {self.batches} complete batches stand"
            ) from error

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # what is not yet on the disk is of no complete batch
                self._file.close()

    def _restore(self) -> None:
        try:
            progress = json.loads(self._progress.read_text(encoding="utf-8"))
            self.batches, self._bytes = progress["batches"], progress["bytes"]
            self.counts = Counter(progress["counts"])
            file = self.path if self.path.exists() else self._growing
            size = file.stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot go on from {self._progress}: {error}; remove its folder to begin anew") from None
        if size < self._bytes:
            raise DataError(
                f"{file} is damaged: {size} bytes, expected at least {self._bytes}; remove its directory to begin anew"
            )

    def _known(self) -> set[bytes]:
        """Digests of the samples of complete batches."""
        seen: set[bytes] = set()
        if self._bytes and not self.path.exists():
            with self._growing.open("rb") as file:
                while file.tell() < self._bytes:
                    row = json.loads(file.readline())
                    seen.add(_digest(row["prompt"], row["completion"]))
        return seen


def _digest(prompt: str, completion: str) -> bytes:
    return hashlib.blake2b(f"{prompt}\0{completion}".encode(errors="surrogatepass"), digest_size=16).digest()
