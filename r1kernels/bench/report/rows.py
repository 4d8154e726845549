"""Reads a result file of `r1kernels bench`: the rows that a picture or a table needs. Sections may be missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from r1kernels.bench.report.marks import CEILING, OURS, order
from r1kernels.bench.report.words import positive, real

FORMAT = 1
Row = dict[str, Any]


def check(results: Any) -> None:
    """Raises ValueError unless `results` is a document of the format that this version reads."""
    if not isinstance(results, dict):
        raise ValueError(f"results is {type(results).__name__}; expected the JSON object that r1kernels bench writes")
    if results.get("format") != FORMAT:
        raise ValueError(f"format is {results.get('format')!r}; this version of r1kernels reads format {FORMAT}")


def rows(results: dict[str, Any]) -> list[Row]:
    """The rows that have a time, those of ceilings too."""
    return [row for row in results.get("rows") or [] if positive(row.get("median_s"))]


def measured(results: dict[str, Any]) -> list[Row]:
    """The rows of implementations, without ceilings."""
    return [row for row in rows(results) if not is_ceiling(row)]


def plain(results: dict[str, Any]) -> list[Row]:
    """The rows of implementations in which every token is active."""
    return [row for row in measured(results) if row.get("series") != "active"]


def name(row: Row) -> str:
    return str(row.get("implementation") or "unknown")


def is_ceiling(row: Row) -> bool:
    return name(row).startswith(CEILING)


def size(row: Row, letter: str) -> float | None:
    """N, V or H of a row, None where it has none."""
    sizes = row.get("shape")
    return positive(sizes.get(letter)) if isinstance(sizes, dict) else None


def key(row: Row, *fields: str) -> tuple[str, ...]:
    return tuple(str(row.get(field) or "") for field in fields)


def grouped(found: Iterable[Row], by: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in the order in which the keys come."""
    groups: dict[Any, list[Row]] = {}
    for row in found:
        groups.setdefault(by(row), []).append(row)
    return groups


def operations(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(str(row.get("op")) for row in rows(results) if row.get("op")))


def bound(results: dict[str, Any], row: Row) -> float | None:
    """The seconds that a row takes at the measured ceilings: its bytes at the speed of a copy, or its products at the
    speed of bare products, whichever takes longer. None if neither is known."""
    ceilings = results.get("ceilings") or {}
    copy = positive(ceilings.get("copy_bytes_per_s"))
    products = positive((ceilings.get("gemm_flops_per_s") or {}).get(row.get("dtype")))
    moved, flops = positive(row.get("bytes_moved")), positive(row.get("flops"))
    parts = [part / speed for part, speed in ((moved, copy), (flops, products)) if part and speed]
    return None if not parts or (flops and not products) else max(parts)


def family(row: Row) -> str:
    """What an operation starts from: "hidden" (matrix products), "logits", or "tokens" (no vocabulary axis)."""
    return "hidden" if size(row, "H") or positive(row.get("flops")) else "logits" if size(row, "V") else "tokens"


def largest(found: list[Row]) -> list[Row]:
    """The rows of the largest shape that r1kernels was measured at; of any implementation if r1kernels is not there."""
    ours = [row for row in found if name(row) == OURS] or found
    best = max(ours, key=lambda row: (size(row, "N") or 0) * (size(row, "V") or 1), default=None)
    return [row for row in found if best is not None and row.get("shape") == best.get("shape")]


def fidelity(results: dict[str, Any]) -> dict[str, list[Row]]:
    """Entries of the comparison with float64 by quantity; those without any number are left out.

    A quantity that was measured from logits and from hidden states makes two groups. In a group, the implementations of
    a dtype come together.
    """
    entries = [entry for entry in results.get("fidelity") or [] if quantiles(entry) or entry.get("nonfinite")]
    from_logits = {str(entry.get("quantity")) for entry in entries if not size(entry, "H")}

    def label(entry: Row) -> str:
        quantity = str(entry.get("quantity"))
        return f"{quantity} from hidden states" if size(entry, "H") and quantity in from_logits else quantity

    dtypes = list(dict.fromkeys(str(entry.get("dtype")) for entry in entries))
    entries.sort(key=lambda entry: (dtypes.index(str(entry.get("dtype"))), order(name(entry))))
    return grouped(sorted(entries, key=lambda entry: bool(size(entry, "H"))), label)


def quantiles(entry: Row) -> dict[str, float]:
    """Its quantiles and, under "1", the largest error, in increasing order; without what is not a number."""
    found = {**(entry.get("quantiles") or {}), "1": entry.get("max")}
    values = {key: real(value) for key, value in found.items() if _share(key) is not None}
    return {key: values[key] for key in sorted(values, key=float) if values[key] is not None}


def _share(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
