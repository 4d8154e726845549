"""Accuracy of programs: whether the code of a completion passes the tests of its problem.

A problem's reference is a JSON object, in one of three forms:

* `{"prompt", "test", "entry_point"}`, as in HumanEval: `test` defines `check(candidate)`;
* `{"cases": [{"args": [...], "expected": ...}, ...], "entry_point"}`: plain calls and their results, where
  a tuple is as good as a list and an int key as good as the string of it: JSON has no other;
* `{"stdio": [{"input", "output"}, ...]}`: whole programs; white space at the ends of lines does not count.

The code is the last fenced block of the final answer that is marked as Python, or not marked at all; an answer
without a fence is all code. Where it defines the entry point (`def`, `class` or `=` at the start of a line), it follows
the prompt in the same module, as a function of its own. Where it does not, it is the body that the prompt was left
without, and, unfenced, ends with the first line of text that is not indented: a base model goes on and on.

`code_judge` runs it, in a sandbox.
"""

import json
import math
import re

from .base import Judgement, Sample
from .sandbox import START_LIMIT_S, choose
from .settings import ScoringConfig
from .tags import ANSWER, ANSWER_END, after_thinking

JUDGE = "code_judge:judge"
MAX_CODE = 100_000  # characters

_PYTHON = ("python", "py", "python3")
_UNINDENTED = re.compile(r"^\w", re.MULTILINE)


def triage(sample: Sample, settings: ScoringConfig = ScoringConfig()) -> float | Judgement:  # noqa: B008
    """0.0 for a completion without code, NaN for a reference that is none, else what `code_judge` is to judge.

    Raises:
        SandboxError: programs cannot be confined here (`sandbox.choose`).
    """
    try:
        tests = read_tests(sample.answer)
    except ValueError:
        return math.nan
    found = extract_code(sample.prompt, sample.completion)
    if found is None:
        return 0.0
    runs = len(tests.get("stdio", ".")) * (settings.timeout_s + START_LIMIT_S)
    sandbox = choose(settings.sandbox, settings.memory_mb)
    arguments = (sample.answer, *found, sandbox, settings.timeout_s, settings.memory_mb)
    return Judgement(JUDGE, arguments, timeout_s=runs + settings.timeout_s)


def code_reward(sample: Sample, settings: ScoringConfig = ScoringConfig()) -> float:  # noqa: B008
    """1.0 when the code passes all tests, else 0.0; NaN when the reference is not one.

    Judged from the calling process; the code runs in the sandbox.

    Raises:
        SandboxError: it could not be run.
    """
    settled = triage(sample, settings)
    if not isinstance(settled, Judgement):
        return settled
    from .code_judge import judge

    return judge(*settled.arguments)


def extract_code(prompt: str, completion: str) -> tuple[str, bool] | None:
    """The code of a completion, and whether it was fenced; None where there is none."""
    text = after_thinking(prompt, completion)
    if text is None:
        return None
    if ANSWER in text:
        text = text.rpartition(ANSWER)[2].partition(ANSWER_END)[0]
    blocks = _blocks(text.replace("\r\n", "\n"))
    for languages in (_PYTHON, ("",)):
        chosen = [code for language, code in blocks if language in languages]
        if chosen:
            text = chosen[-1]
            break
    return (text, bool(blocks)) if text.strip() and len(text) <= MAX_CODE else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text, (language, content); a last one that is not closed ends with the text."""
    blocks, opened = [], False
    for line in text.splitlines(keepends=True):
        if not line.lstrip().startswith("```"):
            if opened:
                blocks[-1][1].append(line)
        elif not opened:
            language, opened = line.strip().lstrip("`").split(), True
            blocks.append((language[0].lower() if language else "", []))
        elif line.strip().strip("`"):
            blocks[-1][1].append(line)
        else:
            opened = False
    return [(language, "".join(lines)) for language, lines in blocks]


def read_tests(reference: str) -> dict:
    """A reference, as described above.

    Raises:
        ValueError: it has another form; the message says what was expected.
    """
    tests = json.loads(reference)
    if not isinstance(tests, dict):
        raise ValueError(f"expected a JSON object of tests, got {type(tests).__name__}")
    if "stdio" in tests:
        _check_list(tests, "stdio", "input", "output")
        if not all(isinstance(case[key], str) for case in tests["stdio"] for key in ("input", "output")):
            raise ValueError("'input' and 'output' of a 'stdio' test must be strings")
        return tests
    if "cases" in tests:
        _check_list(tests, "cases", "args", "expected")
        if not all(isinstance(case["args"], list) for case in tests["cases"]):
            raise ValueError("'args' of a case must be a list")
    needed = ("entry_point",) if "cases" in tests else ("prompt", "test", "entry_point")
    for key in needed:
        if not isinstance(tests.get(key), str):
            raise ValueError(f"tests need {key!r}, a string, unless they are of 'stdio'; got {tests.get(key)!r:.80}")
    if not tests["entry_point"].isidentifier():
        raise ValueError(f"'entry_point' must be the name of a function, got {tests['entry_point']!r}")
    return tests


def _check_list(tests: dict, key: str, *parts: str) -> None:
    cases = tests[key]
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"{key!r} must be a list of tests that is not empty")
    if not all(isinstance(case, dict) and all(part in case for part in parts) for case in cases):
        raise ValueError(f"a test of {key!r} must be an object with {' and '.join(map(repr, parts))}")


def sources(tests: dict, code: str, fenced: bool) -> list[str]:
    """The texts to run one after another in one module, before the entry point is there."""
    prompt, entry_point = tests.get("prompt", ""), re.escape(tests["entry_point"])
    if not prompt or re.search(rf"^((async\s+)?def|class)\s+{entry_point}\b|^{entry_point}\s*=", code, re.MULTILINE):
        return [with_body(prompt), code]
    if not fenced:
        end = _UNINDENTED.search(code)
        code = code[: end.start()] if end else code
    return [prompt + code]


def with_body(prompt: str) -> str:
    """A prompt that can be run as it is: a function that has only comments is given a body."""
    try:
        compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return prompt.rstrip() + "\n    pass\n"
    return prompt
