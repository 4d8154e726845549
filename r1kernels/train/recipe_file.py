"""Reading and writing recipes: YAML, `--set` overrides, and errors that name the key, its value and the expectation."""

from __future__ import annotations

import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel

from r1kernels.rewards.scorer import REWARDS
from r1kernels.train.errors import ConfigError
from r1kernels.train.recipe import LEAVES, Recipe, RefersTo


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, and adds its `import_from` directories to Python's search path. An override such as
    "stages.r1.steps=10" replaces one key. Raises ConfigError, which names the file, the key and what was expected."""
    try:
        values = read_yaml(Path(path).read_bytes())
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ConfigError(f"--set {override!r:.100}: expected KEY=VALUE, such as eval.samples=10")
            try:
                values = _replace(values, key.split("."), read_yaml(text))
            except ConfigError as error:
                raise ConfigError(f"--set {override!r:.100}: {error}") from None
        return build_recipe(values, Path(path).parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_recipe(values: Any, directory: Path = Path()) -> Recipe:
    """A recipe from plain values; relative paths of `import_from` start at `directory`."""
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe is {shown(values)}; expected a mapping")
    if isinstance(folders := values.get("import_from"), list):
        if bad := [folder for folder in folders if not isinstance(folder, str) or "\0" in folder]:
            raise ConfigError(f"'import_from' has {shown(bad[0])}; expected paths of directories")
        folders = [str((directory / folder).resolve()) for folder in folders]
        if missing := [folder for folder in folders if not Path(folder).is_dir()]:
            raise ConfigError(f"'import_from' names {missing[0]!r}; expected a directory that exists")
        values = {**values, "import_from": folders}
        sys.path[:] = [*folders, *(entry for entry in sys.path if entry not in folders)]
    if isinstance(stages := values.get("stages"), dict):  # every stage knows its name
        values = {**values, "stages": {name: {**stage, "name": name} if isinstance(stage, dict) else stage
                                       for name, stage in stages.items()}}
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error, values)) from None
    _check_names(recipe)
    for key in ("urls", "weights_dir") if recipe.sampler.kind == "vllm" else ():
        if not (value := getattr(recipe.sampler, key)) and not (key == "weights_dir" and recipe.sampler.weights):
            raise ConfigError(f"'sampler.{key}' is {value!r}; 'sampler.kind' is 'vllm', which needs it")
    for name, stage in recipe.stages.items():
        _check_stage(f"stages.{name}", stage)
        if recipe.parallel.tensor > 1 and getattr(stage, "lora", None):
            raise ConfigError(f"'parallel.tensor' is {recipe.parallel.tensor}, and 'stages.{name}.lora' is set; "
                              "adapters cannot be split")
        if recipe.parallel.tensor > 1 and getattr(stage, "replays", False):
            raise ConfigError(f"'parallel.tensor' is {recipe.parallel.tensor}, and 'stages.{name}.sampling_replay' is "
                              "true; log-probs over what sampling kept need the whole vocabulary on each rank")
        if recipe.sampler.kind == "vllm" and getattr(stage, "replays", False) and stage.top_k is None:
            raise ConfigError(f"'stages.{name}.top_k' is None, and vLLM returns what sampling kept only with a limit; "
                              "set it, for example to 512, or set 'sampling_replay' to false")
        if recipe.sampler.sleep and getattr(stage, "rollout_ahead", 0):
            raise ConfigError(f"'sampler.sleep' is true, and 'stages.{name}.rollout_ahead' is 1; a server that sleeps "
                              "during updates cannot sample")
    return recipe


def shown(value: Any) -> str:
    """A value in a message. With aliases, a short text has a list that is too large to be written out."""
    return f"{reprlib.repr(value):.60}"


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
            if where == "eval":
                known = [other for other in known if recipe.data[other].held_out]
            if name not in known:
                later = ", and a stage can only use stages before it" if name in recipe.stages else ""
                raise ConfigError(f"'{where}.{key}' names '{name}'{later}; expected one of {known}")
        if where != "eval":
            if settings.name in (*recipe.data, *REWARDS, "std"):  # scores of 'x' are the metric 'reward_x'
                raise ConfigError(f"stage '{settings.name}' has the name of a data set or of a reward; rename it")
            kinds[settings.name] = LEAVES[settings.kind]
    if not recipe.eval_problems:
        raise ConfigError("no data set has held-out problems ('test_path'); stages are evaluated on them")


def _check_stage(where: str, stage: Any) -> None:
    """Checks the rules that need more than one setting."""
    if stage.kind == "grpo":
        if stage.objective.function is None:  # a function of the user is imported when the stage is checked
            stage.objective.build(f"{where}.objective")
        if stage.questions * stage.group_size % stage.minibatches:
            raise ConfigError(f"'{where}.minibatches' is {stage.minibatches}; it must divide questions x group_size")
        if stage.rollout_ahead and stage.importance.mode == "none":
            raise ConfigError(f"'{where}.rollout_ahead' is 1, and '{where}.importance.mode' is 'none'; samples come "
                              "from older weights, so it must be 'truncate' or 'mask'")
        if stage.importance.normalize and stage.importance.mode == "none":
            raise ConfigError(f"'{where}.importance.normalize' is true, and '{where}.importance.mode' is 'none'; there "
                              "are no weights to normalize without 'truncate' or 'mask'")
    if stage.kind == "distill" and (stage.teacher is not None) != (stage.method == "logits"):
        raise ConfigError(f"'{where}.teacher' is {stage.teacher!r}; method 'logits' needs one, and only it has one")


def _describe(error: pydantic.ValidationError, values: dict[str, Any]) -> str:
    """The first error of pydantic: the dotted key, its value, and the expectation."""
    first = error.errors(include_url=False)[0]
    place, value = [str(part) for part in first["loc"]], first["input"]
    message = "unknown key; see docs/settings.md" if first["type"] == "extra_forbidden" else first["msg"].removeprefix(
        "Value error, ")
    if place[:1] in (["data"], ["stages"]):
        del place[2:3]  # pydantic's name for the kind
        if first["type"] == "union_tag_not_found":
            known = [name for name, part in values[place[0]].items() if isinstance(part, dict) and "kind" in part]
            message = f"it has no 'kind', which a new one needs; '{place[0]}' has {known}"
    given = "" if isinstance(value, dict) else f" is {shown(value)}"
    return f"'{'.'.join(place)}'{given}: {message}"


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, and refuses a key that is given twice."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, number in keys.items() if number > 1]:
            raise yaml.MarkedYAMLError(problem=f"key {twice[0]!r} is twice", problem_mark=node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:  # 2001-99-99, `!!bool x`, `!!timestamp x`
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            problem = f"{shown(node.value)} is not a valid {node.tag.rpartition(':')[2]}{reason}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def read_yaml(text: str | bytes) -> Any:
    """The value of a YAML text. Raises ConfigError if it is none, or if a key is given twice."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("not a recipe: lists or mappings are nested too deeply; expected a few levels") from None


def _replace(values: Any, path: Sequence[str], new: Any) -> Any:
    """A copy of nested mappings, in which the value at a path of keys is replaced."""
    if not path:
        return new
    values = values if isinstance(values, dict) else {}
    return {**values, path[0]: _replace(values.get(path[0]), path[1:], new)}
