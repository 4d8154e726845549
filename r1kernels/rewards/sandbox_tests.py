"""Runs a data set's `check(candidate)` in a sandbox beside the program's; `sandbox_child` starts it there.

`candidate` passes its calls on: the parent relays each to the program and brings its answer. All that reaches this
process from the program is plain data, so the verdict cannot be forged. An exception of the program is raised again,
where the tests may expect it; one that is no Exception (SystemExit) ends the program. A function that returned None may
have changed its arguments: the tests' own then change alike.
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


class CandidateError(Exception):
    """An exception of the program that Python has no name for, or that would be taken for the end of a loop."""


def run(sources: Sequence[str], entry_point: str, receive: Callable[[], bytes], send: Callable[[bytes], None]) -> None:
    """Sends `c` and the arguments of each call; at last `passed`, `failed`, or `u` and why the tests are unusable."""
    calls = 0

    def end(passed: bool, reason: object = "") -> None:
        verdict = ("passed" if passed else "failed") if calls else f"u{reason!r:.300}"
        send(verdict.encode(errors="replace"))
        os._exit(0)

    def candidate(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        try:
            request = plain.write((arguments, keywords))
        except TypeError as error:
            calls = 0  # the tests' own fault
            end(False, error)
        except ValueError as error:  # such as an endless iterator of the program
            end(False, error)
        calls += 1
        send(b"c" + request)
        try:
            kind, *answer = plain.read_answer(receive())
        except ValueError:
            end(False)
        if kind == "raise":
            raise exception(*answer) or end(False)
        if len(answer) == 3:
            refill(arguments, answer[1])
            refill(keywords, answer[2])
        return answer[0]

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
        end(False, error)
    end(True, "the tests never call the candidate")


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
    """Makes the first of a class and its bases that Python has too, by name; None if it is no Exception."""
    if "Exception" not in names:
        return None
    kinds = [kind for name in names if isinstance(kind := getattr(builtins, name, None), type)]
    for kind in kinds:
        if issubclass(kind, Exception) and not issubclass(kind, StopIteration | StopAsyncIteration):
            with contextlib.suppress(TypeError):  # of those that need more arguments
                return kind.__new__(kind, message) if kind is not Exception else CandidateError(message)
    return CandidateError(message)


def raises(expected: type | tuple, *call: Callable, match: str = "", **keywords: object) -> object:
    """Stands for `pytest.raises`, since pytest need not be installed."""
    import unittest

    return unittest.TestCase().assertRaisesRegex(expected, match, *call, **keywords)
