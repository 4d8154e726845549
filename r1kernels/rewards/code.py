"""Whether the program in a completion passes the tests of its problem; docs/programs.md describes both.

`settle` is cheap and runs in the caller's process. `judge` starts sandboxes and is meant for a worker process. Nothing of
a completion and none of a data set's code is executed in either: results leave the sandbox as plain data and are
compared here; a data set's `check(candidate)` and `checker` run in a sandbox beside the program's.

A program that cannot be compiled, ends, crashes, runs out of time or memory, or answers what is not plain data is wrong
(0.0). Tests that cannot be run raise an error, as does a sandbox that does not start: neither is the program's fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re

from markdown_it import MarkdownIt

from .sandbox import START_LIMIT_S, Limits, Program, ProgramError, Sandbox, frame
from .text import ANSWER, ANSWER_END, after_thinking

MAX_TEXT = 200_000  # characters of an answer
SPARE_S = 2.0  # for the tests' own work, beyond the program's time
TEST_BYTES = 2**26  # of the arguments of one call by the tests

PYTHON = ("python", "python3", "py")
ENTRY_POINT = re.compile(r"[A-Za-z_]\w*((\(\))?\.[A-Za-z_]\w*)?")
INTEGER, FLOAT = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
UNINDENTED = re.compile(r"^\w", re.MULTILINE)
# What LeetCode imports before a `class Solution`.
PRELUDE = "".join(
    f"import {name}\nfrom {name} import *\n"
    for name in ("bisect", "collections", "functools", "heapq", "itertools", "typing")
) + "import math, random, re, string\nfrom math import ceil, comb, floor, gcd, inf, sqrt\n"
GIVEN = {"stdio": ("input", str, "output"), "cases": ("args", list, "expected")}
NEEDED = {"stdio": (), "cases": ("entry_point",), "test": ("prompt", "test", "entry_point")}


def read_tests(reference: str) -> dict:
    """Reads the tests of a problem.

    Raises:
        ValueError: they have another form than docs/programs.md lists; the message says what was expected.
    """
    tests = json.loads(reference)
    if not isinstance(tests, dict):
        raise ValueError(f"tests must be a JSON object, got {type(tests).__name__}")
    form = next((form for form in GIVEN if form in tests), "test")
    if form != "test":
        given, kind, wanted = GIVEN[form]
        needed = {given} if "checker" in tests else {given, wanted}
        cases = tests[form]
        if not isinstance(cases, list) or not all(isinstance(case, dict) and needed <= case.keys() for case in cases):
            raise ValueError(f"{form!r} must be a list of objects with {' and '.join(sorted(needed))}")
        if not cases:
            raise ValueError(f"{form!r} must hold at least one test")
        if not all(isinstance(case[key], kind) for case in cases for key in (needed if kind is str else {given})):
            raise ValueError(f"{given!r} of {form!r} must be a {kind.__name__}")
    for key in NEEDED[form] + (("checker",) if "checker" in tests else ()):
        if not isinstance(tests.get(key), str):
            raise ValueError(f"{key!r} of a program's tests must be a string, got {tests.get(key)!r:.80}")
    if not ENTRY_POINT.fullmatch(tests.get("entry_point", "main")):
        raise ValueError(f"'entry_point' must be a function or Class.method, got {tests['entry_point']!r}")
    tolerance = tests.get("tolerance", 0)
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
        raise ValueError(f"'tolerance' must be a number from 0 to below 1, got {tolerance!r:.80}")
    return tests | {"entry_point": tests.get("entry_point", "").replace("()", ""), "tolerance": tolerance, "form": form}


def settle(prompt: str, completion: str, reference: str) -> float | None | tuple[str, str]:
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
    runs = len(read_tests(reference).get("stdio", "."))
    return runs * (2 * timeout_s + SPARE_S) + 3 * START_LIMIT_S


def judge(reference: str, text: str, sandbox: Sandbox, timeout_s: float = 5.0) -> float:
    """1.0 if the program in an answer passes every test, else 0.0.

    Raises:
        SandboxError: it could not be run.
        ValueError: the tests could not be run.
    """
    tests = read_tests(reference)
    code, fenced = find_code(text, tests["entry_point"])
    limits = Limits(seconds=timeout_s, memory_bytes=sandbox.memory_bytes)
    texts = [code] if tests["form"] == "stdio" else sources(tests, code, fenced)
    with Program(sandbox, texts, tests["entry_point"], limits) as program:
        try:
            if tests["form"] == "test":
                return float(_passes(tests, program, sandbox, limits))
            return float(_answers(tests, program, sandbox, limits))
        except ProgramError:
            return 0.0


def find_code(text: str, entry_point: str) -> tuple[str, bool]:
    """The code of an answer, and whether it was in a fenced block; "" if no block is Python."""
    blocks = []
    if "```" in text or "~~~" in text:
        markdown = MarkdownIt("zero").enable(["blockquote", "code", "fence", "heading", "hr", "list"])
        blocks = [
            ((token.info.split() or [""])[0].lower(), token.content)
            for token in markdown.parse(text)
            if token.type == "fence"
        ]
    if not blocks:
        return text, False
    marked = [code for language, code in blocks if language in PYTHON]
    usable = [code for language, code in blocks if language in (*PYTHON, "")]
    defining = [code for code in usable if entry_point and defines(code, entry_point)]
    return (defining or marked or usable or [""])[-1], True


def defines(code: str, entry_point: str) -> bool:
    """Whether a line of code, not indented, defines the entry point or its class."""
    name = re.escape(entry_point.partition(".")[0])
    return re.search(rf"^(((async\s+)?def|class)\s+{name}\b|{name}\s*[:=](?!=))", code, re.MULTILINE) is not None


def sources(tests: dict, code: str, fenced: bool) -> list[str]:
    """The texts to run one after another in one module, so that it then has the entry point."""
    prompt, entry_point = tests.get("prompt", ""), tests["entry_point"]
    if not prompt or defines(code, entry_point):
        return [PRELUDE if "." in entry_point else "", with_body(prompt), code]
    if not fenced:
        end = UNINDENTED.search(code)
        code = code[: end.start()] if end else code
    return [prompt + code]


def with_body(prompt: str) -> str:
    """A prompt that can be run as it is: a function that has only comments is given a body."""
    try:
        compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return prompt.rstrip() + "\n    pass\n"
    return prompt


def _answers(tests: dict, program: Program, sandbox: Sandbox, limits: Limits) -> bool:
    """Whether the program answers each case, by its output or by the problem's checker."""
    given, _, wanted = GIVEN[tests["form"]]
    with contextlib.ExitStack() as stack:
        if "checker" in tests:
            checker = stack.enter_context(Program(sandbox, [tests["checker"]], "check", limits))
            try:
                checker.load()
            except ProgramError as error:
                raise ValueError(f"the checker of a program's tests cannot be loaded: {error}") from error
        for case in tests[tests["form"]]:
            if tests["form"] == "stdio":
                output, status = program.run(case[given])
                if status != 0:
                    return False
            else:
                kind, output, *_ = program.ask(*case[given])
                if kind == "raise":
                    return False
            if "checker" in tests:
                try:
                    verdict, right, *_ = checker.ask(case[given], output)
                except ValueError:  # an endless iterator, which no checker can read
                    return False
                if verdict == "raise" or not right:
                    return False
            elif tests["form"] == "stdio":
                if not _same(*(_lines(text, tests["tolerance"]) for text in (output, case[wanted])), tests["tolerance"]):
                    return False
            elif not _same(output, case[wanted], tests["tolerance"]):
                return False
    return True


def _passes(tests: dict, program: Program, sandbox: Sandbox, limits: Limits) -> bool:
    """Whether the data set's `check(candidate)` passes: relays its calls to the program."""
    own = dataclasses.replace(limits, seconds=limits.seconds + SPARE_S, output_bytes=TEST_BYTES)
    texts, called = [with_body(tests["prompt"]), tests["test"]], False
    with Program(sandbox, texts, tests["entry_point"], own, tests=True) as checks:
        try:
            checks.load()
            message = checks.relay(b"")
            while message[:1] == b"c":
                called = True
                message = checks.relay(frame(program.call(message[1:])))
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
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return False
        return all(_same(one, other, tolerance) for one, other in zip(found, expected, strict=True))
    if isinstance(expected, dict) and isinstance(found, dict):
        named = {str(key) if type(key) is int else key: value for key, value in found.items()}
        if len(named) != len(found) or named.keys() != expected.keys():
            return False
        return all(_same(named[key], value, tolerance) for key, value in expected.items())
    kinds = {type(found), type(expected)}
    if tolerance and float in kinds and kinds <= {int, float}:
        with contextlib.suppress(OverflowError):
            return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    return found == expected


def _lines(text: str, tolerance: float) -> list:
    """The lines of an output; with a tolerance, the words of each, as numbers where they are."""
    lines = [line.rstrip() for line in text.rstrip().split("\n")]
    return [[_number(word) for word in line.split()] for line in lines] if tolerance else lines


def _number(word: str) -> int | float | str:
    if len(word) > 100:
        return word
    return int(word) if INTEGER.fullmatch(word) else float(word) if FLOAT.fullmatch(word) else word
