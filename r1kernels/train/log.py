"""The output of a run while it works: lines in files and on the console, and TensorBoard."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich
from rich.text import Text

from r1kernels.train.checkpoint import write_file
from r1kernels.train.parallel import first, rank

if TYPE_CHECKING:
    from r1kernels.train.stage import Stage

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# The metrics that the console shows of a step.
SHOWN = ("loss", "pass_at_1", "reward_accuracy", "reward_format", "length", "truncated", "kl", "entropy", "zero_spread",
         "clip_low_fraction", "clip_high_fraction")
# Categories of characters that act: controls, invisible ones, halves of surrogate pairs, separators of lines.
ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    """Text that is safe for a terminal: a character that would control it is shown as [U+XXXX]."""
    return "".join(f"[U+{ord(char):04X}]" if unicodedata.category(char) in ACTING and char not in "\t\n" else char
                   for char in str(text).replace("\r\n", "\n"))


class Console:
    """Shows the progress of a run, on the first rank."""

    def say(self, text: str, *, warning: bool = False) -> None:
        """Prints a line."""
        if rank() == 0:
            rich.get_console().print(Text(printable(text), "bold red" if warning else ""), soft_wrap=True)

    def step(self, name: str, line: Mapping[str, Any], steps: int) -> None:
        """One of `steps` steps is done: prints a line. For `line` see `StepLog.write`."""
        shown = [f"{key} {line[key]:.4g}" for key in SHOWN if line.get(key) is not None]
        seconds, left = line["timing"]["total"], steps - line["step"] - 1
        self.say(f"{name}, step {line['step']} of {steps}: {', '.join(shown)}; {seconds:.1f} s, "
                 f"{seconds * left / 60:.0f} minutes left")


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log without an unfinished last line; empty if there is no file."""
    return [json.loads(text) for text in Path(path).read_bytes().split(b"\n")[:-1]] if Path(path).exists() else []


def cut_lines(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Removes the lines of `first_step` and later steps and an unfinished one; returns the lines before them."""
    kept = [line for line in read_lines(path) if line["step"] < first_step]
    write_file(path, b"".join(map(_encode, kept)))
    return kept


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line. It survives a kill of the process immediately, and a power cut after the next checkpoint."""
    if rank() == 0:
        with open(path, "ab") as file:
            file.write(_encode(line))


def _encode(line: Mapping[str, Any]) -> bytes:
    """A line of JSON. NaN and infinity become null, because JSON has neither."""
    return json.dumps(json.loads(json.dumps(line), parse_constant=lambda name: None)).encode() + b"\n"


class StepLog(AbstractContextManager["StepLog"]):
    """The lines of a stage in metrics.jsonl and samples.jsonl and, if the recipe asks for it, TensorBoard.

    The stage starts or continues at `first_step`, so older lines of this and later steps are removed.
    """

    def __init__(self, stage: Stage, *, first_step: int) -> None:
        self._metrics, self._samples = stage.directory / METRICS, stage.directory / SAMPLES
        for path in (self._metrics, self._samples):
            first(lambda path=path: cut_lines(path, first_step))
        self._tensorboard = None
        if stage.recipe.trackers and rank() == 0:
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
