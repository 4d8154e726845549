"""Problems, demonstrations and preferences, and the files they come from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from r1kernels.train.rewards.answers import plain_number
from r1kernels.train.rewards.choice import letter
from r1kernels.train.rewards.code import read_tests
from r1kernels.train.rewards.tags import THINK, prompt_opens_think

GOLD_MARK = "####"
# How an answer is checked; an open problem has none.
Kind = Literal["math", "choice", "exact", "code", "open"]
Language = Literal["en", "zh"]


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, the line and what was expected."""


@dataclass(frozen=True)
class Problem:
    """A question and its reference answer.

    Args:
        id: names the problem within its data set, for logs and for resuming.
        question: the text put to the model.
        answer: the reference answer alone, without its derivation; empty for an open problem.
        kind: how answers are checked.
        language: that answers should be in.
    """

    id: str
    question: str
    answer: str
    kind: Kind = "math"
    language: str = "en"


@dataclass(frozen=True)
class Demonstration:
    """A prompt, as the model is given it, and a response to learn."""

    id: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """Two responses to a question, the first preferred."""

    id: str
    question: str
    chosen: str
    rejected: str


def load_gsm8k(path: str | PathLike[str]) -> list[Problem]:
    """Reads GSM8K, or any JSONL file of its shape.

    Args:
        path: a file with one JSON object a line, with the strings "question" and "answer", the answer ending
            in `#### ` and the reference answer. Blank lines are skipped. Thousands separators are removed
            from numbers.

    Returns:
        The problems in the order of the file; ids are `<file stem>-<line number>`.

    Raises:
        DataError: the file is missing, unreadable or empty, or a line is not what is described above.
    """
    problems = []
    for number, where, row in rows(path, ("question", "answer")):
        _, mark, gold = row["answer"].rpartition(GOLD_MARK)
        gold = gold.strip()
        if not mark or not gold:
            raise DataError(
                f"{where}: 'answer' must end in '{GOLD_MARK} ' and the reference, got {row['answer']!r:.80}"
            )
        if plain_number(gold) is not None:
            gold = gold.replace(",", "")
        problems.append(Problem(f"{Path(path).stem}-{number}", row["question"].strip(), gold))
    return problems


def load_math(path: str | PathLike[str]) -> list[Problem]:
    """Reads MATH: a JSON object a line with the strings "problem" and "answer". Raises as `load_gsm8k`."""
    return [
        Problem(f"{Path(path).stem}-{number}", row["problem"].strip(), row["answer"].strip())
        for number, _, row in rows(path, ("problem", "answer"))
    ]


def load_jsonl(path: str | PathLike[str], language: str = "en") -> list[Problem]:
    """Reads problems: a JSON object a line with the strings "question" and "answer"; the latter may be missing where
    "kind" is "open".

    Raises:
        DataError: as `load_gsm8k`, or a kind that is none.
    """
    problems = []
    for number, where, row in rows(path, ("question",)):
        kind = row.get("kind", "math")
        if kind not in get_args(Kind):
            raise DataError(f"{where}: 'kind' is {kind!r:.60}, expected one of {', '.join(get_args(Kind))}")
        if kind == "code" and isinstance(row.get("answer"), dict):
            row["answer"] = json.dumps(row["answer"], ensure_ascii=False)
        if row.get("language", language) not in get_args(Language):
            known = ", ".join(get_args(Language))
            raise DataError(f"{where}: 'language' is {row['language']!r:.60}, expected one of {known}")
        answer = "" if kind == "open" and "answer" not in row else _text(row, "answer", where)
        _check_answer(kind, answer.strip(), where)
        problems.append(Problem(
            str(row.get("id", f"{Path(path).stem}-{number}")), row["question"].strip(), answer.strip(), kind,
            str(row.get("language", language)),
        ))
    return problems


def _check_answer(kind: Kind, answer: str, where: str) -> None:
    """Refuses a reference that no answer could be checked against."""
    if kind == "choice" and letter(answer) is None:
        raise DataError(f"{where}: 'answer' is {answer!r:.60}, expected the letter of an option with kind 'choice'")
    if kind == "code":
        try:
            read_tests(answer)
        except ValueError as error:
            raise DataError(f"{where}: 'answer' holds no tests of a program: {error}") from error


def load_pairs_jsonl(path: str | PathLike[str]) -> list[Pair]:
    """Reads preferences: a JSON object a line with the strings "question", "chosen" and "rejected"."""
    keys = ("question", "chosen", "rejected")
    return [
        Pair(f"{Path(path).stem}-{number}", *(row[key].strip() for key in keys))
        for number, _, row in rows(path, keys)
    ]


def whole_response(prompt: str, completion: str) -> str:
    """A completion with the start of its thought, where the prompt has that."""
    return f"{THINK}{completion}" if prompt_opens_think(prompt) else completion


def demonstration(id: str, prompt: str, response: str) -> Demonstration:
    """A whole response after a prompt, which may have opened its thought already."""
    if prompt_opens_think(prompt):
        response = response.lstrip().removeprefix(THINK)
    return Demonstration(id, prompt, response)


def read_selected(path: str | PathLike[str], render: Callable[[str], str]) -> list[Demonstration]:
    """Reads what a stage of kind reject selected, for a model that is asked in another template, perhaps."""
    return [
        demonstration(
            str(row.get("id", number)), render(row["question"]), whole_response(row["prompt"], row["completion"])
        )
        for number, _, row in rows(path, ("question", "prompt", "completion"))
    ]


def response_of(row: dict[str, Any], where: str) -> str:
    """The response of an object of a file for SFT: "response", or "completion" as a stage of kind reject calls it."""
    return _text(row, "completion" if "completion" in row and "response" not in row else "response", where)


def rows(path: str | PathLike[str], keys: tuple[str, ...]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of a JSONL file that all have some strings: (line number, "file, line n", object).

    Raises:
        DataError: the file is missing, unreadable or empty, or a line is not such an object.
    """
    path, empty = Path(path), True
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    empty, where = False, f"{path}, line {number}"
                    yield number, where, _row(line, keys, where)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read data file {path}: {getattr(error, 'strerror', None) or error}") from error
    if empty:
        raise DataError(f"data file {path} holds nothing; expected one JSON object a line")


def _row(line: bytes, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key in keys:
        _text(row, key, where)
    return row


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DataError(f"{where}: no {key!r}, found: {', '.join(sorted(row)) or 'no key'}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"{where}: {key!r} must be a string that is not blank, got {row[key]!r:.80}")
    return row[key]
