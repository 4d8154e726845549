"""What a run tells while it works: lines in files, a live table on a terminal, and trackers such as TensorBoard."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from r1kernels.train.checkpoint import write_file
from r1kernels.train.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from r1kernels.train.stage import Stage

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

# Column -> (metric, format). "cut": completions that reached the limit; "flat": groups whose rewards are all equal;
# "clip -" and "clip +": tokens without a gradient because of the lower and the upper bound.
_COLUMNS = {
    "step": ("step", ".0f"), "pass@1": ("pass_at_1", ".1%"), "acc.": ("reward_accuracy", ".2f"),
    "form.": ("reward_format", ".2f"), "len.": ("length", ".1f"), "cut": ("truncated", ".0%"), "KL": ("kl", ".4f"),
    "entr.": ("entropy", ".3f"), "clip -": ("clip_low_fraction", ".1%"), "clip +": ("clip_high_fraction", ".1%"),
    "flat": ("zero_spread", ".0%"), "tok/s": ("tokens_per_second", ".0f"),
}

# Controls but tab and newline, halves of characters, separators of lines, invisible and direction-changing characters.
_HIDDEN = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """Text that cannot act on a terminal or a page: controlling and invisible characters are shown as [U+XXXX].

    Whatever a model or a server wrote goes through this function before a person sees it.
    """
    return _HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(text).replace("\r\n", "\n"))


def duration(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


class Console:
    """Shows the progress of a run: a live table on a terminal, plain lines elsewhere.

    Args:
        plain: lines on a terminal too.
    """

    def __init__(self, plain: bool = False) -> None:
        self._rich = RichConsole(highlight=False)
        live = sys.stdout.isatty() and not plain
        self._live = Live(console=self._rich, refresh_per_second=4) if live else None
        self._begin_stage()

    def _begin_stage(self) -> None:
        self._rows: list[list[str]] = []
        self._samples: list[tuple[str, str, float]] = []
        self._eta, self._first = "", None  # time left; clock and number of the first step that this process saw

    def __enter__(self) -> Console:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, *, warning: bool = False) -> None:
        """Prints a line that stays."""
        encoding = self._rich.encoding
        shown = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        self._rich.print(Text(shown, style="bold red" if warning else ""), soft_wrap=True)

    def phase(self, text: str) -> None:
        """Tells what happens now, below the live table."""
        if not self._live:
            return
        columns = (Column(name, justify="right") for name in _COLUMNS)
        table = Table(*columns, box=None, header_style="bold", padding=(0, 1))
        for row in self._rows[-15:]:
            table.add_row(*row)
        panels = []
        for question, completion, reward in self._samples[:3]:
            title = Text(printable(f"{question[:80]}  reward {reward:g}").replace("\n", " "))
            panels.append(Panel(Text(printable(completion.strip()[:600])), title=title, title_align="left"))
        status = Text(printable(f"{text}  ETA {self._eta}" if self._eta else text), style="bold")
        self._live.update(Group(*([table] if self._rows else []), *panels, status))

    def stage(self, name: str, number: int, count: int, plan: str) -> None:
        """A stage begins, or is skipped."""
        self._begin_stage()
        self.say(f"[{number}/{count}] {name}: {plan}")

    def evaluation(self, name: str, evaluation: Mapping[str, Any]) -> None:
        """The evaluation at the end of a stage."""
        pass_at_1 = "-" if evaluation["pass_at_1"] is None else f"{evaluation['pass_at_1']:.1%}"
        self.say(f"{name}: pass@1 {pass_at_1}, length {evaluation['length']:.1f} tokens")

    def progress(self, name: str, step: int, steps: int, loss: float) -> None:
        """`step` of the `steps` updates of supervised training are done."""
        text = f"{name} {step}/{steps}  loss {loss:.3f}"
        self._advance(text, step, steps)
        if not self._live:
            self.say(f"{text}  ETA {self._eta}")

    def samples(self, samples: Sequence[tuple[str, str, float]]) -> None:
        """Completions to show: (question, completion, reward)."""
        self._samples = list(samples)
        if samples and not self._live:
            question, completion, reward = samples[0]
            self.say(f"  [{reward:g}] {question} -> {completion[:600]!r}")

    def step(self, name: str, metrics: Mapping[str, Any], steps: int) -> None:
        """A step of RL is done."""
        values, done = {**metrics, **metrics.get("timing", {})}, metrics["step"] + 1
        row = ["" if values.get(key) is None else f"{values[key]:{form}}" for key, form in _COLUMNS.values()]
        self._rows.append(row)
        self._advance(f"{name} {done}/{steps}", done, steps)
        if not self._live:
            head = [(*_COLUMNS, "ETA")] if len(self._rows) == 1 else []
            for cells in (*head, (*row, self._eta)):
                self.say("  ".join(f"{cell:>8}" for cell in cells))

    def _advance(self, text: str, step: int, steps: int) -> None:
        now = time.monotonic()
        began, first = self._first = self._first or (now, step)
        self._eta = duration((now - began) / (step - first) * (steps - step)) if step > first else "?"
        self.phase(text)


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a log; an empty list if there is no file. A last line that is not finished is left out.

    Raises:
        DataError: the file cannot be read, or a line is damaged.
    """
    try:
        written = Path(path).read_bytes().split(b"\n")[:-1] if os.path.exists(path) else []
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    lines = []
    for number, text in enumerate(written, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise DataError(f"{path}, line {number} is damaged: {text!r:.60}; expected a JSON object with a 'step'")
        lines.append(line)
    return lines


def _encode(line: Mapping[str, Any]) -> bytes:
    """One line. NaN and infinity become null, which JSON has; a lone surrogate becomes "?", which UTF-8 has."""
    finite = json.loads(json.dumps(line), parse_constant=lambda name: None)
    return (json.dumps(finite, ensure_ascii=False) + "\n").encode("utf-8", "replace")


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; its older lines are unchanged") from error


def cut_lines(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Removes the lines of `first_step` and later steps and a half-written one; returns the lines before them."""
    kept = [line for line in read_lines(path) if line["step"] < first_step]
    write_file(path, b"".join(map(_encode, kept)))
    return kept


def sync_lines(path: Path) -> None:
    """Puts all lines on the disk."""
    with _storage(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line, whole or not at all. It survives the death of the process at once, a power cut after a sync."""
    text = _encode(line)
    with _storage(path), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


# What writes (step, values), and what closes the tracker.
_Tracker = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]


def _tensorboard(stage: Stage, first_step: int) -> _Tracker:
    """Events under `tensorboard/`. After a resume, TensorBoard ignores the earlier events of the repeated steps."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(stage.directory.parent / "tensorboard" / stage.settings.name), purge_step=first_step)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _trackio(stage: Stage, first_step: int) -> _Tracker:
    """A Trackio run. It cannot remove points: after a resume, repeated steps are there twice with the same values."""
    import trackio

    project = stage.directory.parent.absolute().name
    resume = "allow" if first_step else "never"
    run = trackio.init(project=project, name=stage.settings.name, resume=resume, embed=False)
    return lambda step, values: run.log(values, step=step), run.finish


_TRACKERS: dict[str, Callable[[Stage, int], _Tracker]] = {"tensorboard": _tensorboard, "trackio": _trackio}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"'trackers' names '{name}', whose package is not installed; run: pip install {name}")


class StepLog:
    """The log of a stage: metrics.jsonl, samples.jsonl, and a copy of the metrics for the trackers.

    Args:
        first_step: where the stage starts or continues. Lines of this and later steps are removed: they come again.
    """

    def __init__(self, stage: Stage, *, first_step: int) -> None:
        self._console = stage.console
        self._files = stage.directory / METRICS, stage.directory / SAMPLES
        for path in self._files:
            cut_lines(path, first_step)
        self._trackers: dict[str, _Tracker] = {}
        for name in stage.recipe.trackers:
            with self._optional(name):
                self._trackers[name] = _TRACKERS[name](stage, first_step)

    def write(self, line: Mapping[str, Any]) -> None:
        """One step: {"step": n, metric: value, ..., "timing": {part: seconds, ...}}.

        Whatever depends on the clock is under "timing", so that two equal runs have equal lines without it.
        """
        append_line(self._files[0], line)
        values = {**line, **{f"timing/{name}": value for name, value in line.get("timing", {}).items()}}
        del values["step"]
        numbers = {key: x for key, x in values.items() if isinstance(x, int | float) and math.isfinite(x)}
        for name, (write, _) in list(self._trackers.items()):
            with self._optional(name):
                write(line["step"], numbers)

    def examples(self, step: int, examples: Sequence[Mapping[str, Any]]) -> None:
        """Completions of a step, for people and for the report."""
        for example in examples:
            append_line(self._files[1], {"step": step, **example})

    def sync(self) -> None:
        """Puts all lines on the disk, before a checkpoint that relies on them."""
        for path in self._files:
            sync_lines(path)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: object) -> None:
        for name, (_, close) in list(self._trackers.items()):
            with self._optional(name):
                close()

    @contextlib.contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        """A tracker that fails is dropped with one warning."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            text = f"the tracker {name} failed and is dropped ({type(error).__name__}: {error}); {METRICS} is complete"
            self._console.say(text, warning=True)
