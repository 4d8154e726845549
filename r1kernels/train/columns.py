"""How a step's metrics are shown in a terminal, by the run itself and by who watches it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

Column = tuple[str | tuple[str, ...], str]

# Column -> (key in the metrics, format). "cut": completions cut off at the limit; "flat": groups whose samples all
# have the same reward; "clip -/+": tokens without a gradient because of the lower and the upper bound.
COLUMNS: dict[str, Column] = {
    "step": ("step", "{:.0f}"),
    "pass@1": ("pass_at_1", "{:.1%}"),
    "acc.": ("reward_accuracy", "{:.2f}"),
    "form.": ("reward_format", "{:.2f}"),
    "len.": ("length", "{:.1f}"),
    "cut": ("truncated", "{:.0%}"),
    "KL": ("kl", "{:.4f}"),
    "entr.": ("entropy", "{:.3f}"),
    "clip -/+": (("clip_low_fraction", "clip_high_fraction"), "{:.0%}/{:.0%}"),
    "flat": ("zero_spread", "{:.0%}"),
    "tok/s": ("tokens_per_second", "{:.0f}"),
}
# With those that only some kinds of stages have.
ALL_COLUMNS: dict[str, Column] = {
    "step": COLUMNS["step"],
    "loss": ("loss", "{:.4f}"),
    "right": ("accuracy", "{:.1%}"),
    **COLUMNS,
    "lang.": ("reward_language", "{:.2f}"),
}
_BARS = "▁▂▃▄▅▆▇█"


def cell(metrics: Mapping[str, float], column: Column) -> str:
    """The value of a column; empty where the metrics do not have it."""
    key, form = column
    values = [metrics.get(name) for name in ((key,) if isinstance(key, str) else key)]
    if any(not isinstance(value, int | float) or not math.isfinite(value) for value in values):
        return ""
    return form.format(*values)


def columns_of(lines: Sequence[Mapping[str, float]]) -> dict[str, Column]:
    """The columns of which some line has a value."""
    return {name: column for name, column in ALL_COLUMNS.items() if any(cell(line, column) for line in lines)}


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve of at most `width` characters, each of which is the mean of its share of the values."""
    width = min(width, len(values))
    edges = [index * len(values) // max(1, width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, spread = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(_BARS[round((mean - low) / spread * 7) if spread else 3] for mean in means)


def duration(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
