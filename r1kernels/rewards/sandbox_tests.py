"""Runs a data set's own `check(candidate)` in a sandbox beside the program's.

`candidate` passes its calls on: the parent relays each to the program and its answer back. All that reaches this
process from the program is plain data, so the verdict, which is sent from here, cannot be forged there.

An exception of the program is raised again here, where the tests may expect it. What Python's own loops take for the
end of an iterator comes as a CandidateError; what is not an Exception (SystemExit) is the end of the program.
A function that returned None may have changed its arguments: the tests' own then change alike.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import random
import sys
import types
from collections.abc import Callable, Sequence

import plain

CONTROL_FLOW = (StopIteration, StopAsyncIteration)


class CandidateError(Exception):
    """An exception of the program that Python has no name for, or that would be taken for the end of a loop."""


def run(sources: Sequence[str], entry_point: str, receive: Callable[[], bytes], send: Callable[[bytes], None]) -> None:
    """Sends calls (`c` and the arguments) and at last a verdict: `passed`, `failed` or `u` and why tests are unusable."""
    calls = 0

    def end(verdict: str, reason: object = "") -> None:
        send(verdict.encode() if verdict != "u" else f"u{reason!r:.300}".encode(errors="replace"))
        os._exit(0)

    def candidate(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        try:
            request = plain.write((arguments, keywords))
        except TypeError as error:
            end("u", error)
        except ValueError as error:  # such as an endless iterator of the program
            end("failed" if calls else "u", error)
        calls += 1
        send(b"c" + request)
        try:
            kind, *answer = plain.read_answer(receive())
        except ValueError as error:
            end("failed", error)
        if kind == "value":
            if len(answer) == 3:
                refill(arguments, answer[1])
                refill(keywords, answer[2])
            return answer[0]
        raise exception(*answer) or end("failed", answer[0])

    send(b"loaded")
    try:
        namespace: dict = {"__name__": "tests"}
        sys.modules["pytest"] = types.SimpleNamespace(raises=raises)
        for source in sources:
            exec(compile(source, "<tests>", "exec"), namespace)
        namespace[entry_point] = candidate
        random.seed(0)  # tests that draw their arguments draw the same ones each time
        namespace["check"](candidate)
    except BaseException as error:
        end("failed" if calls else "u", error)
    end("passed" if calls else "u", "the tests never call the candidate")


def refill(old: object, new: object) -> object:
    """Gives the tests' own containers their new contents, where the types are the same; returns the value to use."""
    if isinstance(old, list) and type(new) is list:
        old[:] = [*map(refill, old, new), *new[len(old) :]]
    elif isinstance(old, dict) and type(new) is dict:
        items = {key: refill(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set) and type(new) is set:
        old.clear()
        old.update(new)
    elif isinstance(old, tuple) and type(new) is tuple:
        return (*map(refill, old, new), *new[len(old) :])
    else:
        return new
    return old


def exception(names: list[str], message: str) -> Exception | None:
    """Finds the first of a class and its bases that Python has too, by name; None for one that is no Exception."""
    if "Exception" not in names:
        return None
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            if issubclass(kind, CONTROL_FLOW):
                break
            with contextlib.suppress(TypeError):  # of those that need more arguments
                return kind.__new__(kind, message)
    return CandidateError(message)


def raises(expected: type | tuple, *call: Callable, match: str | None = None, **keywords: object) -> object:
    """Stands for `pytest.raises`: pytest itself need not be installed."""
    import unittest

    case = unittest.TestCase()
    if match is None:
        return case.assertRaises(expected, *call, **keywords)
    return case.assertRaisesRegex(expected, match, *call, **keywords)
