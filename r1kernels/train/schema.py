"""From YAML to dataclasses and back, with errors that name the key, its value and what was expected."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, its value and what was expected."""


# A value of an open set of settings, to be checked by whoever takes them.
Scalar = int | float | str | None


class _Loader(yaml.SafeLoader):
    """Of a key given twice, YAML readers keep the last value without a word; this one refuses it."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # As it is written: later, keys that `<<` merges into it are among its own.
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise ConfigError(f"key '{key[1]}' is given twice, in the mapping of line {node.start_mark.line + 1}")
        return node


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: a mapping has a key twice, or a value is none, such as the date 2024-13-45.
        yaml.YAMLError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"a value cannot be read: {error}") from None


def override_key(values: dict[str, Any], override: str) -> dict[str, Any]:
    """Nested mappings with one key changed; `override` is "eval.samples=10" or "stages.r1.steps=10", in YAML.

    What is changed is copied first: by an alias of YAML, two stages may hold the same mapping.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE with a dotted key, such as eval.samples=10")
    try:
        return _replaced(values, key, read_yaml(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"--set {override!r}: {error}") from None


def _replaced(values: Any, key: str, new: Any) -> Any:
    """`values` with `new` at a dotted key; of a list of mappings, they go by their names."""
    if not key:
        return new
    named = isinstance(values, list)
    if named:
        children = {str(item["name"]): item for item in values if isinstance(item, dict) and "name" in item}
    else:
        children = values if isinstance(values, dict) else {}
    # A name may hold dots itself: the longest that is there is meant.
    known = [name for name in map(str, children) if f"{key}.".startswith(f"{name}.")]
    name = max(known, key=len) if known else key.partition(".")[0]
    rest = key[len(name) + 1 :]
    if not named:
        return {**children, name: _replaced(children.get(name), rest, new)}
    if name not in children:
        raise ConfigError(f"no {name!r}, expected one of {', '.join(children) or 'none'}")
    if not rest:
        raise ConfigError("expected a key after the name, such as stages.r1.steps=10")
    return [_replaced(item, rest, new) if item is children[name] else item for item in values]


def build(cls: type, values: Any, where: str = "") -> Any:
    """An instance of the dataclass `cls` from a mapping; `where` is its dotted key, empty at the top."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"'{where}' is {values!r:.60}, expected a mapping")
    hints, keys = typing.get_type_hints(cls), [item.name for item in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(keys)}"
            raise ConfigError(f"unknown key '{key}'" + (f" in '{where}'" if where else "") + f" ({hint})")
        arguments[key] = _convert(hints[key], value, f"{where}.{key}" if where else key)
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in arguments:
            raise ConfigError(f"missing key '{item.name}'" + (f" in '{where}'" if where else ""))
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"'{where}': {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"'{where}' is {value!r:.60}, expected {expected}")

    if hint == Scalar:
        if isinstance(value, bool) or not isinstance(value, Scalar):
            raise wrong("a number or a word")
        return _number(value) if isinstance(value, str) else value
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(options[0], value, where)
    if origin is Literal:
        if value not in options:
            raise wrong("one of " + ", ".join(map(str, options)))
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise wrong("a list")
        return origin(_convert(options[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong("a mapping from names to values")
        return {str(key): _convert(options[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if hint is float:
        number = _number(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise wrong("a number")
        try:
            return float(number)
        except OverflowError:
            raise wrong("a number that fits a float") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong({int: "an integer", str: "a string", bool: "true or false"}[hint])
    return value


def _number(text: str) -> float | str:
    """YAML reads 1e-3, without a dot, as a string."""
    try:
        return float(text)
    except ValueError:
        return text


def check_ranges(
    config: Any,
    *,
    at_least_1: Iterable[str] = (),
    at_least_0: Iterable[str] = (),
    positive: Iterable[str] = (),
    probability: Iterable[str] = (),
) -> None:
    """Checks numbers of a configuration, given by their dotted keys; one that is None is left alone.

    Raises:
        ConfigError: naming the key, its value and the range.
    """
    ranges = (
        (at_least_1, lambda value: value >= 1, "at least 1"),
        (at_least_0, lambda value: value >= 0, "at least 0"),
        (positive, lambda value: 0 < value < float("inf"), "a positive number"),
        (probability, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    )
    for keys, holds, expected in ranges:
        for key in keys:
            value = config
            for name in key.split("."):
                value = None if value is None else getattr(value, name)
            if value is not None and not holds(value):
                raise ConfigError(f"'{key}' is {value}, expected {expected}")


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys; an item of a list of named mappings goes by its name."""
    if isinstance(values, list | tuple) and values and all(isinstance(v, dict) and "name" in v for v in values):
        values = {value["name"]: value for value in values}
    if not isinstance(values, dict):
        return {key: values}
    return {k: v for name in values for k, v in flat(values[name], f"{key}.{name}".lstrip(".")).items()}


def differences(first: Any, second: Any) -> list[str]:
    """The dotted keys, with both values, in which two mappings differ."""
    a, b = flat(first), flat(second)
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in {**a, **b} if a.get(key) != b.get(key)]
