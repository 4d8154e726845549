"""Programming problems, and the files they come from."""

import json
from os import PathLike

from r1kernels.train.data import DataError, Problem, rows
from r1kernels.train.rewards.code import read_tests

KEYS = ("prompt", "entry_point", "test")
QUESTION = "Complete this Python function. Answer with the whole function in a ```python block.\n\n```python\n{}\n```"


def load_humaneval(path: str | PathLike[str]) -> list[Problem]:
    """Reads HumanEval: a JSON object a line with the strings "task_id", "prompt" (a function without its body),
    "entry_point" (its name) and "test" (which defines `check(candidate)`).

    Returns:
        Problems of kind "code" in the order of the file; their answers are references as `rewards.code` reads them.

    Raises:
        DataError: as `load_gsm8k`, or an entry point that is no name.
    """
    problems = []
    for _, where, row in rows(path, ("task_id", *KEYS)):
        answer = json.dumps({key: row[key] for key in KEYS})
        try:
            read_tests(answer)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        problems.append(Problem(row["task_id"], QUESTION.format(row["prompt"].strip()), answer, "code"))
    return problems
