"""metrics.jsonl: one JSON object a step, in order, whatever interrupts the run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1kernels.train.data import DataError


class MetricsLog:
    """Appends lines that hold a "step".

    Args:
        path: the file.
        first_step: where the run (re)starts: lines of this and later steps, which will be written again, and a
            half-written last line are removed.
    """

    def __init__(self, path: str | os.PathLike[str], *, first_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] < first_step]
        aside = self.path.with_name(f".{self.path.name}")
        aside.write_text("".join(map(_encode, kept)), encoding="utf-8")
        aside.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(_encode(metrics))
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


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
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise DataError(f"{path}, line {number}: damaged: {text!r:.60}, expected a JSON object with a 'step'")
        lines.append(line)
    return lines


def _encode(metrics: Mapping[str, Any]) -> str:
    """One line. JSON has no NaN or infinity: they become null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(plain, ensure_ascii=False) + "\n"
