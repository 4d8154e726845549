"""Data sets and prompts: problems, demonstrations and pairs from files, the hub, or a function of the user.

A data set is a list of rows (dicts). The keys of a row decide its use: `question` and `answer` make a problem,
`question` and `response` a demonstration, `question`, `chosen` and `rejected` a pair.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from r1kernels.rewards import KINDS
from r1kernels.rewards.choice import letter
from r1kernels.rewards.code import read_tests
from r1kernels.rewards.math import check_reference
from r1kernels.rewards.text import THINK, prompt_opens_think
from r1kernels.train.errors import ConfigError, DataError, naming
from r1kernels.train.log import Console
from r1kernels.train.recipe import Data, FileData, Recipe
from r1kernels.train.recipe_file import references

# DeepSeek-R1, arXiv 2501.12948, Table 1: it fixes the structure of a response and does not say how to think.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:"
)

Row = dict[str, Any]
Split = Literal["train", "test"]


class Problem(NamedTuple):
    """A question and its reference answer: a final answer, or the tests of a program as JSON, or empty."""
    id: str
    question: str
    answer: str
    kind: str = "math"
    language: str = "en"


class Pair(NamedTuple):
    """Two responses to a question; the first is preferred."""
    question: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Template:
    """Turns questions into prompts: `r1_zero` for base models, `chat` for the tokenizer's chat template."""
    kind: Literal["r1_zero", "chat"]
    tokenizer: PreTrainedTokenizerBase | None
    open_think: bool = False  # every completion starts inside the thought

    def __post_init__(self) -> None:
        if self.kind == "chat" and not self.tokenizer.chat_template:
            raise ConfigError(f"'template' is 'chat', but {self.tokenizer.name_or_path!r} has no chat template; "
                              "use a model with one, or 'r1_zero'")

    def render(self, question: str) -> str:
        """The prompt of a question."""
        if self.kind == "r1_zero":
            return R1_ZERO_TEMPLATE.replace("{question}", question.strip()) + (" <think>" if self.open_think else "")
        chat = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            prompt = prompt.removeprefix(bos)  # the tokenizer adds it again
        opened = prompt.rstrip().endswith("<think>")
        return f"{prompt}<think>\n" if self.open_think and not opened else prompt


def load_problems(recipe: Recipe, name: str, split: Split) -> list[Problem]:
    """The problems to train on of a data set, or its first `eval.questions` held-out ones."""
    count = recipe.eval.questions if split == "test" else None
    data, problems = recipe.data[name], []
    for where, row in read_rows(recipe, name, split, count)[:count]:
        kind = row.get("kind") or getattr(data, "answers", "math")
        language = row.get("language") or getattr(data, "language", "en")
        if kind not in KINDS or language not in ("en", "zh"):
            raise DataError(f"{where}: 'kind' is {kind!r} and 'language' {language!r}; expected {KINDS} and en or zh")
        answer = row.get("answer")
        if isinstance(answer, dict):  # the tests of a program
            answer = json.dumps(answer, ensure_ascii=False)
        elif answer or kind != "open":
            answer = text_of(row, "answer", where).strip()
            if kind == "math":  # GSM8K has the solution before it
                answer = answer.rpartition("####")[2].strip()
        problems.append(Problem(str(row.get("id", where)), row["question"].strip(), answer or "", kind, language))
    return problems


def load_demonstrations(rows: Iterable[tuple[str, Row]], template: Template) -> list[tuple[str, str]]:
    """Prompts, exactly as the model receives them, and responses to learn: those of the rows, or samples of a stage of
    kind reject."""
    found = []
    for where, row in rows:
        prompt, response = template.render(row["question"]), row.get("response")
        if response is None and "completion" in row:
            response = whole_response(row.get("prompt", ""), row["completion"])
        response = text_of({"response": response}, "response", where)
        if prompt_opens_think(prompt):
            response = response.lstrip().removeprefix(THINK)
        found.append((prompt, response))
    return found


def load_pairs(recipe: Recipe, name: str) -> list[Pair]:
    """Rows with `chosen` and `rejected`."""
    return [Pair(*(text_of(row, key, where) for key in Pair._fields))
            for where, row in read_rows(recipe, name, "train")]


def whole_response(prompt: str, completion: str) -> str:
    """A completion, and before it the start of its thought if that is in the prompt."""
    return f"{THINK}{completion}" if prompt_opens_think(prompt) else completion


def check_data(recipe: Recipe, console: Console) -> tuple[set[str], dict[str, str]]:
    """Reads all data that the stages use, reports references that no answer can be compared with, and returns the kinds
    of problems, and a hash of each data set. Raises ConfigError or DataError for data that cannot be used, and for a
    question in both splits."""
    found, others = {}, {}
    for stage in recipe.stages.values():
        for key, name, _ in references(stage):
            if name in recipe.data and key == "problems":
                found[name, "train"] = load_problems(recipe, name, "train")
            elif name in recipe.data and key == "samples":
                rows = read_rows(recipe, name, "train")
                others[name, "train"] = load_demonstrations(rows, Template("r1_zero", None))
            elif name in recipe.data:
                others[name, "train"] = load_pairs(recipe, name)
    for name in recipe.eval_problems:
        found[name, "test"] = load_problems(recipe, name, "test")
        train, test = ({problem.question for problem in found.get((name, split), [])} for split in ("train", "test"))
        if both := train & test:
            raise DataError(f"data set '{name}' has {len(both)} questions in both splits, such as {min(both)!r:.60}")
    for (name, split), problems in found.items():
        bad = [f"{item.id}: {item.answer!r:.60} ({why})" for item in problems if (why := _unreadable(item))]
        text = (f"data set '{name}', split '{split}': {len(bad)} of {len(problems)} references cannot be compared with "
                f"answers: {'; '.join(bad[:3])}")
        if len(bad) == len(problems):
            raise DataError(text)
        if bad:
            console.say(f"{text}; these problems are unscorable", warning=True)
    return {problem.kind for problems in found.values() for problem in problems}, {
        f"data set '{name}', split '{split}'": hashlib.sha256(repr(rows).encode("utf-8", "replace")).hexdigest()[:16]
        for (name, split), rows in (others | found).items()}


def _unreadable(problem: Problem) -> str | None:
    """Why no answer can be compared with the reference of a problem; None if one can."""
    try:
        if problem.kind == "code":
            read_tests(problem.answer)
        if problem.kind == "choice" and letter(problem.answer) is None:
            return "expected the letter of an option"
        return check_reference(problem.answer) if problem.kind == "math" else None
    except ValueError as error:
        return str(error)


def read_rows(recipe: Recipe, name: str, split: Split, count: int | None = None) -> list[tuple[str, Row]]:
    """The rows of one split, each with a question, and where each comes from, for messages."""
    data, training, where = recipe.data[name], split == "train", f"data set '{name}', split '{split}'"
    with naming(f"{where}: cannot be read, or lacks a key",
                (ImportError, OSError, TypeError, ValueError, KeyError), DataError):
        if data.kind == "function":
            found = data.load()(split=split, count=count, seed=recipe.seed, **data.options)
        elif data.kind == "hub":
            from datasets import load_dataset  # imported late: it takes seconds, and most recipes do not need it

            found = load_dataset(data.path, data.subset, split=data.split if training else data.test_split)
        else:
            path = data.path if training else data.test_path
            if path is None:
                raise ConfigError(f"'data.{name}.path' is null, and a stage trains on this data set; expected a file")
            found = read_jsonl(path)
        rows = found if isinstance(data, FileData) else ((f"{where}, row {n}", row) for n, row in enumerate(found))
        rows = [(place, _with_our_keys(data, row, place)) for place, row in rows]
    if not rows:
        raise DataError(f"{where}: there are no rows; expected at least one")
    return rows


def _with_our_keys(data: Data, row: Row, where: str) -> Row:
    """A row after the setting `columns`, with a question."""
    row = row | {ours: row[theirs] for ours, theirs in getattr(data, "columns", {}).items()}
    return row | {"question": text_of(row, "question", where)}


def text_of(row: Row, key: str, where: str) -> str:
    """A string of a row. Raises DataError if it is missing, blank or not a string."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} is {value!r:.80}; expected text that is not blank (keys: {', '.join(row)})")
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[str, Row]]:
    """The objects of a JSONL file, gzipped or not, and where they are. Raises DataError, naming the file and line."""
    place = f"data file {path}"
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                if line.strip():
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair
                    if not isinstance(row, dict):
                        raise ValueError(f"it holds a {type(row).__name__}")
                    yield f"{Path(path).name}, line {number}", row
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{place}: {error}; expected one JSON object a line") from error
