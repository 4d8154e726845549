"""Plain data as text: how arguments enter the sandbox and results leave it.

Both sides use this file; the sandboxed one gets its text. What leaves the sandbox may be anything, so `read` trusts
nothing: it builds values of exactly Python's own types, whose equality and arithmetic are Python's own. An object
that is equal to everything cannot be written down.

An iterator is written as its items, and read as a generator of them: it is equal to no list here either. One that has
more than MAX_ITEMS may well have no end: who asks for more of them gets a ValueError.
"""

import json

MAX_DEPTH = 50  # of containers
MAX_ITEMS = 1_000  # of an iterator
MAX_KEYS = 10_000  # in all sets and dicts together: as many of one hash take seconds to compare with each other
SMALL = 2**63
_END = object()

SEQUENCES = {"list": list, "tuple": tuple}
SETS = {"set": set, "frozenset": frozenset}
VIEWS = {"keys": type({}.keys()), "values": type({}.values()), "items": type({}.items())}


def write(value: object) -> bytes:
    """A value of plain types, or of their subclasses, as JSON.

    Iterators are read up to MAX_ITEMS, and one item further.

    Raises:
        TypeError: another type. ValueError: containers nested far too deeply.
    """
    return json.dumps(_packed(value, 2 * MAX_DEPTH)).encode()


def _packed(value, depth):
    """JSON's scalars stand for themselves; anything else is an object of one key, its type."""
    if depth < 0:
        raise ValueError(f"containers nested deeper than {2 * MAX_DEPTH}")
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
    if isinstance(value, range):
        return {"range": [_packed(part, depth - 1) for part in (value.start, value.stop, value.step)]}
    if hasattr(type(value), "__next__"):
        # zip stops before it takes one too many
        items = [_packed(item, depth - 1) for _, item in zip(range(MAX_ITEMS), value, strict=False)]
        return {"iterator": [items, len(items) < MAX_ITEMS or next(value, _END) is _END]}
    for name, kind in (SEQUENCES | SETS | VIEWS).items():
        if isinstance(value, kind):
            return {name: [_packed(item, depth - 1) for item in value]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def read(text: bytes, trusted: bool = False) -> object:
    """The value that `write` wrote.

    Raises:
        ValueError: anything else, or, from a writer who is not trusted, more than the limits above.
    """
    try:
        packed = json.loads(text, parse_int=_small_int)
        return _Reader(trusted).value(packed, 2 * MAX_DEPTH if trusted else MAX_DEPTH)
    except (TypeError, KeyError, RecursionError, UnicodeError) as error:
        raise ValueError(f"not plain data: {type(error).__name__}") from None


def _small_int(digits):
    if len(digits) > 20:
        raise ValueError("a long int must be written in hexadecimal")
    return int(digits)


class _Reader:
    def __init__(self, trusted):
        self.keys_left = float("inf") if trusted else MAX_KEYS

    def value(self, packed, depth):
        if packed is None or type(packed) in (bool, int, float, str):
            return packed
        if type(packed) is not dict or len(packed) != 1 or depth < 0:
            raise ValueError("expected an object of one key, nested less deeply")
        [(name, inner)] = packed.items()
        if name in ("int", "bytes"):
            return int(_of(str, inner), 16) if name == "int" else bytes.fromhex(_of(str, inner))
        if name == "complex":
            real, imaginary = _of(list, inner)
            return complex(_of(float, real), _of(float, imaginary))
        if name == "range":
            start, stop, step = (_of(int, self.value(part, depth - 1)) for part in _of(list, inner))
            return range(start, stop, step)
        if name == "iterator":
            items, ended = _of(list, inner)
            return _each([self.value(item, depth - 1) for item in _of(list, items)], _of(bool, ended))
        if name in SEQUENCES:
            return SEQUENCES[name]([self.value(item, depth - 1) for item in _of(list, inner)])
        self.keys_left -= len(_of(list, inner))
        if self.keys_left < 0:
            raise ValueError(f"more than {MAX_KEYS} keys")
        if name == "dict":
            return {self.value(key, depth - 1): self.value(item, depth - 1) for key, item in inner}
        items = [self.value(item, depth - 1) for item in inner]
        if name in VIEWS:
            whole = {"keys": dict.fromkeys, "values": lambda found: dict(enumerate(found)), "items": dict}[name](items)
            return getattr(whole, name)()
        return SETS[name](items)


def _each(items, ended):
    yield from items
    if not ended:
        raise ValueError(f"only the first {MAX_ITEMS} items of an iterator are known here")


def _of(kind, value):
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}")
    return value
