"""Tables of a result file: as cells for the page, and as Markdown for the README and the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from r1kernels.bench.report import words
from r1kernels.bench.report.marks import OURS, order
from r1kernels.bench.report.rows import (
    Row,
    fidelity,
    grouped,
    is_ceiling,
    key,
    largest,
    name,
    operations,
    quantiles,
    rows,
)
from r1kernels.bench.table import spread, unstable

SERIES = {"vocabulary": "series over V", "tokens": "series over N", "active": "series over active tokens"}
BARS = {"|": "\\|", "<": "&lt;", ">": "&gt;"}  # what would end a cell, or be read as HTML


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are escaped."""
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(''.join(BARS.get(letter, letter) for letter in words.printable(c)) for c in cells)} |"

    return "\n".join([row(head), f"|{'---|' * len(head)}", *map(row, lines)])


def table(results: dict[str, Any], op: str, **where: str) -> str:
    """A Markdown table of one operation: a row for each implementation, a column for each shape.

    A cell has the median time, the ratio to r1kernels in the same rounds, and peak extra memory. `where` selects rows
    by their fields, for example `series="vocabulary"`. Raises ValueError if no row is left.
    """
    found = [row for row in rows(results) if row.get("op") == op
             and all(str(row.get(field) or "") == value for field, value in where.items())]
    if not found:
        raise ValueError(f"op is {op!r} with {where}: no such row; the file has {', '.join(operations(results))}")
    shapes = {words.shape(row.get("shape")): sizes(row) for row in found}
    first = next(iter(shapes.values()))
    common = {size: value for size, value in first.items()
              if len(shapes) > 1 and all(shape.get(size) == value for shape in shapes.values())}
    heads = [words.shape({size: value for size, value in shape.items() if size not in common})
             for shape in shapes.values()]
    vary = [field for field in ("pass", "dtype", "variant") if len({str(row.get(field) or "") for row in found}) > 1]

    def label(row: Row) -> str:
        extra = [words.passes(row.get(field)) if field == "pass" else words.printable(row.get(field) or "")
                 for field in vary]
        return words.listed([name(row), *extra])

    cells: dict[str, dict[str, str]] = {}
    for row in sorted(found, key=lambda row: (key(row, "variant", "pass", "dtype"), order(name(row)))):
        cells.setdefault(label(row), {}).setdefault(words.shape(row.get("shape")), cell(row))
    lines = [[text, *(line.get(shape, "") for shape in shapes)] for text, line in cells.items()]
    return markdown([words.listed([op, words.shape(common)]), *heads], lines)


def sizes(row: Row) -> dict[str, Any]:
    shape = row.get("shape")
    return shape if isinstance(shape, dict) else {}


def cell(row: Row) -> str:
    ratio = "" if name(row) == OURS and words.real(row.get("ratio")) in (None, 1.0) else words.times(row.get("ratio"))
    parts = [words.seconds(row.get("median_s")), ratio, words.memory(row.get("peak_extra_bytes"))]
    # A narrow table breaks a cell between its parts, not between a number and its unit.
    return words.listed(part.replace(" ", words.NO_BREAK) for part in parts)


def fidelity_table(results: dict[str, Any], dtype: str = "bfloat16") -> str:
    """A Markdown table of errors against float64: a row for each quantity, a column for each library.

    A cell has the median and the largest error. A quantity without entries of `dtype` shows those of its first dtype,
    which its row names. Raises ValueError if the file has no such entries.
    """
    cells: dict[str, dict[str, str]] = {}
    for quantity, entries in fidelity(results).items():
        dtypes = [str(entry.get("dtype")) for entry in entries]
        shown = dtype if dtype in dtypes else dtypes[0]
        label = quantity if shown == dtype else f"{quantity} ({shown})"
        for entry in (entry for entry, kind in zip(entries, dtypes, strict=True) if kind == shown):
            found = quantiles(entry)
            bad = f"{words.whole(entry['nonfinite'])} not finite" if entry.get("nonfinite") else ""
            text = words.listed([words.error(found.get("0.5")), words.error(found.get("1")), bad])
            cells.setdefault(label, {})[name(entry)] = text
    if not cells:
        raise ValueError("fidelity is empty; expected entries of the comparison with float64")
    names = sorted({implementation for line in cells.values() for implementation in line}, key=order)
    lines = [[label, *(line.get(column, "") for column in names)] for label, line in cells.items()]
    return markdown([dtype, *names], lines)


FIDELITY = ("implementation", "dtype", "shape", "median", "99 %", "largest", "not finite")


def fidelity_cells(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of cells by quantity; the first cell is the quantity."""
    groups = []
    for quantity, entries in fidelity(results).items():
        lines = []
        for entry in entries:
            found = quantiles(entry)
            lines.append([quantity, name(entry), str(entry.get("dtype") or ""), words.shape(entry.get("shape")),
                          *(words.error(found.get(share)) for share in ("0.5", "0.99", "1")),
                          words.whole(entry.get("nonfinite") or 0)])
        groups.append({"quantity": quantity, "rows": lines})
    return groups


def operation_cells(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each operation: a line that sums it up, and its cases, each with a row of cells for each implementation."""
    groups = []
    for op in operations(results):
        found = [row for row in rows(results) if row.get("op") == op]
        # The same shape may be measured in several series: those are different rounds.
        by_case = grouped(found, lambda row: (
            words.shape(row.get("shape")), *key(row, "pass", "dtype", "variant", "series")))
        cases = []
        for (shape, passed, dtype, variant, series), group in by_case.items():
            lines = [[name(row), words.seconds(row.get("median_s")), spread_cell(row), words.times(row.get("ratio")),
                      words.memory(row.get("peak_extra_bytes")),
                      "" if is_ceiling(row) else words.error(row.get("max_error"))]
                     for row in sorted(group, key=lambda row: order(name(row)))]
            title = words.listed([shape, dtype, words.passes(passed), words.printable(variant), SERIES.get(series, "")])
            cases.append({"title": title, "rows": lines})
        groups.append({"op": op, "summary": summary(found), "cases": cases})
    return groups


def spread_cell(row: Row) -> str:
    """The interquartile range in percent of the median; "unstable" where the time is uncertain."""
    share = spread(row)
    text = "" if share is None else f"{100 * share:.0f} %"
    return words.listed([text, "unstable" if unstable(row) else ""])


def summary(found: list[Row]) -> str:
    """The times of one case of an operation: that of the largest shape, without a variant if there is one."""
    cases = list(grouped(largest(found), lambda row: key(row, "variant", "pass", "dtype")).values())
    case = max(cases, key=lambda group: (group[0].get("variant") in ("", None), len(group)), default=[])
    parts = [f"{name(row)} {words.seconds(row['median_s'])}" if name(row) == OURS or not words.real(row.get("ratio"))
             else f"{name(row)} {words.times(row['ratio'])}"
             for row in sorted(case, key=lambda row: order(name(row))) if not is_ceiling(row)]
    return words.listed(parts)


def source(results: dict[str, Any], file: str) -> str:
    """Where numbers come from: the file, the device, versions, the date and the hash of the sources."""
    kernels = results.get("sources") or results.get("csrc_tree") or results.get("cuda_sources")
    device = words.listed([words.printable(results.get("device") or ""), results.get("instruction_set") or ""])
    versions = words.listed(f"{package} {results[package]}" for package in ("torch", "r1kernels", "triton", "nvcc")
                            if results.get(package))
    parts = [device, versions, results.get("date") or "", f"sources {kernels}" if kernels else ""]
    return f"Source: `{file}` ({words.listed(map(str, parts), '; ')})."
