"""Problems with a checkable answer, and the files they come from."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from r1kernels.train.rewards.answers import plain_number

GOLD_MARK = "####"


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, the line and what was expected."""


@dataclass(frozen=True)
class Problem:
    """A question and its reference answer.

    Args:
        id: names the problem within its data set, for logs and for resuming.
        question: the text put to the model.
        answer: the reference answer alone, without its derivation.
    """

    id: str
    question: str
    answer: str
    kind: str = "math"


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
    path = Path(path)
    problems = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    problems.append(_gsm8k_problem(line, path, number))
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror}") from error
    if not problems:
        raise DataError(f"data file {path} holds no problem; expected one JSON object a line")
    return problems


def _gsm8k_problem(line: bytes, path: Path, number: int) -> Problem:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key in ("question", "answer"):
        if key not in row:
            found = ", ".join(sorted(row)) or "none"
            raise DataError(f"{where}: no {key!r}; expected the keys 'question' and 'answer', found: {found}")
        if not isinstance(row[key], str) or not row[key].strip():
            raise DataError(f"{where}: {key!r} must be a string that is not blank, got {row[key]!r:.80}")
    _, mark, gold = row["answer"].rpartition(GOLD_MARK)
    gold = gold.strip()
    if not mark or not gold:
        raise DataError(f"{where}: 'answer' must end in '{GOLD_MARK} ' and the reference, got {row['answer']!r:.80}")
    if plain_number(gold) is not None:
        gold = gold.replace(",", "")
    return Problem(f"{path.stem}-{number}", row["question"].strip(), gold)
