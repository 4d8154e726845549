"""Runs inside the sandbox, where it executes a program or the tests of a problem.

`sandbox.Program` starts this file by its path. Messages travel on stdin and stdout: eight bytes of length, then as many
bytes. The first is the job. The answer "ready" says that the process is locked in and has executed nothing of the job;
whatever fails before is the sandbox's failure, told on stderr.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this directory comes last: its modules must not hide Python's own

import builtins
import contextlib
import copy
import itertools
import json
import math
import os
import re
import types
from collections.abc import Callable
from typing import BinaryIO

import lockdown
import plain

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def main() -> None:
    kind, packages, settings = sys.argv[1:]
    sys.argv[:] = [""]
    sys.path[-1:] = filter(None, packages.split(":"))  # in the place of this directory
    builtins.exit = builtins.quit = sys.exit  # as `site` would define them
    lockdown.lock_in(kind == "bubblewrap", **json.loads(settings))
    job = json.loads(receive(sys.stdin.buffer))
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    send(target, b"ready")
    whole, null = job.get("entry_point") == "", os.open("/dev/null", os.O_RDWR)
    for file in (2,) if whole else (0, 1, 2):
        os.dup2(null, file)
    os.close(null)
    if whole:  # it reads its stdin and prints
        source.close()
        target.close()
        run("__main__", job["sources"])
    elif "tests" in job:
        judge(job["tests"], source, target)
    else:
        answer(job["sources"], job["entry_point"], source, target)


def receive(source: BinaryIO) -> bytes:
    """The next message; an empty one at the end."""
    return source.read(int.from_bytes(source.read(8), "big"))


def send(target: BinaryIO, message: bytes) -> None:
    target.write(len(message).to_bytes(8, "big") + message)
    target.flush()


def run(name: str, sources: list[str]) -> dict:
    """Runs texts one after another as one module of this name."""
    module = sys.modules[name] = types.ModuleType(name)
    for source in sources:
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def answer(sources: list[str], entry_point: str, source: BinaryIO, target: BinaryIO) -> None:
    """Calls the program's function with the arguments of each message and sends its result or exception."""
    owner, _, method = entry_point.partition(".")
    function = run("candidate", sources)[owner]
    while request := receive(source):
        arguments, keywords = plain.read(request)
        try:
            result = (getattr(function(), method) if method else function)(*arguments, **keywords)
            # A function that returns None may have changed its arguments, as functions do that work in place.
            reply = plain.write(["value", result, [*arguments, *keywords.values()] if result is None else []])
        except BaseException as error:
            reply = plain.write(["raise", [kind.__name__ for kind in type(error).__mro__], str(error)[:1000]])
        send(target, reply)


def judge(tests: dict, source: BinaryIO, target: BinaryIO) -> None:
    """Runs tests. Sends `c` and the arguments of each call; at last `passed`, `failed`, or `u` and what is unusable.

    `candidate` passes its calls on: the parent relays each to the program and brings its answer. All that comes from
    the program is plain data, so the verdict cannot be forged. An exception of the program is raised again, where tests
    may expect it; one that is no Exception (SystemExit) ends the tests.
    """
    import random

    calls = 0

    def end(passed: bool, reason: object = "the tests never call the candidate") -> None:
        verdict = ("passed" if passed else "failed") if calls else f"u{reason!r:.300}"
        send(target, verdict.encode(errors="replace"))
        os._exit(0)

    def candidate(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        try:
            request = plain.write([list(arguments), keywords])
        except TypeError as error:
            calls = 0  # the tests' own fault
            end(False, error)
        calls += 1
        send(target, b"c" + request)
        try:
            kind, first, second = plain.read(receive(source))
            if kind == "value":
                for old, new in zip([*arguments, *keywords.values()], second, strict=False):
                    refill(old, new)
                return first
            error = exception(first, second)
        except BaseException:  # no honest program's answer
            end(False)
        raise error

    receive(source)
    try:
        sys.modules["pytest"] = types.SimpleNamespace(raises=raises)
        namespace = run("tests", tests["sources"])
        random.seed(0)  # tests that draw their arguments draw the same ones each time
        if tests["form"] == "test":
            namespace[tests["entry_point"]] = candidate
            namespace["check"](candidate)
        else:
            check_cases(tests, candidate, namespace["check"] if tests["sources"] else None)
    except BaseException as error:
        end(False, error)
    end(True)


def check_cases(tests: dict, candidate: Callable, checker: Callable | None) -> None:
    """Compares outputs with the expected ones, or asks the problem's checker about them."""
    whole, tolerance = tests["form"] == "stdio", tests["tolerance"]
    for case in tests[tests["form"]]:
        given = case["input"] if whole else case["args"]
        output = candidate(given) if whole else candidate(*copy.deepcopy(given))
        if checker:
            assert checker(given, output)
        elif whole:
            assert same(words(output, tolerance), words(case["output"], tolerance), tolerance)
        else:  # as JSON knows it: a tuple may answer a list, and an int key its digits
            assert same(json.loads(json.dumps(output)), case["expected"], tolerance)


def same(found: object, expected: object, tolerance: float) -> bool:
    """Equality, but that a float may differ by the tolerance."""
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        return all(map(same, found, expected, itertools.repeat(tolerance)))
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return all(same(found[key], expected[key], tolerance) for key in expected)
    if {type(found), type(expected)} in ({float}, {float, int}):
        with contextlib.suppress(OverflowError):
            return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    return found == expected


def words(text: str, tolerance: float) -> list:
    """The lines of an output; with a tolerance, the words of each, as numbers where they are."""
    lines = [line.rstrip() for line in text.rstrip().split("\n")]
    return [[number(word) for word in line.split()] for line in lines] if tolerance else lines


def number(word: str) -> int | float | str:
    if not NUMBER.fullmatch(word):
        return word
    return float(word) if set(word) & set(".eE") else int(word)


def refill(old: object, new: object) -> None:
    """Gives the tests' own container the contents that a function which works in place has left."""
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


def exception(names: list[str], message: str) -> Exception:
    """Makes the first of a class and its bases that Python has too, by name; raises ValueError if it is no Exception."""
    for kind in [getattr(builtins, name, None) for name in names]:
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration | StopAsyncIteration):
            with contextlib.suppress(TypeError):  # of those that need more arguments
                return kind.__new__(kind, message)
    raise ValueError("the program ended itself")


def raises(expected: type | tuple, *call: Callable, match: str = "", **keywords: object) -> object:
    """Stands for `pytest.raises`, since pytest need not be installed."""
    import unittest

    return unittest.TestCase().assertRaisesRegex(expected, match, *call, **keywords)


main()
