"""The output of a run while it works: lines in files, a live table on a terminal, and TensorBoard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from r1kernels.train.checkpoint import write_file
from r1kernels.train.errors import DataError, StorageError

if TYPE_CHECKING:
    from r1kernels.train.stage import Stage

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# Column -> (metric, format). "cut": completions that reached the limit; "flat": groups whose rewards are all equal;
# "clip -" and "clip +": tokens without a gradient because of the lower and the upper bound.
_COLUMNS = {
    "step": ("step", ".0f"), "loss": ("loss", ".4f"), "pass@1": ("pass_at_1", ".1%"), "acc": ("reward_accuracy", ".2f"),
    "format": ("reward_format", ".2f"), "tokens": ("length", ".1f"), "cut": ("truncated", ".0%"), "KL": ("kl", ".4f"),
    "entropy": ("entropy", ".3f"), "clip -": ("clip_low_fraction", ".1%"), "clip +": ("clip_high_fraction", ".1%"),
    "flat": ("zero_spread", ".0%"), "tok/s": ("tokens_per_second", ".0f"), "minutes left": ("minutes_left", ".0f"),
}
# Control characters except tab and newline, surrogates, line separators, invisible and direction-changing characters.
_HIDDEN = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]")


def printable(text: object) -> str:
    """Text that is safe for a terminal or a page: a character that would control it is shown as [U+XXXX]."""
    return _HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(text).replace("\r\n", "\n"))


class Console(AbstractContextManager):
    """Shows the progress of a run: a live table on a terminal, plain lines elsewhere, or everywhere if `plain`."""

    def __init__(self, plain: bool = False) -> None:
        self._rich = RichConsole(highlight=False)
        self._live = Live(console=self._rich) if self._rich.file.isatty() and not plain else None
        self._stage, self._rows = "", list[dict[str, str]]()  # the rows of the table belong to one stage

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, *, warning: bool = False) -> None:
        """Prints a line that stays."""
        self._rich.print(Text(printable(text), "bold red" if warning else ""), soft_wrap=True)

    def phase(self, text: str) -> None:
        """Shows the current activity below the live table."""
        if self._live:
            names = [name for name in _COLUMNS if any(name in row for row in self._rows)]
            table = Table(*(Column(name, justify="right") for name in names), box=None, header_style="bold")
            for row in self._rows:
                table.add_row(*(row.get(name, "") for name in names))
            self._live.update(Group(table, Text(printable(text), "bold")))
            self._live.start()  # does nothing if it has started

    def step(self, name: str, line: Mapping[str, Any], steps: int) -> None:
        """One of `steps` steps is done: a row of the table or a line. For `line` see `StepLog.write`."""
        minutes_left = line["timing"]["total"] * (steps - line["step"] - 1) / 60 or None
        values = {**line, **line["timing"], "minutes_left": minutes_left}
        row = {title: f"{values[key]:{form}}" for title, (key, form) in _COLUMNS.items() if values.get(key) is not None}
        self._rows = [*self._rows[-14:], row] if name == self._stage else [row]
        self._stage = name
        if not self._live:
            self.say(f"{name}: " + "  ".join(f"{title} {value}" for title, value in row.items()))
        self.phase(f"{name}, step {line['step']} of {steps}")


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log without an unfinished last line; empty if there is no file. DataError: a line is damaged."""
    lines, written = [], Path(path).read_bytes().split(b"\n")[:-1] if Path(path).exists() else []
    for number, text in enumerate(written, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise DataError(f"{path}, line {number} is damaged: {text!r:.60}; expected JSON") from error
    return lines


def cut_lines(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Removes the lines of `first_step` and later steps and an unfinished one; returns the lines before them."""
    kept = [line for line in read_lines(path) if line["step"] < first_step]
    write_file(path, b"".join(map(_encode, kept)))
    return kept


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line. It survives a kill of the process immediately, and a power cut after the next checkpoint."""
    try:
        with open(path, "ab") as file:
            file.write(_encode(line))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; its older lines are unchanged") from error


def _encode(line: Mapping[str, Any]) -> bytes:
    """A line of JSON. NaN and infinity become null, because JSON has neither."""
    return json.dumps(json.loads(json.dumps(line), parse_constant=lambda name: None)).encode() + b"\n"


class StepLog(AbstractContextManager):
    """The lines of a stage in metrics.jsonl and samples.jsonl and, if the recipe asks for it, TensorBoard.

    The stage starts or continues at `first_step`, so older lines of this and later steps are removed.
    """

    def __init__(self, stage: Stage, *, first_step: int) -> None:
        self._metrics, self._samples = stage.directory / METRICS, stage.directory / SAMPLES
        for path in (self._metrics, self._samples):
            cut_lines(path, first_step)
        self._tensorboard = None
        if stage.recipe.trackers:
            from torch.utils.tensorboard import SummaryWriter

            events = stage.directory.parent / "tensorboard" / stage.directory.name
            self._tensorboard = SummaryWriter(str(events), purge_step=first_step)

    def write(self, line: Mapping[str, Any]) -> None:
        """One step: {"step": n, metric: value, ..., "timing": {part: seconds, ...}}.

        Values that depend on the clock are under "timing". Without it, equal runs have equal lines. "examples" are
        completions for people and for the report; they go to samples.jsonl.
        """
        append_line(self._metrics, {name: value for name, value in line.items() if name != "examples"})
        for example in line.get("examples", ()):
            append_line(self._samples, {"step": line["step"], **example})
        if self._tensorboard:
            for name, value in {**line, **line.get("timing", {})}.items():
                if name != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, line["step"])
            self._tensorboard.flush()

    def __exit__(self, *exception: object) -> None:
        if self._tensorboard:
            self._tensorboard.close()
