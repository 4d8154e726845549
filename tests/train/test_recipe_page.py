"""The table of docs/recipe.md: every value is that of recipes/r1.yaml, and every default that of the settings."""

import re
from pathlib import Path

import pytest

from r1kernels.train import recipe as settings
from r1kernels.train.recipe_file import load_recipe, read_yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\|[^|]*\| `([\w.]+)` \| `([^|]*)` \| `([^|]*)` \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(ROOT / "recipes" / "r1.yaml")


def inside(value, path):
    """A part of a setting; those of an objective are the fields of the preset."""
    for key in path:
        if isinstance(value, settings.ObjectiveSettings):
            value = value.build()
        value = value[int(key)] if isinstance(value, list) else getattr(value, key)
    return value


def default(owner, path):
    """The default of a field, or of a field of one of its parts."""
    key, *rest = path
    info = type(owner).model_fields[key]
    if rest and isinstance(getattr(owner, key), list):  # a list of parts, which is empty by default
        return default(getattr(owner, key)[int(rest[0])], rest[1:])
    return inside(info.get_default(call_default_factory=True), rest)


def test_the_table_has_every_part():
    assert len(ROWS) > 30
    assert {key.partition(".")[0] for key, _, _ in ROWS} >= {
        "template", "r1_zero", "cold_start", "reasoning", "reasoning_samples", "helpfulness", "r1", "distilled", "eval"}


def test_values_and_defaults(recipe):
    found = {}
    for key, _, _ in ROWS:
        first, *rest = path = key.split(".")
        owner, path = (recipe.stages[first], rest) if first in recipe.stages else (recipe, path)
        found[key] = inside(owner, path), default(owner, path)
    assert found == {key: (read_yaml(value), read_yaml(standard)) for key, value, standard in ROWS}
