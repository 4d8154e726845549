"""Plain data as text: values come back as they were, and nothing else comes back at all."""

import math
import random
from collections import Counter, OrderedDict, defaultdict, namedtuple

import pytest

from r1kernels.rewards import plain

PLAIN = [
    None, True, False, 0, -1, 2**62, 2**63, -(10**400), 0.1, -0.0, math.inf, 1j, "", "a\n\x00\ud800\u20ac", b"\x00\xff",
    [], [[1], (2, 3)], (), {1, 2}, frozenset({(1, "a")}), {}, {1: [2], "b": {None: ()}, (1,): {True: 1.5}},
]  # fmt: skip


def test_plain_data_keeps_its_value_and_types():
    found = plain.read(plain.write(PLAIN))
    assert found == PLAIN
    assert repr(found) == repr(PLAIN)
    assert plain.read(plain.write(-(10**5000))) == -(10**5000)


def test_subclasses_become_plain_and_other_objects_are_refused():
    for value in (Counter("aab"), OrderedDict(a=1), defaultdict(int, a=1)):
        found = plain.read(plain.write(value))
        assert type(found) is dict and found == value
    assert type(plain.read(plain.write(namedtuple("Pair", "a b")(1, 2)))) is tuple
    assert plain.read(plain.write(range(3))) == range(3)
    assert list(plain.read(plain.write(x for x in "ab"))) == ["a", "b"]
    for value in (object(), print, Exception, [object()]):
        with pytest.raises(TypeError, match="is not plain data"):
            plain.write(value)


def nested(depth):
    return b'{"list":[' * depth + b"]}" * depth


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"[1]", b"{}", b'{"list":[1],"tuple":[2]}', b'{"object":[]}', b'{"list":1}', b'{"list":"ab"}',
        b'{"set":[{"list":[]}]}', b'{"dict":[1]}', b'{"dict":[[1,2,3]]}', b'{"int":5}', b'{"int":"x"}',
        b'{"bytes":"g"}', b'{"complex":[1,2]}', b'{"complex":["1","2"]}', b"1" * 30, b"\xff", b"1 2", b"nul",
        nested(52), nested(100_000), b"[" * 1_000_000,
        b'{"set":[' + b",".join(b"%d" % i for i in range(10_001)) + b"]}",
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_anything_else_is_no_plain_data(text):
    with pytest.raises(ValueError):
        plain.read(text)


def test_noise_is_refused_as_well():
    draw = random.Random(0)
    valid = plain.write([PLAIN[3:5], {"a": (1.5, {2, 3})}])
    for _ in range(3000):
        text = bytearray(valid)
        for _ in range(draw.randint(1, 4)):
            text[draw.randrange(len(text))] = draw.randrange(256)
        try:
            plain.read(bytes(text))
        except ValueError:
            continue


@pytest.mark.parametrize(
    "text",
    [
        '{"range": [1, 2]}', '{"range": [1, 2, 0]}', '{"range": [1, 2, true]}', '{"range": [{"list": []}, 2, 1]}',
        '{"iterator": [1, true]}', '{"iterator": [[1], 1]}', '{"iterator": [[[]], true]}', '{"iterator": []}',
        '{"keys": [{"list": []}]}', '{"items": [1]}', '{"keys": 1}', '{"range": 1}', '{"values": {"list": []}}',
    ],
)  # fmt: skip
def test_what_nobody_writes_is_not_read(text):
    with pytest.raises(ValueError):
        plain.read(text.encode())


def test_views_and_ranges_are_read_as_they_were():
    for value in (range(3, -9, -2), range(2**70), {1: 2}.keys(), {1: [2]}.items(), [range(0)]):
        assert plain.read(plain.write(value)) == value
    assert list(plain.read(plain.write({1: {2}, 3: 4}.values()))) == [{2}, 4]
    assert list(plain.read(plain.write(map(str, range(plain.MAX_ITEMS))))) == [*map(str, range(plain.MAX_ITEMS))]
    endless = plain.read(plain.write(iter(int, 1)))
    assert [next(endless) for _ in range(plain.MAX_ITEMS)] == [0] * plain.MAX_ITEMS
    with pytest.raises(ValueError, match="only the first 1000 items"):
        next(endless)
    with pytest.raises(ValueError, match="more than 10000 keys"):
        plain.read(plain.write(dict.fromkeys(range(20_000)).keys()))


def test_an_answer_has_one_of_three_forms():
    for good in (("value", 1), ("value", None, (1,), {}), ("raise", ["KeyError"], "x")):
        assert plain.read_answer(plain.write(good)) == good
    values = ("value",), ("value", 1, 2), ("value", 1, (), {}), ("value", None, [], {}), ["value", 1], "value", None
    errors = ("raise", "KeyError", ""), ("raise", [1], ""), ("raise", [[]], ""), ("raise", [], 1), ["raise", [], ""]
    for bad in (*values, *errors, ("pass", 1), (1, 2), ((), 1)):
        with pytest.raises(ValueError):
            plain.read_answer(plain.write(bad))
