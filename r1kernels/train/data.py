"""Data sets: problems, demonstrations and preference pairs from files, the hub, or a function of the user.

A data set is a list of rows (dicts). The keys of a row decide its use: `question` and `answer` make a problem,
`question` and `response` a demonstration, `question`, `chosen` and `rejected` a pair.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r1kernels.rewards.choice import letter
from r1kernels.rewards.code import read_tests
from r1kernels.rewards.math import check_reference
from r1kernels.rewards.text import THINK, prompt_opens_think
from r1kernels.train.errors import ConfigError, DataError
from r1kernels.train.prompt import Template
from r1kernels.train.recipe import FileData, FunctionData, HubData, Recipe
from r1kernels.train.recipe_file import references

if TYPE_CHECKING:
    from r1kernels.train.log import Console

KINDS = ("math", "choice", "exact", "code", "open")
LANGUAGES = ("en", "zh")
MAX_LINE = 2**26  # bytes of one line, decompressed
HUMANEVAL = "Complete this Python function. Answer with the whole function in a ```python block.\n\n```python\n{}\n```"
_SEPARATED = re.compile(r"[-+$]*\d{1,3}(,\d{3})+(\.\d*)?%?")  # 1,234,567.5

Row = tuple[str, str, dict[str, Any]]  # where it comes from, for messages; its id; the row
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """A question and its reference answer: without its derivation, or the tests of a program as JSON, or empty."""

    id: str
    question: str
    answer: str
    kind: str = "math"
    language: str = "en"


@dataclass(frozen=True)
class Demonstration:
    """A prompt, as the model is given it, and a response to learn."""

    id: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """Two responses to a question; the first is preferred."""

    id: str
    question: str
    chosen: str
    rejected: str


def load_problems(recipe: Recipe, name: str, split: Split) -> list[Problem]:
    """The problems to train on of a data set, or its first `eval.questions` held-out ones."""
    data, count = recipe.data[name], None if split == "train" else recipe.eval.questions
    return [_problem(data, row) for row in _rows(recipe, name, split, count)][:count]


def load_demonstrations(recipe: Recipe, name: str, template: Template) -> list[Demonstration]:
    """Rows with `response` (or `completion`, as a stage of kind reject calls it), for SFT."""
    return [
        _demonstration(f"{name}-{index}", template.render(row["question"]), _response(row, where))
        for index, (where, _, row) in enumerate(_rows(recipe, name, "train"))
    ]


def load_selected(path: str | Path, template: Template) -> list[Demonstration]:
    """What a stage of kind reject selected, asked in the template of another model."""
    return [
        _demonstration(str(number), template.render(row["question"]), whole_response(row["prompt"], row["completion"]))
        for number, row in read_jsonl(path, ("question", "prompt", "completion"))
    ]


def load_pairs(recipe: Recipe, name: str) -> list[Pair]:
    """Rows with `chosen` and `rejected`."""
    return [
        Pair(id, *(_text(row, key, where).strip() for key in ("question", "chosen", "rejected")))
        for where, id, row in _rows(recipe, name, "train")
    ]


def check_data(recipe: Recipe, console: Console | None = None) -> set[str]:
    """Reads all data that the stages use; returns the kinds of problems. Raises ConfigError or DataError for data that
    cannot be used, and for a question that is both trained on and held out."""
    tested = dict.fromkeys(recipe.eval_problems, recipe.eval.questions)
    uses: set[tuple[str, str]] = set()  # (key of a stage, data set that it trains on)
    for stage in recipe.stages.values():
        if stage.kind == "evaluate":
            tested |= {name: max(stage.questions, tested.get(name, 0)) for name in stage.problems}
        else:
            uses |= {(key, name) for key, name, _ in references(stage) if name in recipe.data}
    for name in {name for key, name in uses if key == "samples"}:
        for where, _, row in _rows(recipe, name, "train"):
            _response(row, where)
    for name in {name for key, name in uses if key == "pairs"}:
        load_pairs(recipe, name)
    found = {(name, "train"): load_problems(recipe, name, "train") for key, name in sorted(uses) if key == "problems"}
    trained = {name for _, name in uses}
    trained |= {name for name, data in recipe.data.items() if isinstance(data, FileData) and data.path}
    for name, count in tested.items():
        changed = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"questions": count})})
        found[name, "test"] = load_problems(changed, name, "test")
        asked = {row["question"].strip() for _, _, row in _rows(recipe, name, "train")} if name in trained else set()
        shared = [problem.question for problem in found[name, "test"] if problem.question in asked]
        if shared:
            raise ConfigError(f"data set '{name}' shares {len(shared)} questions, such as {shared[0]!r:.60}, between "
                              "training and held-out problems; expected none")
    for (name, split), problems in found.items():
        _check_references(f"data set '{name}', split '{split}'", problems, console)
    return {problem.kind for problems in found.values() for problem in problems}


def _check_references(where: str, problems: list[Problem], console: Console | None) -> None:
    """Reports references of mathematical problems that no answer can be compared with."""
    asked = [problem for problem in problems if problem.kind == "math"]
    bad = [(problem, why) for problem in asked if (why := check_reference(problem.answer))]
    if bad:
        examples = "; ".join(f"{problem.id}: {problem.answer!r:.60} ({why})" for problem, why in bad[:3])
        text = f"{where}: {len(bad)} of {len(asked)} references cannot be read, such as {examples}"
        if len(bad) == len(asked):
            raise DataError(f"{text}; expected answers without their derivation, or another 'kind'")
        if console is not None:
            console.say(f"{text}; these problems are unscorable", warning=True)


def whole_response(prompt: str, completion: str) -> str:
    """A completion with the start of its thought, where the prompt has that."""
    return f"{THINK}{completion}" if prompt_opens_think(prompt) else completion


def read_jsonl(path: str | Path, keys: Iterable[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line numbers and objects of a JSONL file, gzipped or not. Raises DataError if the file cannot be read or is
    empty, or if a line is not an object with strings at `keys`."""
    path, empty = Path(path), True
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number, where = number + 1, f"{path}, line {number + 1}"
                if len(line) > MAX_LINE:
                    raise DataError(f"{where}: longer than {MAX_LINE} bytes")
                if line.strip():
                    row, empty = _row(json.loads(line), where, keys), False
                    yield number, row
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read data file {path}: {getattr(error, 'strerror', None) or error}") from error
    if empty:
        raise DataError(f"data file {path} is empty; expected one JSON object a line")


def _row(row: Any, where: str, keys: Iterable[str] = ("question",)) -> dict[str, Any]:
    """A row, if it is a mapping with these keys and all its text can be encoded."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: a string holds half of a surrogate pair, which is not text") from None
    for key in keys:
        _text(row, key, where)
    return row


def _rows(recipe: Recipe, name: str, split: Split, count: int | None = None) -> list[Row]:
    """The rows of one split, with our names of columns; each has a question."""
    data, training = recipe.data[name], split == "train"
    if not training and not data.held_out:
        raise ConfigError(f"data set '{name}' has no held-out problems")
    if isinstance(data, FileData):
        path = data.path if training else data.test_path
        if path is None:
            raise ConfigError(f"'data.{name}.path' is missing; a stage trains on this data set")
        form = _FORMS.get(data.kind, lambda row, where: row)
        found = [(f"{path}, line {number}", f"{Path(path).stem}-{number}", row) for number, row in read_jsonl(path)]
        return [(where, id, _row(form(row, where), where)) for where, id, row in found]
    if isinstance(data, HubData):
        rows = _hub(name, data, data.split if training else data.test_split)
    else:
        try:
            rows = list(data.load()(split=split, count=count, seed=recipe.seed, **data.options))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'data.{name}': {data.function} failed for split '{split}': {error}") from error
    if not rows:
        raise DataError(f"data set '{name}' has no rows in split '{split}'")
    places = [f"data set '{name}', split '{split}', row {index}" for index in range(len(rows))]
    return [(where, f"{name}-{index}", _row(rows[index], where)) for index, where in enumerate(places)]


def _hub(name: str, data: HubData, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset  # imported late: it takes seconds, and most recipes do not need it

        found = load_dataset(data.path, data.subset, split=split)
    except ImportError as error:
        raise ConfigError(f"'data.{name}.kind' is 'hub', which needs: pip install datasets") from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"'data.{name}': cannot load {data.path!r}, split {split!r}: {error}") from error
    for ours, theirs in data.columns.items():
        if theirs not in found.column_names:
            known = ", ".join(found.column_names)
            raise ConfigError(f"'data.{name}.columns.{ours}' is {theirs!r}; expected one of {known}")
    rows = [{**row, **{ours: row[theirs] for ours, theirs in data.columns.items()}} for row in found]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _gsm8k(row: dict[str, Any], where: str) -> dict[str, Any]:
    _, mark, gold = _text(row, "answer", where).rpartition("####")
    gold = gold.strip()
    if not mark or not gold:
        raise DataError(f"{where}: 'answer' is {row['answer']!r:.80}; expected it to end in '#### ' and the reference")
    return {**row, "answer": gold.replace(",", "") if _SEPARATED.fullmatch(gold) else gold}


def _math(row: dict[str, Any], where: str) -> dict[str, Any]:
    return {**row, "question": _text(row, "problem", where)}


def _humaneval(row: dict[str, Any], where: str) -> dict[str, Any]:
    answer = {key: _text(row, key, where) for key in ("prompt", "entry_point", "test")}
    return {"id": _text(row, "task_id", where), "question": HUMANEVAL.format(answer["prompt"].strip()),
            "answer": json.dumps(answer), "kind": "code"}


_FORMS = {"gsm8k": _gsm8k, "math": _math, "humaneval": _humaneval}


def _problem(data: FileData | HubData | FunctionData, item: Row) -> Problem:
    where, id, row = item
    kind = row.get("kind", getattr(data, "answers", "math"))
    language = row.get("language", getattr(data, "language", "en"))
    for key, value, known in (("kind", kind, KINDS), ("language", language, LANGUAGES)):
        if value not in known:
            raise DataError(f"{where}: {key!r} is {value!r:.60}; expected one of {', '.join(known)}")
    answer = row.get("answer")
    if kind == "code" and isinstance(answer, dict | list):
        row = {**row, "answer": json.dumps(answer, ensure_ascii=False)}
    answer = "" if kind == "open" and answer in (None, "") else _text(row, "answer", where).strip()
    if kind == "choice" and letter(answer) is None:
        raise DataError(f"{where}: 'answer' is {answer!r:.60}; expected the letter of an option with kind 'choice'")
    if kind == "code":
        try:
            read_tests(answer)
        except ValueError as error:
            raise DataError(f"{where}: 'answer' holds no tests of a program: {error}") from error
    return Problem(str(row.get("id", id)), row["question"].strip(), answer, kind, language)


def _demonstration(id: str, prompt: str, response: str) -> Demonstration:
    """A whole response after a prompt, which may have opened its thought already."""
    if prompt_opens_think(prompt):
        response = response.lstrip().removeprefix(THINK)
    return Demonstration(id, prompt, response)


def _response(row: dict[str, Any], where: str) -> str:
    return _text(row, "completion" if "completion" in row and "response" not in row else "response", where)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    """A string of a row. Raises DataError if it is missing, blank or not a string."""
    if key not in row:
        raise DataError(f"{where}: no {key!r}; found {', '.join(sorted(map(str, row))) or 'no key'}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"{where}: {key!r} is {row[key]!r:.80}; expected a string that is not blank")
    return row[key]
