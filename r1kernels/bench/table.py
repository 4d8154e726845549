"""The table in the terminal: the rows of a task, errors of a quantity, and what was left out."""

from __future__ import annotations

import math
from typing import Any


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bytes_text(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"


HEADER = (f"  {'':<28}{'median':>10}{'spread':>9}{'x ours':>9}{'peak':>12}{'error':>11}\n"
          "  (x ours: median over rounds of its time / ours in the same round; spread: interquartile range / median)")
LEAST_ROUNDS, WIDEST = 3, 0.25


def spread(row: dict[str, Any]) -> float | None:
    """Interquartile range over median; None where a row has no such numbers."""
    median, iqr = row.get("median_s"), row.get("iqr_s")
    if not isinstance(median, int | float) or not isinstance(iqr, int | float) or not median > 0:
        return None
    share = float(iqr) / float(median)
    return share if math.isfinite(share) else None


def unstable(row: dict[str, Any]) -> bool:
    """Whether the time of a row is uncertain: few rounds, or a wide spread."""
    rounds, wide = row.get("rounds"), spread(row)
    return (isinstance(rounds, int) and rounds < LEAST_ROUNDS) or (wide is not None and wide > WIDEST)


def of_rows(title: str, rows: list[dict[str, Any]]) -> str:
    lines = ["", title, HEADER]
    for row in rows:
        error = "-" if row["implementation"].startswith("ceiling") else f"{row['max_error']:.1e}"
        lines.append(f"  {row['implementation']:<28}{time_text(row['median_s']):>10}{spread(row) or 0:>9.0%}"
                     f"{row['ratio']:>9.2f}{bytes_text(row['peak_extra_bytes']):>12}{error:>11}"
                     + ("  unstable" if unstable(row) else ""))
    return "\n".join(lines)


def of_errors(title: str, rows: list[dict[str, Any]]) -> str:
    lines = ["", f"error against float64: {title}",
             f"  {'':<28}{'quantity':>13}{'median':>10}{'99.9 %':>10}{'largest':>10}{'not finite':>12}"]
    for row in sorted(rows, key=lambda row: row["quantity"]):
        numbers = (row["quantiles"]["0.5"], row["quantiles"]["0.999"], row["max"])
        shown = "".join(f"{'-' if n is None else format(n, '.1e'):>10}" for n in numbers)
        lines.append(f"  {row['implementation']:<28}{row['quantity']:>13}{shown}{row['nonfinite']:>12}")
    return "\n".join(lines)


def of_left_out(entries: list[dict[str, str]]) -> str:
    lines = ["", "left out:"]
    lines += [f"  {entry['what']}: {entry['why']}" for entry in entries]
    return "\n".join(lines) if entries else "\nnothing was left out"
