"""How numbers of a result file are written: in tables, on axes and in text alternatives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

NO_BREAK, UNPRINTABLE = "\N{NO-BREAK SPACE}", "\N{REPLACEMENT CHARACTER}"
UNITS_OF_TIME = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
UNITS_OF_MEMORY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
UNITS_OF_RATE = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def real(value: Any) -> float | None:
    """A finite number as a float; None for anything else, such as null, NaN or text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def positive(value: Any) -> float | None:
    """A finite number above 0, else None."""
    found = real(value)
    return found if found is not None and found > 0 else None


def printable(text: Any) -> str:
    """A text without control characters and lone surrogates, which neither XML nor UTF-8 can hold."""
    return "".join(letter if letter.isprintable() or letter == NO_BREAK else UNPRINTABLE for letter in str(text))


def digits(value: float, count: int = 3) -> str:
    """`count` significant digits without an exponent: 1,234 and 12.3 and 0.123."""
    if value == 0:
        return "0"
    places = count - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    return f"{rounded:,.{max(0, count - 1 - math.floor(math.log10(abs(rounded))))}f}"


def scaled(value: Any, units: tuple[tuple[float, str], ...], count: int = 3) -> str:
    found = real(value)
    if found is None:
        return ""
    # The unit is chosen for the rounded number, so that 999.9 ms is written as 1.00 s.
    size, unit = next(((size, unit) for size, unit in units if abs(found) >= 0.9995 * size), units[-1])
    return f"{digits(found / size, count)} {unit}".strip()


def seconds(value: Any, count: int = 3) -> str:
    return scaled(value, UNITS_OF_TIME, count)


def memory(value: Any, count: int = 3) -> str:
    return scaled(value, UNITS_OF_MEMORY, count)


def rate(value: Any, unit: str) -> str:
    """12.3 GB/s for 12.3e9 and "B/s"."""
    text = scaled(value, UNITS_OF_RATE)
    if not text:
        return ""
    number, _, prefix = text.partition(" ")
    return f"{number} {prefix}{unit}"


def times(value: Any) -> str:
    """A ratio with two significant digits: 2.6x."""
    found = real(value)
    return "" if found is None else f"{digits(found, 2)}x"


def error(value: Any) -> str:
    found = real(value)
    return "" if found is None else "0" if found == 0 else f"{found:.1e}"


def percent(value: Any) -> str:
    found = real(value)
    return "" if found is None else f"{digits(100 * found)} %"


def tick(text: str) -> str:
    """A label of an axis: 64 MiB for 64.0 MiB."""
    return re.sub(r"(\.\d*?)0+(?= |$)", r"\1", text).replace(". ", " ").removesuffix(".")


def whole(value: Any) -> str:
    """A size such as V = 32,768."""
    found = real(value)
    return printable(value) if found is None else f"{found:,.0f}" if found == int(found) else f"{found:g}"


def shape(sizes: Any) -> str:
    """N 2,048, V 32,768, H 1,024."""
    if not isinstance(sizes, dict):
        return "" if sizes is None else printable(sizes)
    return ", ".join(f"{printable(name)} {whole(size)}" for name, size in sizes.items())


def passes(name: Any) -> str:
    return printable(name or "").replace("+", " + ")


def listed(parts: Iterable[str], separator: str = ", ") -> str:
    """The parts that are not empty."""
    return separator.join(part for part in parts if part)


Writer = Callable[[Any], str]
