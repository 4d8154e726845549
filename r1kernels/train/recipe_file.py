"""Reading and writing recipes: YAML, `--set` overrides, and errors that name the key, its value and the expectation."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel

from r1kernels.rewards.scorer import REWARDS
from r1kernels.train.errors import ConfigError
from r1kernels.train.recipe import LEAVES, Eval, Recipe, RefersTo, StageSettings, nearest

# A file with more values than this, once its aliases are expanded, is refused: it would fill the memory.
MAX_VALUES = 100_000
RESERVED_NAMES = ("curves", "tensorboard")  # directories of a run that are not stages


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, and adds its `import_from` directories to Python's search path. An override such as
    "stages.r1.steps=10" replaces one key. Raises ConfigError, which names the file, the key and what was expected."""
    path = Path(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError(f"the file holds {values!r:.60}; expected a mapping with the keys of a recipe")
        for override in overrides:
            values = override_key(values, override)
        return build_recipe(values, path.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_recipe(values: Mapping[str, Any], directory: Path = Path()) -> Recipe:
    """A recipe from plain values; relative paths of `import_from` start at `directory`."""
    folders = values.get("import_from")
    if isinstance(folders, list):
        folders = [str((directory / str(folder)).resolve()) for folder in folders]
        values = {**values, "import_from": folders}
        sys.path[:] = [*folders, *(entry for entry in sys.path if entry not in folders)]
    stages = values.get("stages")
    if isinstance(stages, dict):  # every stage knows its name
        named = {name: {**stage, "name": name} if isinstance(stage, dict) else stage for name, stage in stages.items()}
        values = {**values, "stages": named}
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error)) from None
    _check_names(recipe)
    for name, stage in recipe.stages.items():
        _check_stage(f"stages.{name}", stage)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def references(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The data sets and stages that settings name: (key, name, allowed kinds)."""
    for key, info in type(settings).model_fields.items():
        value = getattr(settings, key)
        kinds = next((item for item in info.metadata if isinstance(item, RefersTo)), None)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, BaseModel):
                yield from references(part, f"{prefix}{key}.")
            elif kinds and part is not None:
                yield f"{prefix}{key}", part, kinds


def _check_names(recipe: Recipe) -> None:
    """Checks that every name is used once, and that settings name data sets and earlier stages of the right kind."""
    kinds = dict.fromkeys(recipe.data, "data")
    named = {"eval": recipe.eval} | {f"stages.{name}": stage for name, stage in recipe.stages.items()}
    for where, settings in named.items():
        for key, name, allowed in references(settings):
            known = [other for other, kind in kinds.items() if kind in allowed]
            if isinstance(settings, Eval) and key == "problems":
                known = [other for other in known if recipe.data[other].held_out]
            if name not in known:
                later = ", and a stage can only use stages before it" if name in recipe.stages else ""
                raise ConfigError(f"'{where}.{key}' names '{name}'{later}; {nearest(name, known)}")
        if isinstance(settings, StageSettings):
            if settings.name in recipe.data or settings.name in RESERVED_NAMES:
                raise ConfigError(f"stage '{settings.name}' has the name of a data set or of a directory of every run; "
                                  "rename it")
            if settings.kind == "preference" and settings.name in (*REWARDS, "std"):
                raise ConfigError(f"stage '{settings.name}' has the name of a reward; rename it, because its scores "
                                  f"are the metric 'reward_{settings.name}'")
            kinds[settings.name] = LEAVES[settings.kind]
    if not recipe.eval_problems:
        raise ConfigError("no data set has held-out problems ('test_path'); stages are evaluated on them")


def _check_stage(where: str, stage: Any) -> None:
    """Checks the rules that need more than one setting."""
    if stage.kind == "grpo":
        if stage.questions * stage.group_size % stage.minibatches:
            raise ConfigError(f"'{where}.minibatches' is {stage.minibatches}; it must divide questions x group_size")
        for name in stage.rewards:
            if name not in REWARDS and ":" not in name:
                raise ConfigError(f"'{where}.rewards' names '{name}'; {nearest(name, (*REWARDS, 'module:function'))}")
        if stage.sampler.kind == "vllm" and None in (stage.sampler.url, stage.sampler.weights_dir):
            raise ConfigError(f"'{where}.sampler' is of kind 'vllm', which needs 'url' and 'weights_dir'")
    if stage.kind == "distill":
        if (stage.teacher is not None) != (stage.method == "logits") or (stage.on_policy and stage.teacher is None):
            raise ConfigError(f"'{where}.teacher' is {stage.teacher!r}; only method 'logits' has one and 'on_policy'")
        if bool(stage.problems) != stage.on_policy or bool(stage.samples) == stage.on_policy:
            raise ConfigError(f"'{where}' needs 'problems' where 'on_policy' is true, else 'samples', and not both")


def _describe(error: pydantic.ValidationError) -> str:
    """The first error of pydantic: the dotted key, its value, and the expectation."""
    first = error.errors(include_url=False)[0]
    place, value, context = [str(part) for part in first["loc"]], first["input"], first.get("ctx", {})
    if place[:1] in (["data"], ["stages"]):
        del place[2:3]  # pydantic's name for the kind
    message = first["msg"].removeprefix("Value error, ")
    if first["type"].startswith("union_tag"):
        place, value = [*place, "kind"], context.get("tag")
    if first["type"] in ("missing", "union_tag_not_found"):
        return f"missing key '{'.'.join(place)}'"
    if options := re.findall("'(.*?)'", context.get("expected_tags") or context.get("expected") or ""):
        message = nearest(value, options)
    if isinstance(value, dict):  # the message names the key
        return f"'{'.'.join(place)}': {message}" if place else message
    return f"'{'.'.join(place)}' is {value!r:.60}: {message}"


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ConfigError for anything that is not plain, finite data."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_nodes(node)
        return None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from None


def _check_nodes(root: yaml.Node | None) -> None:
    """Refuses a key that is given twice, and too many values. An alias counts as all values that it repeats."""
    waiting, count = [root], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > MAX_VALUES:
            raise ConfigError(f"more than {MAX_VALUES} values, those of aliases included")
        if isinstance(node, yaml.MappingNode):
            keys = Counter(str(key.value) for key, _ in node.value)
            twice = [key for key, times in keys.items() if times > 1]
            if twice:
                raise ConfigError(f"key {twice[0]!r:.60} is twice in the mapping of line {node.start_mark.line + 1}")
            waiting += itertools.chain(*node.value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def override_key(values: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of nested mappings with one key replaced; `override` is "eval.samples=10", its value in YAML."""
    key, equals, text = override.partition("=")
    path = key.split(".")

    def changed(old: Any, depth: int) -> Any:
        """What becomes of the value under the first `depth` names of the path."""
        if depth == len(path):
            return read_yaml(text)
        if not isinstance(old, dict | None):
            raise ConfigError(f"'{path[depth - 1]}' is {old!r:.60}, which has no keys")
        name, old = path[depth], old or {}
        if depth == 1 and path[0] in ("data", "stages") and len(path) > 2 and name not in old:
            raise ConfigError(f"there is no '{name}' in '{path[0]}'; {nearest(name, old)}")
        return {**old, name: changed(old.get(name), depth + 1)}

    try:
        if not equals or not all(path):
            raise ConfigError("expected KEY=VALUE with a dotted key, such as eval.samples=10")
        return changed(values, 0)
    except ConfigError as error:
        raise ConfigError(f"--set {override!r}: {error}") from None
