"""Whether the program in a completion passes the tests of its problem; docs/programs.md describes both.

`settle` is cheap and runs in the caller's process; `judge` starts sandboxes and belongs in a worker process. Neither
executes anything of a completion or of a data set: a data set's `check` and `checker` run in a sandbox beside the
program's, and results leave both as plain data.

A program is wrong (0.0) that cannot be compiled, ends, crashes, takes too much time or memory, or answers what is not
plain data. Tests that cannot be run, and a sandbox that does not start, are not its fault and raise an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Sequence

from markdown_it import MarkdownIt

from .sandbox import START_LIMIT_S, Limits, Program, ProgramError, Sandbox, check, frame
from .text import ANSWER, ANSWER_END, after_thinking

MAX_TEXT = 200_000  # characters of an answer
SPARE_S = 2.0  # for the tests' own work, beyond the program's time
TEST_BYTES = 2**26  # of the arguments of one call by the tests
FORMS = {"stdio": ("input", str, "output"), "cases": ("args", list, "expected")}  # given, its type, wanted
PYTHON = ("python", "python3", "py")
ENTRY_POINT = re.compile(r"[^\W\d]\w*((\(\))?\.[^\W\d]\w*)?")
INTEGER, FLOAT = re.compile(r"[+-]?\d{1,99}"), re.compile(r"[+-]?(\d{1,99}(\.\d{0,99})?|\.\d{1,99})([eE][+-]?\d{1,9})?")
PRELUDE = "import math, random, re, string\nfrom math import ceil, comb, floor, gcd, inf, sqrt\n" + "".join(
    f"import {name}\nfrom {name} import *\n"
    for name in ("bisect", "collections", "functools", "heapq", "itertools", "typing")
)  # what LeetCode imports before a `class Solution`


def read_tests(reference: str) -> dict:
    """Reads the tests of a problem.

    Raises:
        ValueError: they have another form than docs/programs.md lists; the message says what was expected.
    """
    tests = json.loads(reference)
    if not isinstance(tests, dict):
        raise ValueError(f"tests must be a JSON object, got {type(tests).__name__}")
    form = next((form for form in FORMS if form in tests), "test")
    texts = {"stdio": [], "cases": ["entry_point"], "test": ["prompt", "test", "entry_point"]}[form]
    for key in [*texts, *(["checker"] if "checker" in tests else [])]:
        if not isinstance(tests.get(key), str):
            raise ValueError(f"{key!r} of a program's tests must be a string, got {tests.get(key)!r:.80}")
    if form != "test":
        given, kind, wanted = FORMS[form]
        needed = {given: kind} | ({} if "checker" in tests else {wanted: str if form == "stdio" else object})
        rows = tests[form] if isinstance(tests[form], list) and tests[form] else [None]
        for row in rows:
            if not isinstance(row, dict) or not all(key in row and isinstance(row[key], needed[key]) for key in needed):
                raise ValueError(f"{form!r} must be a list of objects with {' and '.join(needed)}, got {row!r:.80}")
    if not ENTRY_POINT.fullmatch(tests.get("entry_point", "main")):
        raise ValueError(f"'entry_point' must be a function or Class.method, got {tests['entry_point']!r}")
    tolerance = tests.get("tolerance", 0)
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
        raise ValueError(f"'tolerance' must be a number from 0 to below 1, got {tolerance!r:.80}")
    entry_point = tests["entry_point"].replace("()", "") if texts else ""
    return tests | {"entry_point": entry_point, "tolerance": tolerance, "form": form}


def settle(prompt: str, completion: str, reference: str) -> float | tuple[str, str] | None:
    """Returns 0.0 without an answer, None for tests that cannot be read, else the first arguments of `judge`."""
    try:
        read_tests(reference)
    except (ValueError, RecursionError):
        return None
    text = after_thinking(prompt, completion)
    if text is not None and ANSWER in text:
        text = text.rpartition(ANSWER)[2].partition(ANSWER_END)[0]
    return (reference, text) if text and text.strip() and len(text) <= MAX_TEXT else 0.0


def time_limit(reference: str, timeout_s: float) -> float:
    """The seconds after which `judge` has ended, whatever the program does."""
    return len(read_tests(reference).get("stdio", ".")) * (2 * timeout_s + SPARE_S) + 3 * START_LIMIT_S


def judge(
    reference: str, text: str, sandbox: str = "bubblewrap", timeout_s: float = 5.0, memory_mb: int = 512,
    imports: Sequence[str] | None = None,
) -> float:  # fmt: skip
    """1.0 if the program in an answer passes every test, else 0.0.

    Raises:
        SandboxError: the program could not be run.
        ValueError: the tests could not be run.
    """
    tests, place = read_tests(reference), check(memory_mb, sandbox, tuple(imports or ()))
    limits = Limits(seconds=timeout_s, memory_bytes=memory_mb * 2**20)
    passes = _check_passes if tests["form"] == "test" else _cases_pass
    texts = sources(tests, *find_code(text, tests["entry_point"]))
    with Program(place, texts, tests["entry_point"], limits) as program:
        try:
            return float(passes(tests, program, place, limits))
        except ProgramError:
            return 0.0


def find_code(text: str, entry_point: str) -> tuple[str, bool]:
    """The code of an answer, and whether it was in a fenced block; "" if no block is Python."""
    markdown = MarkdownIt("zero").enable(["blockquote", "code", "fence", "heading", "hr", "list"])
    tokens = markdown.parse(text) if "```" in text or "~~~" in text else []
    blocks = [((token.info.split() or [""])[0].lower(), token.content) for token in tokens if token.type == "fence"]
    if not blocks:
        return text, False
    usable = [code for language, code in blocks if language in (*PYTHON, "")]
    defining = [code for code in usable if entry_point and defines(code, entry_point)]
    return (defining or [code for language, code in blocks if language in PYTHON] or usable or [""])[-1], True


def defines(code: str, entry_point: str) -> bool:
    """Whether a line of code that is not indented defines the entry point or its class."""
    name = re.escape(entry_point.partition(".")[0])
    return re.search(rf"^(((async\s+)?def|class)\s+{name}\b|{name}\s*[:=](?!=))", code, re.MULTILINE) is not None


def sources(tests: dict, code: str, fenced: bool) -> list[str]:
    """The texts to run one after another in one module, so that it then has the entry point."""
    prompt, entry_point = tests.get("prompt", ""), tests["entry_point"]
    if not prompt or defines(code, entry_point):
        return [PRELUDE if "." in entry_point else "", with_body(prompt), code]
    if not fenced:  # the body of a function, and then the model's text
        code = re.split(r"^(?=\w)", code, maxsplit=1, flags=re.MULTILINE)[0]
    return [prompt + code]


def with_body(prompt: str) -> str:
    """A prompt that can be run as it is: a function that has only comments is given a body."""
    try:
        compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return prompt.rstrip() + "\n    pass\n"
    return prompt


def _cases_pass(tests: dict, program: Program, place: Sandbox, limits: Limits) -> bool:
    """Whether the program's outputs are the expected ones or please the problem's checker."""
    given, _, wanted = FORMS[tests["form"]]
    tolerance, checker = tests["tolerance"], None
    with contextlib.ExitStack() as stack:
        if "checker" in tests:
            checker = stack.enter_context(Program(place, [tests["checker"]], "check", limits))
            try:
                checker.load()
            except ProgramError as error:
                raise ValueError(f"the checker of a program's tests cannot be loaded: {error}") from error
        for case in tests[tests["form"]]:
            if tests["form"] == "stdio":
                output, status = program.run(case[given])
                failed = status != 0
            else:
                kind, output, *_ = program.ask(*case[given])
                failed = kind == "raise"
            if failed:
                return False
            if checker:
                kind, right, *_ = checker.ask(case[given], output)
                right = kind == "value" and bool(right)
            elif tests["form"] == "stdio":
                right = _same(_lines(output, tolerance), _lines(case[wanted], tolerance), tolerance)
            else:
                right = _same(output, case[wanted], tolerance)
            if not right:
                return False
    return True


def _check_passes(tests: dict, program: Program, place: Sandbox, limits: Limits) -> bool:
    """Whether the data set's `check(candidate)` passes: relays its calls to the program."""
    own = dataclasses.replace(limits, seconds=limits.seconds + SPARE_S, output_bytes=TEST_BYTES)
    texts, called = [with_body(tests["prompt"]), tests["test"]], False
    with Program(place, texts, tests["entry_point"], own, tests=True) as checks:
        try:
            checks.load()
            message = checks.relay(b"")
            while message[:1] == b"c":
                called = True
                program.load()
                message = checks.relay(frame(program.relay(frame(message[1:]))))
        except ProgramError as error:
            if called:  # what hostile answers make of the tests is the program's failure too
                raise
            raise ValueError(f"the tests of a program do not run: {error}") from error
    if message[:1] == b"u":
        raise ValueError(f"the tests of a program cannot be used: {message[1:].decode(errors='replace')}")
    return message == b"passed"


def _same(found: object, expected: object, tolerance: float) -> bool:
    """Equality as JSON knows it: a tuple may answer a list, an int key its digits, a float one within the tolerance."""
    if isinstance(expected, list):
        alike = isinstance(found, list | tuple) and len(found) == len(expected)
        return alike and all(_same(*pair, tolerance) for pair in zip(found, expected, strict=True))
    if isinstance(expected, dict) and isinstance(found, dict):
        named = {str(key) if type(key) is int else key: value for key, value in found.items()}
        alike = len(named) == len(found) and named.keys() == expected.keys()
        return alike and all(_same(named[key], value, tolerance) for key, value in expected.items())
    if tolerance and {type(found), type(expected)} in ({float}, {float, int}):
        with contextlib.suppress(OverflowError):
            return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    return found == expected


def _lines(text: str, tolerance: float) -> list:
    """The lines of an output; with a tolerance, the words of each, as numbers where they are."""
    lines = [line.rstrip() for line in text.rstrip().split("\n")]
    return [[_number(word) for word in line.split()] for line in lines] if tolerance else lines


def _number(word: str) -> int | float | str:
    return int(word) if INTEGER.fullmatch(word) else float(word) if FLOAT.fullmatch(word) else word
