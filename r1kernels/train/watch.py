"""Follows a run from another terminal. It only reads: the run does not know that somebody looks."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from r1kernels.train.columns import ALL_COLUMNS, cell, columns_of, duration, sparkline
from r1kernels.train.follow import FollowedRun, FollowedStage
from r1kernels.train.schema import ConfigError
from r1kernels.train.tables import visible, with_error

# Steps shown of the stage at work.
ROWS = 12
# What is drawn as a curve, as far as a stage has it.
CURVES = {"pass_at_1": "pass@1", "reward": "reward", "length": "length", "loss": "loss"}


def watch(run_dir: str | Path, *, once: bool = False, interval_s: float = 1.0) -> int:
    """Shows a run until it ends: 0 when it is finished, 1 when its process is gone before that.

    Args:
        run_dir: the directory of a run, there already or not yet.
        once: show how it stands, and end; 1 if there is no run.
        interval_s: between two looks.
    """
    if not interval_s > 0:
        raise ConfigError(f"'interval_s' is {interval_s!r}, expected more than 0")
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is a file, expected the directory of a run")
    run, view = FollowedRun(run_dir), _Screen() if sys.stdout.isatty() else _Lines()
    with contextlib.closing(run), view:
        while True:
            pid, alive = run.writer()
            run.poll()  # after the look at the process: what it wrote last is seen
            end = _end(run, pid, alive, once)
            if end:
                code, text = end
                view.end(run, text)
                return code
            view.show(run, _state(run, pid, alive))
            time.sleep(interval_s)


def _end(run: FollowedRun, pid: int | None, alive: bool, once: bool) -> tuple[int, str] | None:
    """The exit status and the last words, if there is nothing more to come."""
    if run.finished and (run.evaluated or not alive):
        report = run.run_dir / "report.html"
        return 0, f"{run.run_dir} is finished" + (f"; report: {report}" if report.exists() else "")
    if pid is not None and not alive:
        waiting = ", ".join(stage.name for stage in run.stages.values() if stage.status != "finished")
        return 1, (
            f"the process that wrote {run.run_dir} ({pid}) is gone from this machine; not finished: "
            f"{waiting or 'nothing was begun'}"
        )
    if once:
        return (0, _state(run, pid, alive)) if run.stages else (1, f"there is no run in {run.run_dir}")
    return None


def _state(run: FollowedRun, pid: int | None, alive: bool) -> str:
    stage = run.current
    if not run.stages:
        return f"waiting for a run in {run.run_dir}"
    if stage is None:
        return f"{run.run_dir}: no stage has begun"
    at = f"{stage.name}: {stage.status}"
    if stage.status == "finished":
        return f"{at}; evaluation or the next stage"
    steps, lines, left = stage.settings.get("steps"), stage.lines(), stage.left()
    if lines:
        at += f", step {lines[-1]['step'] + 1}" + (f" of {steps}" if steps else "") + (f", {left} left" if left else "")
    damaged = sum(tail.damaged for tail in stage.tails.values())
    return at + (f"; {damaged} damaged lines" if damaged else "") + (f" (process {pid})" if alive else "")


def _result(stage: FollowedStage) -> str:
    found = stage.entry.get("evaluation") or {}
    return f"{with_error(found, 'pass_at_1', 100)}" if found else ""


class _Lines:
    """Plain lines, for files and pipes: each change once."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}
        self._seen: dict[str, int] = {}
        self._header: list[str] = []
        self._state = ""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def say(self, text: str) -> None:
        print(visible(text), flush=True)

    def end(self, run: FollowedRun, text: str) -> None:
        self.show(run, "")
        self.say(text)

    def show(self, run: FollowedRun, state: str) -> None:
        for stage in run.stages.values():
            if stage.status == "finished":
                self._steps(stage)
            result = _result(stage)
            text = f"{stage.status}{f', pass@1 {result} %' if result else ''}"
            if stage.entry and self._told.get(stage.name) != text:
                self.say(f"{stage.name} ({stage.kind}): {text}")
                self._told[stage.name] = text
            self._steps(stage)
        if state and not run.current and state != self._state:
            self.say(state)
        self._state = state

    def _steps(self, stage: FollowedStage) -> None:
        lines, seen = stage.lines(), self._seen.get(stage.name)
        last = lines[-1]["step"] if lines else -1
        if seen is not None and last < seen:
            self.say(f"{stage.name}: resumed at step {last + 1}")
            self._seen[stage.name] = last
            return
        fresh = [line for line in stage.rows(ROWS if seen is None else len(lines))
                 if seen is None or line["step"] > seen]
        if not fresh:
            return
        columns = columns_of(stage.rows(ROWS))
        if set(columns) - set(self._header):
            self._header = list(columns)
            self.say("  ".join(f"{name:>8}" for name in columns))
        for line in fresh:
            self.say("  ".join(f"{cell(line, ALL_COLUMNS[name]):>8}" for name in self._header))
        self._seen[stage.name] = last


class _Screen:
    """A live table, for a terminal."""

    def __init__(self) -> None:
        self._live = Live(console=RichConsole(), auto_refresh=False)

    def __enter__(self) -> _Screen:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.__exit__(None, None, None)

    def end(self, run: FollowedRun, text: str) -> None:
        self.show(run, text)

    def show(self, run: FollowedRun, state: str) -> None:
        self._live.update(Group(*self._parts(run, state)), refresh=True)

    def _parts(self, run: FollowedRun, state: str) -> Iterator[RenderableType]:
        if run.stages:
            yield _stages_table(run)
        stage = run.current
        if stage is not None and stage.lines():
            yield Text()
            yield from _curves(stage)
            rows = stage.rows(ROWS)
            columns = columns_of(rows)
            table = Table(box=None, header_style="bold", padding=(0, 1))
            for name in columns:
                table.add_column(name, justify="right")
            for line in rows:
                table.add_row(*(cell(line, column) for column in columns.values()))
            yield table
            for sample in stage.lines("samples")[-1:]:
                title = Text(visible(f"{sample.get('question', '')}"[:80]))
                text = Text(visible(f"{sample.get('completion', '')}".strip()[:600]))
                yield Panel(text, title=title, title_align="left")
        yield Text(visible(state), style="bold")


def _stages_table(run: FollowedRun) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for name in ("stage", "kind", "status"):
        table.add_column(name)
    for name in ("pass@1", "time"):
        table.add_column(name, justify="right")
    styles = {"finished": "green", "running": "bold yellow"}
    for stage in run.stages.values():
        seconds = stage.entry.get("seconds")
        table.add_row(
            Text(visible(stage.name)), Text(visible(stage.kind)),
            Text(stage.status, style=styles.get(stage.status, "dim")),
            _result(stage), duration(seconds) if seconds and stage.status == "finished" else "",
        )
    return table


def _curves(stage: FollowedStage) -> Iterator[Text]:
    for key, name in CURVES.items():
        values = [line[key] for line in stage.lines() if isinstance(line.get(key), int | float)]
        if len(values) > 1 and (key != "loss" or "reward" not in stage.lines()[-1]):
            ends = f" {values[0]:.3g} to {values[-1]:.3g}"
            yield Text.assemble((f"{name:>8} ", "dim"), sparkline(values), (ends, "dim"))
