"""Plain data as text: how arguments enter the sandbox and results leave it.

Both sides use this file; the sandboxed one gets its text. What leaves the sandbox may be anything, so `read` trusts
nothing: it builds values of exactly Python's own types, whose equality and arithmetic are Python's own. An object
that is equal to everything cannot be written down.
"""

import json

MAX_DEPTH = 50  # of containers
MAX_ITEMS = 20_000  # in all containers together: a set of this many values of one hash takes seconds to build
SMALL = 2**63

CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def write(value: object) -> bytes:
    """A value of plain types, or of their subclasses, as JSON.

    Raises:
        TypeError: another type. ValueError: containers nested too deeply.
    """
    return json.dumps(_packed(value, MAX_DEPTH)).encode()


def _packed(value, depth):
    """JSON's scalars stand for themselves; anything else is an object of one key, its type."""
    if depth < 0:
        raise ValueError(f"containers nested deeper than {MAX_DEPTH}")
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
    if isinstance(value, dict):
        return {"dict": [[_packed(key, depth - 1), _packed(item, depth - 1)] for key, item in value.items()]}
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [_packed(item, depth - 1) for item in value]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def read(text: bytes) -> object:
    """The value that `write` wrote.

    Raises:
        ValueError: anything else, or more than the limits above.
    """
    try:
        return _Reader().value(json.loads(text, parse_int=_small_int), MAX_DEPTH)
    except (TypeError, KeyError, RecursionError, UnicodeError) as error:
        raise ValueError(f"not plain data: {type(error).__name__}") from None


def _small_int(digits):
    if len(digits) > 20:
        raise ValueError("a long int must be written in hexadecimal")
    return int(digits)


class _Reader:
    def __init__(self):
        self.items = 0

    def value(self, packed, depth):
        if packed is None or type(packed) in (bool, int, float, str):
            return packed
        if type(packed) is not dict or len(packed) != 1:
            raise ValueError("expected an object of one key")
        [(name, inner)] = packed.items()
        if name in ("int", "bytes"):
            return int(_of(str, inner), 16) if name == "int" else bytes.fromhex(_of(str, inner))
        if name == "complex":
            real, imaginary = _of(list, inner)
            return complex(_of(float, real), _of(float, imaginary))
        self.items += len(_of(list, inner))
        if depth <= 0 or self.items > MAX_ITEMS:
            raise ValueError("too deep or too long")
        if name == "dict":
            return {self.value(key, depth - 1): self.value(item, depth - 1) for key, item in inner}
        return CONTAINERS[name](self.value(item, depth - 1) for item in inner)


def _of(kind, value):
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}")
    return value
