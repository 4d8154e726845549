"""Writes plain Python values as text and reads them back: how arguments enter the sandbox and results leave it.

What leaves the sandbox may be anything, so `read` trusts nothing: it builds values of Python's own types only, so `==`
and arithmetic are Python's own. An object that equals everything cannot be written. An iterator is written as its items
and read as a generator; one with more than MAX_ITEMS may be endless, so reading past them raises ValueError.
"""

from __future__ import annotations

import json

MAX_DEPTH = 50  # of nested containers
MAX_ITEMS = 1_000  # of an iterator
MAX_KEYS = 10_000  # in all sets and dicts together: comparing so many keys of one hash takes seconds
SMALL = 2**63
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
VIEWS = {"keys": type({}.keys()), "values": type({}.values()), "items": type({}.items())}
_END = object()


def write(value: object) -> bytes:
    """Writes a value of plain types, or of their subclasses, as JSON.

    Raises:
        TypeError: the value has another type.
        ValueError: its containers are nested too deeply.
    """
    return json.dumps(_packed(value, 2 * MAX_DEPTH)).encode()


def _packed(value, depth):
    """JSON's scalars are written as they are; any other value is an object with one key, its type."""
    if depth < 0:
        raise ValueError(f"containers are nested deeper than {2 * MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -SMALL < value < SMALL else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [_packed(part, depth - 1) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, depth - 1), _packed(item, depth - 1)] for key, item in value.items()]}
    if hasattr(type(value), "__next__"):
        # zip stops before it takes one item too many
        items = [_packed(item, depth - 1) for _, item in zip(range(MAX_ITEMS), value, strict=False)]
        return {"iterator": [items, len(items) < MAX_ITEMS or next(value, _END) is _END]}
    for name, kind in (CONTAINERS | VIEWS).items():
        if isinstance(value, kind):
            return {name: [_packed(item, depth - 1) for item in value]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def read(text: bytes, trusted: bool = False) -> object:
    """Reads what `write` wrote.

    Raises:
        ValueError: the text is anything else or, unless the writer is trusted, exceeds the limits above.
    """
    keys_left = float("inf") if trusted else MAX_KEYS

    def value(packed, depth):
        nonlocal keys_left
        if packed is None or type(packed) in (bool, int, float, str):
            return packed
        if type(packed) is not dict or len(packed) != 1 or depth < 0:
            raise ValueError("expected an object with one key, nested less deeply")
        [(name, parts)] = packed.items()
        if name in ("int", "bytes"):
            return int(_of(str, parts), 16) if name == "int" else bytes.fromhex(_of(str, parts))
        parts = _of(list, parts)
        if name == "complex":
            return complex(*(_of(float, part) for part in parts))
        if name == "iterator":
            items, ended = parts
            return _generator([value(item, depth - 1) for item in _of(list, items)], _of(bool, ended))
        if name == "range":
            start, stop, step = (_of(int, value(part, depth - 1)) for part in parts)
            return range(start, stop, step)
        if name not in ("list", "tuple"):
            keys_left -= len(parts)
        if keys_left < 0:
            raise ValueError(f"more than {MAX_KEYS} keys")
        if name == "dict":
            return {value(key, depth - 1): value(item, depth - 1) for key, item in parts}
        items = [value(item, depth - 1) for item in parts]
        if name == "keys":
            return dict.fromkeys(items).keys()
        if name in VIEWS:
            return getattr(dict(enumerate(items) if name == "values" else items), name)()
        return CONTAINERS[name](items)

    try:
        return value(json.loads(text, parse_int=_small), 2 * MAX_DEPTH if trusted else MAX_DEPTH)
    except (TypeError, KeyError, RecursionError, UnicodeError) as error:
        raise ValueError(f"not plain data: {type(error).__name__}") from None


def read_answer(text: bytes) -> tuple:
    """Reads an answer to a call: ("value", result) or ("raise", names of the exception's class and bases, message).

    A function that returned None and changed its arguments answers ("value", None, arguments, keywords).

    Raises:
        ValueError: the text is anything else.
    """
    answer = read(text)
    match answer if type(answer) is tuple else None:
        case ("value", _) | ("value", None, tuple(), dict()):
            return answer
        case ("raise", list(names), str()) if all(type(name) is str for name in names):
            return answer
    raise ValueError("the answer to a call has another form")


def _small(digits):
    if len(digits) > 20:
        raise ValueError("a long int must be written in hexadecimal")
    return int(digits)


def _generator(items, ended):
    yield from items
    if not ended:
        raise ValueError(f"only the first {MAX_ITEMS} items of an iterator are known here")


def _of(kind, value):
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}")
    return value
