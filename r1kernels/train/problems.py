"""The data sets of a recipe: generated here, or read from files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from r1kernels.train import tiny
from r1kernels.train.config import DataConfig, Recipe, references
from r1kernels.train.data import (
    DataError,
    Demonstration,
    Pair,
    Problem,
    demonstration,
    load_gsm8k,
    load_jsonl,
    load_math,
    load_pairs_jsonl,
    response_of,
    rows,
)
from r1kernels.train.prompt import Template
from r1kernels.train.schema import ConfigError


def load_problems(recipe: Recipe, name: str, split: Literal["train", "test"]) -> list[Problem]:
    """The problems to train on of a data set, or the first `eval.questions` held-out ones.

    Raises:
        ConfigError: the data set has no such problems, or shares some between the two.
        DataError: its file cannot be used.
    """
    data, wanted = recipe.data[name], recipe.eval.questions
    if data.kind == "arithmetic":
        count, key = (data.train_size, f"data.{name}.train_size") if split == "train" else (wanted, "eval.questions")
        return tiny.arithmetic_problems(split, count, data.min_terms, data.max_terms, recipe.seed, key=key)
    if data.kind == "greetings":
        return tiny.greeting_problems(split, data.train_size, recipe.seed, f"data.{name}.train_size")
    if split == "train":
        return _read(data, _path(data, name, "path"))
    held_out = _read(data, _path(data, name, "test_path"))[:wanted]
    if data.path is not None:
        if data.kind == "jsonl":  # whose other file may be one for SFT or of preferences, without answers
            asked = {row["question"].strip() for _, _, row in rows(_path(data, name, "path"), ("question",))}
        else:
            asked = {problem.question for problem in _read(data, _path(data, name, "path"))}
        if any(problem.question in asked for problem in held_out):
            raise ConfigError(
                f"'data.{name}.test_path' {data.test_path!r} shares questions with its path {data.path!r}, "
                "expected none"
            )
    return held_out


def load_demonstrations(recipe: Recipe, name: str, template: Template) -> list[Demonstration]:
    """Questions with responses, for SFT."""
    return [
        demonstration(f"{name}-{index}", template.render(question), response)
        for index, (question, response) in enumerate(_responses(recipe, name))
    ]


def _responses(recipe: Recipe, name: str) -> list[tuple[str, str]]:
    data = recipe.data[name]
    if data.kind == "greetings":
        return tiny.greeting_demonstrations(data.train_size, recipe.seed, f"data.{name}.train_size")
    if data.kind == "jsonl":
        lines = rows(_path(data, name, "path"), ("question",))
        return [(row["question"], response_of(row, where)) for _, where, row in lines]
    raise ConfigError(f"'samples' names the data set {name!r} of kind '{data.kind}', which has no responses")


def load_pairs(recipe: Recipe, name: str) -> list[Pair]:
    """Preferences."""
    data = recipe.data[name]
    if data.kind == "greetings":
        return [
            Pair(f"{name}-{index}", *texts)
            for index, texts in enumerate(
                tiny.greeting_pairs(data.train_size, recipe.seed, f"data.{name}.train_size")
            )
        ]
    if data.kind == "jsonl":
        return load_pairs_jsonl(_path(data, name, "path"))
    raise ConfigError(f"'pairs' names the data set {name!r} of kind '{data.kind}', which has no preferences")


def check_data(recipe: Recipe) -> set[str]:
    """Reads all that stages will ask for, so that what is wrong shows before any work; returns the kinds of problems.

    Raises:
        ConfigError, DataError: as the functions above.
    """
    readers = {
        "problems": lambda name: load_problems(recipe, name, "train"),
        "pairs": lambda name: load_pairs(recipe, name),
        "samples": lambda name: _responses(recipe, name),
    }
    found = []
    for stage in recipe.stages:
        for key, name in references(stage):
            if stage.kind == "evaluate" and key == "problems":
                found += load_problems(recipe, name, "test")
            elif name in recipe.data:
                found += readers[key](name) or []
    for name in recipe.eval_problems:
        found += load_problems(recipe, name, "test")
    return {problem.kind for problem in found if isinstance(problem, Problem)}


def data_files(recipe: Recipe, names: set[str]) -> dict[str, Path]:
    """The files of some data sets, by key."""
    found = {}
    for name in sorted(names):
        for key in ("path", "test_path"):
            path = getattr(recipe.data[name], key)
            if path is not None:
                found[f"data.{name}.{key}"] = Path(path)
    return found


def _read(data: DataConfig, path: str) -> list[Problem]:
    if data.kind == "gsm8k":
        return load_gsm8k(path)
    if data.kind == "math":
        return load_math(path)
    if data.kind == "humaneval":
        from r1kernels.train.data_code import load_humaneval

        return load_humaneval(path)
    return load_jsonl(path, data.language)


def _path(data: DataConfig, name: str, key: str) -> str:
    path = getattr(data, key)
    if path is None:
        raise ConfigError(f"'data.{name}.{key}' is missing, expected a file")
    if not Path(path).is_file():
        raise DataError(f"cannot read data file {path} ('data.{name}.{key}'): no such file")
    return path
