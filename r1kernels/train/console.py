"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from r1kernels.train.columns import COLUMNS, cell, duration


class Console:
    """Shows metrics as they come.

    Args:
        plain: lines even on a terminal.
    """

    def __init__(self, plain: bool = False) -> None:
        self._rich = RichConsole()
        self._plain = plain or not sys.stdout.isatty()
        self._live: Live | None = None
        self._rows: list[tuple[str, ...]] = []
        self._samples: list[tuple[str, str, float]] = []
        self._status, self._left, self._headed = "", "", False
        self._clocks: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Console:
        if not self._plain:
            self._live = Live(console=self._rich, refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.__exit__(None, None, None)
            self._live = None

    def say(self, text: str, *, warning: bool = False) -> None:
        self._rich.print(Text(text, style="bold red" if warning else ""), soft_wrap=True)

    def phase(self, text: str) -> None:
        """What is going on now."""
        self._status = text
        self._refresh()

    def stage(self, name: str, number: int, count: int, plan: str) -> None:
        """A stage begins, or is skipped."""
        self._rows, self._samples, self._left, self._headed, self._clocks = [], [], "", False, {}
        self.say(f"[{number}/{count}] {name}: {plan}")

    def evaluation(self, name: str, evaluation: Mapping[str, Any]) -> None:
        """What came out at the end of a stage."""
        pass_at_1 = "-" if evaluation["pass_at_1"] is None else f"{evaluation['pass_at_1']:.1%}"
        self.say(f"{name}: pass@1 {pass_at_1}, length {evaluation['length']:.1f} tokens")

    def training(self, name: str, step: int, steps: int, loss: float) -> None:
        """Progress of supervised training."""
        text = f"{name} {step}/{steps}  loss {loss:.3f}"
        self._left = self._eta(name, step, steps)
        if self._plain:
            print(f"{text}  ETA {self._left}", flush=True)
        self.phase(text)

    def samples(self, samples: Sequence[tuple[str, str, float]]) -> None:
        """Completions to show: (question, completion, reward)."""
        self._samples = list(samples)
        if self._plain:
            for question, completion, reward in samples[:1]:
                print(f"  [{reward:g}] {question} ->{completion!r}", flush=True)

    def step(self, metrics: Mapping[str, float], steps: int) -> None:
        """A finished step of RL."""
        row = tuple(cell(metrics, column) for column in COLUMNS.values())
        self._rows.append(row)
        self._left = self._eta("rl", int(metrics["step"]) + 1, steps)
        if self._plain:
            if not self._headed:
                print("  ".join(f"{name:>8}" for name in (*COLUMNS, "ETA")), flush=True)
                self._headed = True
            print("  ".join(f"{cell:>8}" for cell in (*row, self._left)), flush=True)
        self.phase(f"step {metrics['step'] + 1:.0f}/{steps}")

    def _eta(self, phase: str, step: int, steps: int) -> str:
        """Time left in a phase, at the pace since its first step that was seen here."""
        now = time.monotonic()
        begin, first = self._clocks.setdefault(phase, (now, step))
        if step == first:
            return "?"
        return duration((now - begin) / (step - first) * (steps - step))

    def _refresh(self) -> None:
        if not self._live:
            return
        table = Table(box=None, header_style="bold", padding=(0, 1))
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for row in self._rows[-15:]:
            table.add_row(*row)
        panels = [
            Panel(Text(completion.strip()[:600]), title=Text(f"{question[:80]}  reward {reward:g}"), title_align="left")
            for question, completion, reward in self._samples[:3]
        ]
        status = f"{self._status}  ETA {self._left}" if self._left else self._status
        self._live.update(Group(table, *panels, Text(status, style="bold")))
