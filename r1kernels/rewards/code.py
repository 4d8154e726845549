"""Whether the program in a completion passes the tests of its problem; docs/programs.md describes both.

`judge` starts a sandbox for the program and one for the tests, and passes calls and answers between them as bytes: the
caller's process executes nothing of a completion or a data set and reads no value of a program. Any number of threads
may call it. It waits only with deadlines.

A program is wrong (0.0) if it cannot be compiled, ends, crashes, takes too much time or memory, or returns anything but
plain data. Tests that cannot be run, and a sandbox that does not start, are not its fault and raise an error.
"""

import contextlib
import functools
import json
import re
import threading
from collections.abc import Mapping
from typing import Any

from .sandbox import Program, ProgramError, check
from .text import ANSWER, ANSWER_END, after_thinking

MAX_TEXT = 200_000  # characters of an answer
SPARE_S = 2.0  # seconds for the tests' own work, in addition to the program's time
TEST_BYTES = 2**26  # largest size of the arguments of one call by the tests
FORMS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "stdio": ({"stdio": list}, {"input": str, "output": str}),
    "cases": ({"cases": list, "entry_point": str}, {"args": list, "expected": object}),
    "test": ({"prompt": str, "test": str, "entry_point": str}, {}),
}  # the keys of the tests and of each case, and the types of their values
ENTRY_POINT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)?")
PRELUDE = "import math, random, re, string\nfrom math import ceil, comb, floor, gcd, inf, sqrt\n" + "".join(
    f"import {name}\nfrom {name} import *\n"
    for name in ("bisect", "collections", "functools", "heapq", "itertools", "typing")
)  # what LeetCode imports before a `class Solution`


def read_tests(reference: str) -> dict[str, Any]:
    """Reads the tests of a problem. Raises ValueError if they do not have a form of docs/programs.md."""
    try:
        tests = json.loads(reference)
    except RecursionError:
        raise ValueError("tests of a program are nested too deeply, expected the form of docs/programs.md") from None
    form = next((form for form in FORMS if isinstance(tests, dict) and form in tests), "test")
    keys, of_case = FORMS[form]
    if of_case and "checker" in tests:
        keys, of_case = keys | {"checker": str}, {"input": str} if form == "stdio" else {"args": list}
    _expect(keys, tests, "tests of a program")
    unknown = tests.keys() - keys.keys() - {"tolerance", "checker", "task_id", "canonical_solution"}
    if unknown:
        raise ValueError(f"tests of a program have the unknown key {min(unknown)!r}, expected {', '.join(keys)}")
    for case in (tests[form] or [None]) if of_case else []:
        _expect(of_case, case, f"each of {form!r}")
    entry_point = tests["entry_point"].replace("()", "") if "entry_point" in keys else ""
    if "entry_point" in keys and not ENTRY_POINT.fullmatch(entry_point):
        raise ValueError(f"'entry_point' must be a function or Class.method, got {entry_point!r}")
    tolerance = tests.get("tolerance", 0)
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
        raise ValueError(f"'tolerance' must be a number from 0 to below 1, got {tolerance!r:.80}")
    texts = [_runnable(tests["prompt"])] if form == "test" else []
    texts += [tests[key] for key in ("test", "checker") if key in keys]
    return tests | {"form": form, "entry_point": entry_point, "tolerance": tolerance, "sources": texts}


def _expect(kinds: Mapping[str, type], found: object, what: str) -> None:
    for key, kind in kinds.items():
        if not isinstance(found, dict) or key not in found or not isinstance(found[key], kind):
            raise ValueError(f"{what} must be an object with {key!r} ({kind.__name__}), got {found!r:.80}")


def _runnable(prompt: str) -> str:
    """The text of a prompt, with a body if it is only a signature, so that it can run by itself."""
    return prompt + " pass" if prompt.rstrip().endswith(":") else prompt


def judge(prompt: str, completion: str, reference: str, *, timeout_s: float = 5.0, memory_mb: int = 512,
          imports: tuple[str, ...] = (), stopped: threading.Event | None = None) -> float | None:  # fmt: skip
    """1.0 if the program in a completion passes every test, else 0.0; None if the tests cannot be read.

    Raises SandboxError if a sandbox does not start, ValueError if the tests cannot be run (its cause is a TimeoutError
    if they take too long), and CancelledError soon after `stopped` is set.
    """
    try:
        tests = read_tests(reference)
    except (ValueError, RecursionError):
        return None
    entry_point = tests["entry_point"]
    code, fenced = find_code(prompt, completion, entry_point)
    if not code.strip():
        return 0.0
    command = check(memory_mb, imports)
    start = functools.partial(Program, command, memory_bytes=memory_mb * 2**20, stopped=stopped)
    job = {"sources": sources(tests, code, fenced), "entry_point": entry_point}
    calls = 0
    with (
        start({"tests": tests}, timeout_s + SPARE_S, output_bytes=TEST_BYTES) as checks,
        start(job, timeout_s) if entry_point else contextlib.nullcontext() as program,
    ):
        try:
            message = checks.ask(b"")
            while message[:1] == b"c":
                calls += 1
                if program:
                    answer = program.ask(message[1:])
                else:
                    with start(job, timeout_s) as whole:  # each input runs in a new process
                        output = whole.ask(json.loads(message[1:])[0][0].encode(errors="replace"))
                    answer = json.dumps(["value", output.decode(errors="replace"), []]).encode()
                message = checks.ask(answer)
        except (ProgramError, TimeoutError) as error:
            if calls:  # if hostile answers break the tests, that is the program's failure too
                return 0.0
            raise ValueError(f"the tests of a program do not run: {error}") from error
    if message[:1] == b"u":
        raise ValueError(f"the tests of a program cannot be used: {message[1:].decode(errors='replace')}")
    return float(message == b"passed")


def find_code(prompt: str, completion: str, entry_point: str) -> tuple[str, bool]:
    """The code in a completion, and whether it was in a fenced block; "" if there is none."""
    from markdown_it import MarkdownIt

    text = after_thinking(prompt, completion) or ""
    if ANSWER in text:
        text = text.rpartition(ANSWER)[2].partition(ANSWER_END)[0]
    if len(text) > MAX_TEXT:
        return "", False
    markdown = MarkdownIt("zero").enable(["blockquote", "code", "fence", "heading", "hr", "list"])
    tokens = markdown.parse(text) if "```" in text or "~~~" in text else []
    blocks = [((token.info.split() or [""])[0].lower(), token.content) for token in tokens if token.type == "fence"]
    if not blocks:
        return text, False
    python = [code for language, code in blocks if language in ("python", "python3", "py")]
    usable = [code for language, code in blocks if language in ("python", "python3", "py", "")]
    defining = [code for code in usable if entry_point and defines(code, entry_point)]
    return (defining or python or usable or [""])[-1], True


def defines(code: str, entry_point: str) -> bool:
    """Whether a line of code that is not indented defines the entry point or its class."""
    name = re.escape(entry_point.partition(".")[0])
    return re.search(rf"^(((async\s+)?def|class)\s+{name}\b|{name}\s*[:=](?!=))", code, re.MULTILINE) is not None


def sources(tests: dict[str, Any], code: str, fenced: bool) -> list[str]:
    """The texts to run one after another in one module, which then has the entry point."""
    prompt, entry_point = tests.get("prompt", ""), tests["entry_point"]
    if not prompt or defines(code, entry_point):
        return [PRELUDE if "." in entry_point else "", _runnable(prompt), code]
    if not fenced:  # the body of a function, and then the model's text
        code = re.split(r"^(?=\w)", code, maxsplit=1, flags=re.MULTILINE)[0]
    return [prompt + code]
