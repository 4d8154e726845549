"""Pictures of how near an implementation comes to the ceilings of its device, and of errors against float64."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from r1kernels.bench.report import rows as data_of
from r1kernels.bench.report import words
from r1kernels.bench.report.curves import swatch
from r1kernels.bench.report.figures import INK, Picture, legend, log_axis, note, shortened
from r1kernels.bench.report.marks import OURS, mark, order
from r1kernels.bench.report.rows import Row, grouped, key, name, plain

FAMILIES = {
    "hidden": "Operations from hidden states",
    "logits": "Operations from logits",
    "tokens": "Operations on values per token",
}
ABOUT = {
    "hidden": "The ceiling is the speed of bare products of the same dtype, or of a copy where that takes longer.",
    "logits": "The ceiling is a copy of as many bytes as the operation must read and write.",
    "tokens": "The ceiling is a copy of as many bytes as the operation must read and write. These operations take "
              "little time.",
}
ROW = 0.30  # inches of a row of a picture with a row for each operation


def roofline(results: dict[str, Any]) -> Picture | None:
    """FLOP/s of operations with matrix products against their arithmetic intensity, under the measured ceilings."""
    ceilings = results.get("ceilings") or {}
    products = {str(dtype): speed for dtype, speed in (ceilings.get("gemm_flops_per_s") or {}).items()
                if words.positive(speed)}
    copy = words.positive(ceilings.get("copy_bytes_per_s"))
    points: dict[str, list[list[float]]] = {}
    for group in grouped(plain(results), lambda row: key(row, "op", "pass", "dtype", "variant")).values():
        for row in data_of.largest(group):
            flops, moved = words.positive(row.get("flops")), words.positive(row.get("bytes_moved"))
            if flops and moved:
                points.setdefault(name(row), []).append([flops / moved, flops / row["median_s"]])
    if not points or not copy or not products:
        return None
    points = dict(sorted(points.items(), key=lambda item: order(item[0])))
    best = ", ".join(f"{name} {words.rate(max(speed for _, speed in found), 'FLOP/s')}"
                     for name, found in points.items())
    flat = ", ".join(f"{words.rate(speed, 'FLOP/s')} in {dtype}" for dtype, speed in products.items())
    alt = (f"Roofline: FLOP/s against FLOP for each byte. Ceilings: a copy at {words.rate(copy, 'B/s')}, products at "
           f"{flat}. Highest: {best}.")
    return Picture("roofline", "Roofline of operations with matrix products", alt,
                   {"points": points, "products": products, "copy": copy}, _roofline,
                   f"Lines: {words.rate(copy, 'B/s')} of a copy; products at {flat}.")


def _roofline(figure: Figure, data: dict[str, Any]) -> None:
    axes, copy = figure.subplots(), data["copy"]
    places = [place for found in data["points"].values() for place, _ in found]
    speeds = [speed for found in data["points"].values() for _, speed in found]
    ridges = [speed / copy for speed in data["products"].values()]
    left, right = min([*places, *ridges]) / 3, max([*places, *ridges]) * 3
    top = max([*speeds, *data["products"].values()])
    log_axis(axes, "x", [left, right], words.whole)
    log_axis(axes, "y", [min([*speeds, left * copy]), top * 1.4], lambda value: words.rate(value, "FLOP/s"))
    highest, beside = max(ridges), {"textcoords": "offset points", "fontsize": 8}
    axes.plot([left, highest], [left * copy, highest * copy], color=INK, linewidth=1.1, zorder=1)
    for dtype, speed in data["products"].items():
        axes.plot([speed / copy, right], [speed, speed], color=INK, linewidth=1.1, zorder=1)
        note(axes, f"products, {dtype}", (right, speed), xytext=(-2, 2), ha="right", **beside)
    note(axes, "copy", (left, left * copy), xytext=(8, 2), **beside)
    for implementation, found in data["points"].items():
        color, marker = mark(implementation)
        axes.plot(*zip(*found, strict=True), color=color, marker=marker, linestyle="", markersize=5,
                  zorder=3 if implementation == OURS else 2)
    axes.set_xlabel("FLOP for each byte that must be moved")
    axes.set_ylabel("FLOP/s")
    legend(figure, [swatch(name) for name in data["points"]], list(data["points"]), 2)


def shares(results: dict[str, Any], family: str) -> Picture | None:
    """How much of its ceiling each implementation of each operation of a family reaches: one row an operation."""
    found = [row for row in plain(results) if data_of.family(row) == family and data_of.bound(results, row)]
    several = len({row.get("dtype") for row in found}) > 1
    table: dict[str, dict[str, float]] = {}
    for group in grouped(found, lambda row: key(row, "op", "variant", "pass", "dtype")).values():
        first = group[0]
        label = words.listed([words.printable(first.get("op")), words.printable(first.get("variant") or ""),
                              words.passes(first.get("pass")), words.printable(first.get("dtype")) if several else ""])
        for row in sorted(data_of.largest(group), key=lambda row: order(name(row))):
            table.setdefault(label, {})[name(row)] = data_of.bound(results, row) / row["median_s"]
    if not table:
        return None
    best = "; ".join(label + ": " + ", ".join(f"{name} {words.percent(share)}" for name, share in line.items())
                     for label, line in table.items())
    alt = f"{FAMILIES[family]}: share of the measured ceiling that each implementation reaches. {best}."
    return Picture(f"share-{family}", FAMILIES[family], alt, {"rows": table}, _shares, ABOUT[family],
                   (4.8, 1.1 + ROW * len(table)))


def _shares(figure: Figure, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    values = [share for line in data["rows"].values() for share in line.values()]
    log_axis(axes, "x", [min([*values, 0.1]), max([*values, 1.0])], words.percent)
    axes.axvline(1, color=INK, linewidth=1.1, zorder=1)
    for place, line in _labelled(axes, list(data["rows"])):
        for implementation, share in reversed(data["rows"][line].items()):
            color, marker = mark(implementation)
            axes.plot([share], [place], color=color, marker=marker, markersize=6 if implementation == OURS else 5)
    axes.set_xlabel("share of the measured ceiling")
    names = sorted({name for line in data["rows"].values() for name in line}, key=order)
    legend(figure, [swatch(name) for name in names], names, 3)


def _labelled(axes: Axes, labels: list[str]) -> list[tuple[float, str]]:
    """Puts each label above its row, where a narrow picture has room for it, and gives the height of each row."""
    axes.set_ylim(len(labels) - 0.35, -0.75)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    for place, label in enumerate(labels):
        note(axes, label, (0, place - 0.28), xycoords=("axes fraction", "data"), fontsize=7.5, va="bottom")
        axes.axhline(place, color=INK, alpha=0.15, linewidth=0.6, zorder=0)
    return list(enumerate(labels))


def errors(results: dict[str, Any]) -> list[Picture]:
    """Errors against float64 as distributions, a picture for each quantity and a row for each library and dtype."""
    pictures = []
    for number, (quantity, entries) in enumerate(data_of.fidelity(results).items()):
        table: dict[str, dict[str, Any]] = {}
        for entry in entries:
            found = data_of.quantiles(entry)
            if found:
                table[_unique(table, entry)] = {"implementation": name(entry), "quantiles": found}
        if table:
            pictures.append(_errors(quantity, table, f"error-{number}"))
    return pictures


def _unique(table: dict[str, Any], entry: Row) -> str:
    """The library and dtype of an entry and, if there is already such a row, its shape and number too."""
    label = f"{words.printable(name(entry))}, {words.printable(entry.get('dtype') or '')}"
    for longer in (label, f"{label}, {words.shape(entry.get('shape'))}", *(f"{label} ({n})" for n in range(2, 99))):
        if longer not in table:
            return longer
    return label


def _errors(quantity: str, table: dict[str, Any], name: str) -> Picture:
    title = f"Error of {words.printable(quantity)} against float64"
    lines = "; ".join(f"{label}: median {words.error(row['quantiles'].get('0.5'))}, largest "
                      f"{words.error(row['quantiles'].get('1'))}" for label, row in table.items())
    return Picture(name, title, f"{title}. {lines}.", {"rows": table, "quantity": quantity}, _draw_errors,
                   size=(4.8, 0.9 + ROW * len(table)))


def _draw_errors(figure: Figure, data: dict[str, Any]) -> None:
    """Errors of 0 have no place on a logarithmic axis: they are drawn at its left end, which is then labelled 0."""
    axes = figure.subplots()
    values = [value for row in data["rows"].values() for value in row["quantiles"].values()]
    above = [value for value in values if value > 0] or [1e-9, 1e-6]
    zero = min(above) / 10 if min(values, default=1) <= 0 else None
    log_axis(axes, "x", [*above, *([zero] if zero else [])],
             lambda value: "0" if zero and value <= 1.01 * zero else f"{value:.0e}".replace("e-0", "e-"))
    if zero:
        ticks = [tick for tick in axes.get_xticks() if tick >= 3 * zero]
        axes.set_xticks([zero, *ticks], ["0", *(f"{tick:.0e}".replace("e-0", "e-") for tick in ticks)])
    for place, label in _labelled(axes, list(data["rows"])):
        row = data["rows"][label]
        color, marker = mark(row["implementation"])
        found = {quantile: value if value > 0 else zero for quantile, value in row["quantiles"].items()}
        axes.plot(list(found.values()), [place] * len(found), color=color, linewidth=2.2, marker="|", markersize=7)
        if "0.5" in found:
            axes.plot([found["0.5"]], [place], color=color, marker=marker, markersize=6)
    quantity = shortened(words.printable(data["quantity"]), 20)
    axes.set_xlabel(f"error of {quantity}: median (marker), 0.9, 0.99, 0.999, largest")
