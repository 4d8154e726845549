"""Plain Python values as text: how arguments and results pass between a problem's tests and a program.

Both ends are in sandboxes. Whatever the text is, `read` makes only values of Python's own types, so `==` and arithmetic
on them are Python's own: an object that equals everything cannot be sent. JSON's types are written as they are, any
other value as an object with one key, its type. An iterator is written as its first items; reading past them raises.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator

MAX_ITEMS = 1_000  # of an iterator


def _iterator(items: list) -> Iterator:
    yield from items[:MAX_ITEMS]
    if len(items) > MAX_ITEMS:
        raise SystemExit(f"only the first {MAX_ITEMS} items of an iterator are known")  # no test expects this one


TYPES = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "bytes": bytes.fromhex,
         "range": lambda ends: range(*ends), "iterator": _iterator}  # fmt: skip


def write(value: object) -> bytes:
    """Writes a value of plain types, or of their subclasses; raises TypeError for any other."""
    return json.dumps(_packed(value)).encode()


def _packed(value):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {"dict": [[_packed(key), _packed(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [_packed(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [_packed(item) for item in value]}
    if isinstance(value, Iterable):
        return {"iterator": [_packed(item) for item in itertools.islice(value, MAX_ITEMS + 1)]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def read(text: bytes) -> object:
    """Reads what `write` wrote. Any other text gives other plain values or raises some exception."""
    return json.loads(text, object_hook=lambda packed: [TYPES[name](parts) for name, parts in packed.items()][0])
