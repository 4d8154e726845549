"""Pictures of a series of shapes: time and memory against V and N, and cost against the share of active tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from r1kernels.bench.report import words
from r1kernels.bench.report.figures import INK, Picture, legend, line, log_axis
from r1kernels.bench.report.marks import OURS, mark, order
from r1kernels.bench.report.rows import Row, grouped, key, measured, name, size

AXES = {"vocabulary": ("V", "vocabulary V"), "tokens": ("N", "tokens N")}
QUANTITIES = {"time": ("median_s", words.seconds), "memory": ("peak_extra_bytes", words.memory)}
Lines = dict[str, list[list[float]]]


def series(results: dict[str, Any], name: str) -> list[list[Row]]:
    """The rows of a series, a list for each operation, pass, dtype and variant."""
    found = [row for row in measured(results) if row.get("series") == name]
    return list(grouped(found, lambda row: key(row, "op", "pass", "dtype", "variant")).values())


def lines_of(found: list[Row], x: Callable[[Row], float | None], y: Callable[[Row], float | None]) -> Lines:
    """Points by implementation, sorted by x; what has no x or no y above 0 is left out."""
    lines: Lines = {}
    for implementation, group in grouped(found, name).items():
        points = [(x(row), words.positive(y(row))) for row in group]
        kept = sorted([place, value] for place, value in points if place and value)
        if kept:
            lines[implementation] = kept
    return dict(sorted(lines.items(), key=lambda item: order(item[0])))


def growth(results: dict[str, Any]) -> list[Picture]:
    """Time and memory of each measured operation against V and against N."""
    pictures = []
    for which, (letter, _) in AXES.items():
        for number, found in enumerate(series(results, which)):
            for quantity, (field, _) in QUANTITIES.items():
                lines = lines_of(found, lambda row: size(row, letter), lambda row: row.get(field))  # noqa: B023
                if len({point[0] for points in lines.values() for point in points}) > 1:
                    pictures.append(_growth(found[0], which, quantity, lines, f"{quantity}-{which}-{number}"))
    return pictures


def _growth(row: Row, which: str, quantity: str, lines: Lines, name: str) -> Picture:
    letter, _ = AXES[which]
    data = {"lines": lines, "which": which, "quantity": quantity}
    title = f"{quantity.capitalize()} of {words.printable(row.get('op'))} against {letter}"
    alt = f"{title}, {setting(row, letter)}. {at_the_end(lines, which, quantity)}"
    return Picture(name, title, alt, data, _one, f"{setting(row, letter)}.")


def setting(row: Row, without: str = "") -> str:
    """What all points of a picture have in common."""
    sizes = {name: value for name, value in (row.get("shape") or {}).items() if name != without}
    return words.listed([words.shape(sizes), words.printable(row.get("dtype") or ""), words.passes(row.get("pass")),
                         words.printable(row.get("variant") or "")])


def at_the_end(lines: Lines, which: str, quantity: str) -> str:
    """The values at the largest x, in words."""
    last = max(point[0] for points in lines.values() for point in points)
    write = QUANTITIES[quantity][1]
    values = [f"{implementation} {write(points[-1][1])}" for implementation, points in lines.items()
              if points[-1][0] == last]
    return f"At {AXES[which][0]} = {words.whole(last)}: {', '.join(values)}."


def _one(figure: Figure, data: dict[str, Any]) -> None:
    handles = _panel(figure.subplots(), data["lines"], data["which"], data["quantity"])
    legend(figure, handles, list(data["lines"]), 2)


def _panel(axes: Any, lines: Lines, which: str, quantity: str) -> list[Any]:
    handles = [line(axes, name, points) for name, points in lines.items()]
    points = [point for points in lines.values() for point in points]
    if points:
        log_axis(axes, "x", [place for place, _ in points], words.whole, exact=True)
        log_axis(axes, "y", [value for _, value in points], QUANTITIES[quantity][1], memory=quantity == "memory")
    axes.set_xlabel(AXES[which][1])
    axes.set_ylabel({"time": "time", "memory": "peak extra memory"}[quantity])
    return handles


def head(results: dict[str, Any], op: str = "linear_grpo_loss") -> Picture | None:
    """Time and memory of the loss head against V side by side, or None if they were not measured."""
    found = next((rows for rows in series(results, "vocabulary") if rows[0].get("op") == op), None)
    if found is None:
        return None
    panels = {quantity: lines_of(found, lambda row: size(row, "V"), lambda row: row.get(field))  # noqa: B023
              for quantity, (field, _) in QUANTITIES.items()}
    if not all(panels.values()):
        return None
    alt = " ".join(f"{quantity.capitalize()} of {op} against the vocabulary, {setting(found[0], 'V')}. "
                   f"{at_the_end(lines, 'vocabulary', quantity)}" for quantity, lines in panels.items())
    return Picture("head", "The loss head", alt, {"panels": panels}, _head, f"{setting(found[0], 'V')}.", (8.4, 3.4))


def _head(figure: Figure, data: dict[str, Any]) -> None:
    drawn: dict[str, Any] = {}
    for axes, (quantity, lines) in zip(figure.subplots(1, 2), data["panels"].items(), strict=True):
        drawn.update(zip(lines, _panel(axes, lines, "vocabulary", quantity), strict=True))
    names = sorted(drawn, key=order)
    legend(figure, [drawn[name] for name in names], names, min(len(names), 5))


def reason(row: Row) -> str:
    """Why tokens are not active: "clipped" for the variant "75% clipped"; "" where all are."""
    return re.sub(r"^[\d.]+ ?% *(of )?", "", str(row.get("variant") or ""))


def active(results: dict[str, Any]) -> list[Picture]:
    """Cost against the share of active tokens, relative to the cost with all tokens active."""
    pictures = []
    found = [row for row in measured(results) if row.get("series") == "active"]
    for number, group in enumerate(grouped(found, lambda row: key(row, "op", "pass", "dtype")).values()):
        lines: Lines = {}
        for why in dict.fromkeys(reason(row) for row in group if row.get("active_share") != 1):
            part = [row for row in group if reason(row) == why or row.get("active_share") == 1]
            points_of = lines_of(part, lambda row: words.positive(row.get("active_share")),
                                 lambda row: row.get("median_s"))
            lines |= {words.listed([name, why]): [[share, seconds / points[-1][1]] for share, seconds in points]
                      for name, points in points_of.items() if len(points) > 1}
        if not lines:
            continue
        title = f"Cost of {words.printable(group[0].get('op'))} against the share of active tokens"
        lowest = "; ".join(f"{name} takes {words.percent(points[0][1])} of its full time with "
                           f"{words.percent(points[0][0])} active" for name, points in lines.items())
        alt = f"{title}, relative to all tokens active. {lowest}. The ideal line for three products is 1/3 + 2/3 k."
        common = setting({**group[0], "variant": ""})
        pictures.append(Picture(f"active-{number}", title, alt, {"lines": lines}, _active, f"{common}."))
    return pictures


def _active(figure: Figure, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    [ideal] = axes.plot([0, 1], [1 / 3, 1], color=INK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    handles = [line(axes, name, points) for name, points in data["lines"].items()]
    reasons = [label.partition(", ")[2] for label in data["lines"]]
    for handle, why in zip(handles, reasons, strict=True):
        handle.set_linestyle(("-", (0, (1, 1)), (0, (5, 1, 1, 1)))[list(dict.fromkeys(reasons)).index(why) % 3])
    axes.set_xlim(0, 1.04)
    axes.set_ylim(0, None)
    axes.set_xlabel("share k of tokens with a gradient")
    axes.set_ylabel("time / time with k = 1")
    legend(figure, [*handles, ideal], [*data["lines"], "ideal: 1/3 + 2/3 k"], 2)


def swatch(implementation: str) -> Line2D:
    """A handle for a legend."""
    color, marker = mark(implementation)
    return Line2D([], [], color=color, marker=marker, linestyle="", markersize=6 if implementation == OURS else 5)
