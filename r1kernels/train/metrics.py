"""metrics.jsonl and its like: one JSON object a step, in order, whatever interrupts the run.

What a step measured is deterministic and goes to metrics.jsonl, how long it took to timings.jsonl (`split_timings`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1kernels.train.data import DataError


class MetricsLog:
    """Appends lines that hold a "step".

    A line is with the system when `write` returns, so that it outlives a process killed at any moment. Only `sync`
    puts it on the disk: a power cut may lose the lines since the last one. Called before every checkpoint, it keeps
    all lines that a run resumed from that checkpoint does not write again.

    Args:
        path: the file.
        first_step: where the run (re)starts: lines of this and later steps, which will be written again, and a
            half-written last line are removed.

    Raises:
        DataError: the file cannot be written, on a full disk say, or what it holds is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, first_step: int) -> None:
        self.path = Path(path)
        kept = [line for line in read_metrics(self.path) if line["step"] < first_step]
        aside = self.path.with_name(f".{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                file.writelines(map(_encode, kept))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self.path)
            # Without a buffer of Python's: what could not be written is not tried again when the file is closed.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise DataError(f"{self.path} cannot be written: {error.strerror}; it is as it was") from error

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Adds a line, as a whole or not at all."""
        text, size = _encode(metrics), self._file.seek(0, os.SEEK_END)
        try:
            done = 0
            while done < len(text):
                done += self._file.write(text[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise DataError(
                f"{self.path} cannot be written: {error.strerror}; it holds all steps before {metrics.get('step')}, "
                "and the run can be resumed"
            ) from error

    def sync(self) -> None:
        """Puts all lines on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def split_timings(line: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step's line as (what was measured, how long it took); both hold the "step"."""
    timings = {name for name in line if name.startswith("seconds") or name == "tokens_per_second"}
    return (
        {name: value for name, value in line.items() if name not in timings},
        {name: value for name, value in line.items() if name in timings or name == "step"},
    )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a log; none if there is no file. A last line that was not finished is left out.

    Raises:
        DataError: the file cannot be read, or a line is not one that a log writes.
    """
    path, lines = Path(path), []
    try:
        written = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for number, text in enumerate(written, start=1):
        line = decode_line(text)
        if line is None:
            raise DataError(f"{path}, line {number}: damaged: {text!r:.60}, expected a JSON object with a 'step'")
        lines.append(line)
    return lines


def decode_line(text: bytes) -> dict[str, Any] | None:
    """A line of a log; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _encode(metrics: Mapping[str, Any]) -> bytes:
    """One line. JSON has no NaN or infinity: they become null. UTF-8 has no half characters: they become "?"."""
    return (json.dumps(_plain(metrics), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
