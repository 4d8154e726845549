"""Recipes, overrides, data files and answers of any content: they load, or the documented error names the place.

Recipes are the shipped ones with random edits; everything is bounded, so that no example needs long or much memory.
"""

import gzip
import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from backends import host_code
from hypothesis import example, given
from hypothesis import strategies as st

from r1kernels.rewards import accuracy, format, language
from r1kernels.rewards.code import read_tests
from r1kernels.rewards.math import check_reference
from r1kernels.rewards.text import final_answer
from r1kernels.train.data import read_jsonl
from r1kernels.train.errors import ConfigError, DataError
from r1kernels.train.recipe_file import build_recipe, dump_recipe, load_recipe, read_yaml

pytestmark = host_code
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))}
VALUES = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
NAMES = st.sampled_from(list(TEXTS))

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from([10**400, -(2**63), 2**64, 1e308, "", "nan", "cpu", "\0", "\ud800", "../x", "a.b", "{question}"]),
)
TREES = st.recursive(
    SCALARS, lambda part: st.one_of(
        st.lists(part, max_size=3), st.dictionaries(st.one_of(st.text(max_size=8), st.integers(), st.none()), part,
                                                    max_size=3)), max_leaves=6)
# Pieces of YAML that its readers have trouble with.
PIECES = st.sampled_from([
    "&a [*a]", "*a", "&a {x: *a}", "<<: *a", "!!bool x", "!!timestamp x", "!!int x", "!!binary zzz", "!!set {a, b}",
    "!!python/object/apply:os.getcwd []", "? [1, 2]\n: 3", "2001-99-99", "0b", "1:2:3", "9" * 5000, ".nan", "-.inf",
    "\t", "\x07", "\0", "---", "...", "%YAML 9.9", "[" * 60, "{a: " * 60, "'", '"\\ud800"', "|\n", "\ufeff", "- ",
])

WHERE_IN_YAML = r"(line|position) \d+|nested too deeply"


@pytest.fixture(autouse=True)
def search_path() -> Any:
    """A recipe's `import_from` changes it."""
    before = sys.path[:]
    yield
    sys.path[:] = before


def places(tree: Any) -> list[tuple[Any, ...]]:
    """The paths of all parts of a tree."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(), *((key, *rest) for key, child in children for rest in places(child))]


def edited(tree: Any, path: tuple[Any, ...], change: str, value: Any) -> Any:
    """A copy in which the part at a path is replaced, left out, or has a sibling."""
    if not path:
        return value
    key, *rest = path
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        copy[key] = edited(tree[key], tuple(rest), change, value)
    elif change == "drop":
        del copy[key]
    elif change == "add" and isinstance(copy, dict):
        copy["more"] = value
    else:
        copy[key] = value
    return copy


def names_at(tree: Any, path: tuple[Any, ...]) -> set[str]:
    """The key at a path, and the keys of what was there: others may refer to them."""
    found = {str(key) for key in path if isinstance(key, str)} if len(path) < 2 else {
        next(str(key) for key in reversed(path) if isinstance(key, str))}
    for key in path:
        if not isinstance(tree, (dict, list)) or (isinstance(tree, dict) and key not in tree):
            return found
        tree = tree[key]
    return found | {key for below in places(tree) for key in below if isinstance(key, str)}


def has_name(message: str, names: set[str]) -> bool:
    patterns = (name if name == WHERE_IN_YAML else re.escape(name) for name in names)
    return any(re.search(rf"(?<!\w)({pattern})(?!\w)", message) for pattern in patterns)


def loads_or_names(names: set[str], load: Any, *arguments: Any) -> None:
    """The documented error is a short message with one of the names; another exception fails the test."""
    try:
        recipe = load(*arguments)
    except ConfigError as error:
        assert 10 < len(str(error)) < 2000, str(error)[:2000]
        assert has_name(str(error), names), (str(error), sorted(names))
    else:
        dump_recipe(recipe)


@given(name=NAMES, data=st.data(), change=st.sampled_from(["replace", "drop", "add"]), value=TREES)
def test_a_recipe_with_a_part_replaced(name: str, data: st.DataObject, change: str, value: Any) -> None:
    values, names = VALUES[name], {"more"} if change == "add" else set()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(values)))
        names |= names_at(values, path) | ({"the recipe"} if path == () else set())
        values = edited(values, path, change, value)
    loads_or_names(names, build_recipe, values, RECIPES)


@given(name=NAMES, data=st.data(), piece=st.one_of(PIECES, st.text(string.printable, max_size=20)))
def test_a_recipe_with_text_in_a_line(name: str, data: st.DataObject, piece: str) -> None:
    """The errors of YAML have a line or a position, others a key of this line or of one after it."""
    lines = TEXTS[name].splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    head, colon, _ = lines[number].partition(": ")
    names = set(re.findall(r"[\w.]+(?=:)", "\n".join(lines[number:]))) | {"the recipe", WHERE_IN_YAML}
    lines[number] = data.draw(st.sampled_from([f"{head}{colon}{piece}", piece, f"{lines[number]}\n{piece}"]))
    loads_or_names(names, lambda: build_recipe(read_yaml("\n".join(lines)), RECIPES))


@given(text=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))))
@example(b"[" * 1500)
@example(b"- " * 1500)
@example(b"".join(b"a%d: &a%d [%s]\n" % (k, k, b",".join([b"*a%d" % (k - 1) if k else b"x"] * 9)) for k in range(9)))
def test_bytes_that_may_be_yaml(text: bytes) -> None:
    loads_or_names({"the recipe", "run_dir", "a0", WHERE_IN_YAML}, lambda: build_recipe(read_yaml(text)))


@given(key=st.one_of(st.sampled_from(["seed", "stages", "data", "eval.samples", "stages.r1_zero.steps", "import_from",
                                      "stages.new", "data.x.y.z", "run_dir", "device", "sampler.kind"]),
                     st.text(max_size=12)),
       value=st.one_of(PIECES, TREES.map(repr), st.text(max_size=12)))
def test_overrides(key: str, value: str) -> None:
    for override in (f"{key}={value}", f"{key}{value}"):
        path = override.partition("=")[0].split(".")
        names = {*path, *names_at(VALUES["demo.yaml"], tuple(path)), f"--set {override!r:.100}"}
        loads_or_names(names, load_recipe, RECIPES / "demo.yaml", [override])


@given(lines=st.lists(st.one_of(
    TREES.map(lambda tree: json.dumps(tree, default=str).encode()), st.binary(max_size=40),
    st.sampled_from([b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"question": "\\ud800"}', b"{}",
                     b"\xef\xbb\xbf{}", b'{"question": NaN}'])), max_size=4),
       packed=st.sampled_from(["no", "yes", "broken"]))
def test_data_files(lines: list[bytes], packed: str, tmp_path: Path) -> None:
    text = b"\n".join(lines)
    path = tmp_path / ("rows.jsonl" if packed == "no" else "rows.jsonl.gz")
    packed_text = gzip.compress(text)
    path.write_bytes({"no": text, "yes": packed_text, "broken": packed_text[:12] + b"junk" + packed_text[14:]}[packed])
    filled, rows = [number for number, line in enumerate(text.split(b"\n"), 1) if line.strip()], []
    try:
        for row in read_jsonl(path):
            rows.append(row)
    except DataError as error:
        assert path.name in str(error) and len(str(error)) < 2000
        assert packed == "broken" or f"{path.name}, line {filled[len(rows)]}:" in str(error)
    assert all(isinstance(row, dict) for _, row in rows)
    assert [where for where, _ in rows] == [f"{path.name}, line {number}" for number in filled[: len(rows)]]


MARKS = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "####", "\\frac{1}{2}", "^", "1e999", "10^10^10",
    "\\sqrt{", "(", ")", "[", "]", ",", "=", "0/0", "-", "\n", " ", "x", "3", "1/3", "\u202e", "\0", "\ud800", "%", "$",
    "\\text{", "\\pm", "!", "9" * 400, "\u0663", "!!!!", "{" * 200, "-" * 200, "((((",
])
ANSWERS = st.lists(st.one_of(MARKS, st.text(max_size=8)), max_size=14).map("".join)


@given(completion=ANSWERS, reference=ANSWERS, kind=st.sampled_from(["math", "choice", "exact", "open"]))
def test_rewards_judge_any_text(completion: str, reference: str, kind: str) -> None:
    final_answer("", completion)
    for text in (completion, f"<think>\n</think> <answer>{completion}</answer>"):
        (value,) = accuracy([text], answer=[reference], kind=[kind])
        assert value in (0.0, 1.0, None) and (kind != "open" or value is None)
        assert format([text]) in ([0.0], [1.0])
        assert 0 <= language([text])[0] <= 1


@given(reference=st.one_of(ANSWERS, TREES.map(lambda tree: json.dumps(tree, default=str))))
@example("[" * 100_000)
def test_references_are_read_or_refused(reference: str) -> None:
    why = check_reference(reference)
    assert why is None or isinstance(why, str)
    try:
        read_tests(reference)
    except ValueError as error:
        assert str(error)
