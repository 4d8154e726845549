"""Reading and writing recipes: YAML, `--set` overrides, and errors that name the key, its value and the expectation."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
import yaml
from pydantic import BaseModel

from r1kernels.train.errors import ConfigError
from r1kernels.train.recipe import LEAVES, RESERVED_NAMES, Eval, Evaluate, Recipe, RefersTo

# A file with more values than this, once its aliases are expanded, is refused: it would fill the memory.
MAX_VALUES = 100_000
_KINDS = {"data": "a data set", "model": "a stage with a model", "samples": "a stage of kind reject",
          "scores": "a stage of kind preference"}
# What pydantic's errors mean, by their type; the fields are those of the error's context.
_EXPECTED = {
    "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}", "less_than_equal": "at most {le}",
    "less_than": "less than {lt}", "multiple_of": "a multiple of {multiple_of}", "too_short": "at least one entry",
    "literal_error": "{expected}", "union_tag_invalid": "one of {expected_tags}", "int_type": "an integer",
    "float_type": "a number", "finite_number": "a finite number", "string_type": "a string",
    "bool_type": "true or false", "dict_type": "a mapping", "model_type": "a mapping", "list_type": "a list",
    "model_attributes_type": "a mapping", "string_pattern_mismatch": "text like {pattern}",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, and adds its `import_from` directories to Python's search path.

    Args:
        path: a YAML file whose keys are those of `Recipe`.
        overrides: `"eval.samples=10"`, `"stages.r1.steps=10"`: replaces one key; the value is read as YAML.

    Raises:
        ConfigError: naming the file, the key, its value and what was expected.
    """
    path = Path(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError(f"the file holds {_short(values)}; expected a mapping with the keys of a recipe")
        for override in overrides:
            values = override_key(values, override)
        return build_recipe(values, path.parent)
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_recipe(values: Mapping[str, Any], directory: Path = Path()) -> Recipe:
    """A recipe from plain values; relative paths of `import_from` start at `directory`."""
    folders = values.get("import_from")
    if isinstance(folders, list) and all(isinstance(folder, str) for folder in folders):
        folders = [str((directory / folder).resolve()) for folder in folders]
        values = {**values, "import_from": folders}
        sys.path[:] = [*folders, *(entry for entry in sys.path if entry not in folders)]
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error)) from None
    _check_names(recipe)
    for name, stage in recipe.stages.items():
        asks = (stage.kind == "grpo" and "judge" in stage.rewards) or (stage.kind == "reject" and stage.judge)
        if asks and recipe.scoring.judge is None:
            raise ConfigError(f"stage '{name}' asks a judge; expected 'scoring.judge' with 'url' and 'model'")
        if stage.kind == "grpo":
            try:
                stage.objective.build()
            except ConfigError as error:
                raise ConfigError(f"'stages.{name}.objective': {error}") from None
            shortest = min([stage.max_new_tokens, *(item.max_new_tokens for item in stage.length_schedule)])
            if stage.rewards.get("overlong") and recipe.scoring.overlong_buffer >= shortest:
                raise ConfigError(
                    f"'scoring.overlong_buffer' is {recipe.scoring.overlong_buffer}; expected fewer tokens than a "
                    f"completion of stage '{name}' may have ({shortest})")
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def references(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The data sets and stages that settings name: (key, name, what it may be)."""
    for key, info in type(settings).model_fields.items():
        value = getattr(settings, key)
        kinds = next((item.kinds for item in info.metadata if isinstance(item, RefersTo)), None)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, BaseModel):
                yield from references(part, f"{prefix}{key}.")
            elif kinds and isinstance(part, str):
                yield f"{prefix}{key}", part, kinds


def _check_names(recipe: Recipe) -> None:
    """Every name is used once, and what the settings name exists and is of the right kind."""
    kinds = dict.fromkeys(recipe.data, "data")
    for name, stage in recipe.stages.items():
        if name in kinds:
            raise ConfigError(f"the name '{name}' is used twice; every data set and stage needs a unique name")
        if name in RESERVED_NAMES:
            raise ConfigError(f"stage name '{name}' is reserved")
        kinds[name] = LEAVES[stage.kind]
    named = {"eval": recipe.eval} | {f"stages.{name}": stage for name, stage in recipe.stages.items()}
    for where, settings in named.items():
        for key, name, allowed in references(settings):
            if kinds.get(name) not in allowed:
                known = ", ".join(other for other, kind in kinds.items() if kind in allowed) or "the recipe has none"
                what = " or ".join(_KINDS[kind] for kind in allowed)
                raise ConfigError(f"'{where}.{key}' names {_short(name)}; expected {what} ({known})")
            if isinstance(settings, Eval | Evaluate) and key == "problems" and not recipe.data[name].held_out:
                raise ConfigError(f"'{where}.{key}' names '{name}', which has no held-out problems")
    if not recipe.eval_problems:
        raise ConfigError("no data set has held-out problems ('test_path'); at least one is needed to evaluate stages")
    try:
        torch.device(recipe.device)
    except RuntimeError:
        raise ConfigError(f"'device' is {recipe.device!r}; expected a device such as cpu, cuda or cuda:1") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(error: pydantic.ValidationError) -> str:
    """The first error of pydantic in our words: the dotted key, its value, and the expectation."""
    first = error.errors(include_url=False)[0]
    kind, place, value, context = first["type"], list(first["loc"]) or [""], first["input"], first.get("ctx", {})
    if place[0] in ("data", "stages") and place[2:3] != ["[key]"]:
        del place[2:3]  # pydantic's name of the kind
    if place[-1] == "[key]":
        rule = "at most 64 letters, digits, '_' and '-', the first no sign" if len(place) == 3 else "a string"
        return f"invalid key {_short(place[-2])} in '{_dotted(place[:-2])}'; expected {rule}"
    if kind == "union_tag_not_found":
        kind, place = "missing", [*place, "kind"]
    *parents, last = place
    if kind == "missing":
        return f"missing key '{last}'" + (f" in '{_dotted(parents)}'" if parents else "")
    where = _dotted(place)
    if kind == "unknown_key":
        close = difflib.get_close_matches(context["key"], context["known"], n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(context['known'])}"
        return f"unknown key {_short(context['key'])}" + (f" in '{where}'" if where else "") + f"; {hint}"
    if kind == "value_error" and isinstance(value, dict):
        return f"in '{where}': {context['error']}"
    if kind == "union_tag_invalid":
        where, value = f"{where}.kind", context["tag"]
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else str(context.get("error", first["msg"]))
    return f"'{where}' is {_short(value)}; expected {expected}"


def _dotted(place: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, and reads 1e-3 as a number."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise ConfigError(f"key {_short(key)} is given twice in the mapping of line {node.start_mark.line + 1}")
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number, and repeats values in place of aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ConfigError for anything that is not plain, finite data."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _count(node, {}) > MAX_VALUES:
            raise ConfigError(f"aliases expand to more than {MAX_VALUES} values")
        return None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from None


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """How many values a node stands for once its aliases are expanded."""
    if id(node) not in counts:
        counts[id(node)] = None
        children = node.value if isinstance(node.value, list) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    count = counts[id(node)]
    if count is None:
        raise ConfigError(f"the value of line {node.start_mark.line + 1} contains itself")
    return count


def override_key(values: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of nested mappings with one key replaced; `override` is "eval.samples=10", its value in YAML."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE with a dotted key, such as eval.samples=10")
    changed = dict(values)
    inner = changed
    try:
        for depth, part in enumerate(parts[:-1]):
            if part not in inner and parts[0] in ("stages", "data") and depth == 1:
                raise ConfigError(f"there is no '{part}' in '{parts[0]}'; expected one of {', '.join(map(str, inner))}")
            child = inner.get(part)
            if child is not None and not isinstance(child, dict):
                raise ConfigError(f"'{'.'.join(parts[:depth + 1])}' is {_short(child)}, which has no keys")
            inner[part] = dict(child or {})  # a copy: an alias of YAML may use the same mapping elsewhere
            inner = inner[part]
        inner[parts[-1]] = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {override!r}: {error}") from None
    return changed
