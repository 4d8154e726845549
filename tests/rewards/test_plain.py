"""Plain data as text: values come back as they were, and nothing else comes back at all."""

import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest

from r1kernels.rewards.sandbox_child import read, write

PLAIN = [
    None, True, False, 0, -1, 2**62, 2**63, -(10**400), 0.1, -0.0, math.inf, "", "a\n\x00\ud800\u20ac", b"\x00\xff",
    [], [[1], (2, 3)], (), {1, 2}, frozenset({(1, "a")}), {}, {1: [2], "b": {None: ()}, (1,): {True: 1.5}},
    range(3), range(3, -9, -2), range(2**70),
]  # fmt: skip


def test_plain_data_keeps_its_value_and_types():
    found = read(write(PLAIN))
    assert found == PLAIN
    assert repr(found) == repr(PLAIN)
    assert math.isnan(read(write(math.nan)))


def test_subclasses_become_plain_and_other_objects_are_refused():
    for value in (Counter("aab"), OrderedDict(a=1), defaultdict(int, a=1)):
        found = read(write(value))
        assert type(found) is dict and found == value
    assert type(read(write(namedtuple("Pair", "a b")(1, 2)))) is tuple
    for value in (object(), print, Exception, [object()], 1j):
        with pytest.raises(TypeError, match="is not plain data"):
            write(value)


def test_iterables_are_read_as_iterators():
    for value in ((x for x in "ab"), deque("ab"), {"a": 1, "b": 2}.keys()):
        found = read(write(value))
        assert next(found) == "a" and list(found) == ["b"]
    assert list(read(write({1: {2}, 3: 4}.items()))) == [(1, {2}), (3, 4)]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{}", b'{"object": []}', b'{"dict": [1]}', b'{"dict": [[1,2,3]]}', b'{"set": [[]]}', b'{"bytes": "g"}',
        b'{"bytes": 1}', b'{"range": [1, 2, 0]}', b'{"range": ["1"]}', b'{"tuple": 1}', b"\xff", b"1 2", b"nul",
        b"[" * 1_000_000, b'{"tuple": [' * 100_000,
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_other_text_is_an_error(text):
    with pytest.raises((ValueError, TypeError, LookupError, RecursionError)):
        read(text)


def test_noise_gives_plain_values_or_an_error():
    draw = random.Random(0)
    valid = write([PLAIN[3:5], {"a": (1.5, {2, 3})}, range(3), iter("ab")])
    kinds = (type(None), bool, int, float, str, bytes, list, tuple, set, frozenset, dict, range, type(iter([])))

    def check(value):
        assert type(value) in kinds
        for item in value if isinstance(value, list | tuple | set | frozenset | dict) else ():
            check(item)

    for _ in range(2000):
        text = bytearray(valid)
        for _ in range(draw.randint(1, 4)):
            text[draw.randrange(len(text))] = draw.randrange(256)
        try:
            value = read(bytes(text))
        except (ValueError, TypeError, LookupError):
            continue
        check(value)
