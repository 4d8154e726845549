"""A picture as SVG text: its data, how it is drawn, and its text alternative."""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from r1kernels.bench.report import words
from r1kernels.bench.report.marks import OURS, mark
from r1kernels.bench.report.words import Writer, printable

INK = "#0b0c0d"  # replaced by the colour of the text around it, which follows the light or dark theme
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "legend.frameon": False, "axes.grid": True, "grid.color": "#808080", "grid.alpha": 0.25,
    "axes.axisbelow": True, "axes.linewidth": 0.8, "legend.fontsize": 8.5,
}
LINE, LETTERS = 0.19, 14  # the height of a line of a legend in inches, and letters in an inch of it
# An SVG file that a page shows as an image cannot inherit the colour of the page.
THEMES = ("<style>svg{color:#1f2328;background:#fff}@media(prefers-color-scheme:dark)"
          "{svg{color:#e6edf3;background:#0d1117}}</style>")
HASH = re.compile(r"<metadata>data sha256 ([0-9a-f]{64})</metadata>")


@dataclass(frozen=True)
class Picture:
    """`draw(figure, data)` draws; `data` is all that it reads, so its hash says which numbers a picture shows."""

    name: str
    title: str
    alt: str
    data: dict[str, Any]
    draw: Callable[[Figure, dict[str, Any]], None]
    caption: str = ""  # what a reader who sees the picture still needs
    size: tuple[float, float] = (4.8, 3.5)  # inches: readable at the width of a phone

    @property
    def data_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    def svg(self, *, standalone: bool = False) -> str:
        """The picture for use inside a page, or as a file."""
        raw = io.StringIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}), warnings.catch_warnings():
            # The viewer's font draws the text; matplotlib only measures it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure, self.data)
            figure.savefig(raw, format="svg", transparent=True)
        return _tidy(raw.getvalue(), self, standalone)


def _tidy(text: str, picture: Picture, standalone: bool) -> str:
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    body = text[text.index("<defs>"):].replace(INK, "currentColor")
    body = re.sub(r'<style type="text/css">.*?</style>', "", body, flags=re.DOTALL)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", body)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r"[ \t]+\n", "\n", body)
    width, height = (round(float(points) / 72 * 100) for points in box.groups())
    spaces = (f' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
              f'height="{height}"') if standalone else ""
    meta = f"<metadata>data sha256 {picture.data_hash}</metadata>\n{THEMES}\n" if standalone else ""
    alt = html.escape(printable(picture.alt))
    return f'<svg{spaces} {box[0]} role="img" aria-label="{alt}" stroke-linejoin="round">\n{meta}{body}'


STEPS = {10: ((1, 2, 5), (1,)), 1024: (tuple(2**k for k in range(10)), (1, 4, 16, 64, 256), (1, 32), (1,))}


def round_values(low: float, high: float, base: int, most: int = 6) -> list[float]:
    """Round values for a logarithmic axis within its limits: as many as there are, up to `most`."""
    powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
    found: list[float] = []
    for steps in STEPS[base]:
        found = [step * base**power for power in powers for step in steps if low <= step * base**power <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def log_axis(axes: Axes, which: str, values: Sequence[float], write: Writer, *, exact: bool = False,
             memory: bool = False) -> None:
    """A logarithmic axis with few labelled ticks: at the values themselves if `exact`, else at round numbers."""
    low, high = min(values), max(values)
    margin = max(1.15, (high / low) ** 0.06)
    limits = (low / margin, high * margin)
    ticks = sorted(set(values)) if exact else round_values(*limits, 1024 if memory else 10)
    if not ticks:
        ticks = sorted({low, high})
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(*limits)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([words.tick(write(tick)) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def line(axes: Axes, implementation: str, points: Sequence[Sequence[float]]) -> Any:
    """The line of an implementation, in its colour and with its marker."""
    color, marker = mark(implementation)
    ours = implementation.partition(", ")[0] == OURS
    [drawn] = axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5 if ours else 4.5,
                        linewidth=2.4 if ours else 1.3, zorder=3 if ours else 2)
    return drawn


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length - 1]}\N{HORIZONTAL ELLIPSIS}"


def note(axes: Axes, text: str, place: tuple[float, float], **how: Any) -> None:
    """Writes beside data; the axes keep their size, however long the text is."""
    axes.annotate(shortened(printable(text), 70), place, **how).set_in_layout(False)


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """Puts names below the axes. A figure grows with the lines that they take."""
    if not handles:
        return
    # Matplotlib leaves out names that begin with an underscore.
    shown = [f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name for name in map(printable, names)]
    width, height = figure.get_size_inches()
    letters = int(LETTERS * width)
    shown = [shortened(name, letters - 6) for name in shown]
    columns = max(1, min(columns, letters // (max(map(len, shown)) + 6)))
    figure.set_size_inches(width, height + LINE * max(0, math.ceil(len(shown) / columns) - 2))
    figure.legend(handles, shown, loc="outside lower center", ncols=columns)
