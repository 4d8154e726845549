"""The judge of programs, meant for a worker process.

The program runs in a sandbox, and knows nothing but the arguments it is called with. The tests run here, on plain data
that came out of it as text (`plain`): the data set's own code is trusted, down to its `check(candidate)`, where
`candidate` passes calls on; the completion never runs here.

What is whose fault: from the moment the sandbox has the program, all is the program's. It is wrong (0.0) when it
cannot be compiled, ends, crashes, is killed for the time, memory or output it takes, or answers what is not plain data;
for all that, it could bring about itself. When the sandbox does not start, SandboxError makes a worker report a crash,
and the sample is unscorable (NaN); so does a data set whose own code cannot be run, or which never calls the candidate.

An exception that the program raises is raised again for the tests, which may expect it. None of them can be swallowed
but by an `except` (or `pytest.raises`, or `suppress`) that the data set wrote: what Python's own loops swallow unasked,
StopIteration, comes as a CandidateError, so a test that expects just that cannot be passed; and what is no Exception
(SystemExit, KeyboardInterrupt, GeneratorExit) is the end of the program, whatever the test expects.

What a function did to its arguments is done to those of the tests only where it returned None, as functions that work
in place do: else one that empties a list and returns [] would pass `candidate(x) == sorted(x)`.

What tests do with a hostile answer (10**12, where they raise 2 to it) takes time and memory here: from the first answer
on, that is the program's failure too. Out of time (SPARE_S beyond the program's own limit) a worker ends by its
`fuse`, and the verdict is 0.0; without a worker there is no such limit.
"""

import builtins
import contextlib
import random

from . import fuse
from .code import read_tests, sources, with_body
from .sandbox import Limits, Program, ProgramError

MAX_CALLS = 100_000
SPARE_S = 2.0  # for the tests' own work, beyond the program's time


# What `for`, `all`, `zip` and the like take for the end of an iterator: from a map over the candidate, it would end it.
CONTROL_FLOW = (StopIteration, StopAsyncIteration)


class CandidateError(Exception):
    """An exception of the program that Python has no name for, or that would be taken for the end of a loop."""


def judge(reference: str, code: str, fenced: bool, sandbox: str, timeout_s: float, memory_mb: int) -> float:
    """1.0 when the code passes every test of the reference, else 0.0.

    Raises:
        SandboxError: it could not be run at all.
        Exception: whatever the data set's own code raises before it calls the program.
    """
    tests, limits = read_tests(reference), Limits(seconds=timeout_s, memory_bytes=memory_mb * 2**20)
    try:
        if "stdio" in tests:
            return float(all(_prints(case, code, sandbox, limits) for case in tests["stdio"]))
        # The tests are read before the program starts, so that what is wrong with them is not its failure.
        check = _returns(tests["cases"]) if "cases" in tests else _defined_check(tests)
        with Program(sandbox, sources(tests, code, fenced), tests["entry_point"], limits) as program:
            return float(_passes(check, Candidate(program)))
    except ProgramError:
        return 0.0
    finally:
        fuse.put_out()


judge.out_of_memory_is_zero = True


class Candidate:
    """The function under test, as the tests see it."""

    def __init__(self, program: Program):
        self.program, self.calls = program, 0
        self.failure: ProgramError | None = None
        self.broken: Exception | None = None

    def __call__(self, *arguments: object, **keywords: object) -> object:
        self.calls += 1
        try:
            if self.failure is not None or self.calls > MAX_CALLS:
                raise ProgramError("it has failed before, or was called too often")
            kind, *answer = self.program.ask(*arguments, **keywords)
            if self.calls == 1:
                fuse.light(self.program.seconds_left + SPARE_S)
        except ProgramError as failure:
            self.failure = failure  # even where a test expects exceptions
            raise
        except (TypeError, ValueError) as broken:
            self.broken = broken
            raise
        if kind == "value":
            if len(answer) == 3:
                _refilled(arguments, answer[1])
                _refilled(keywords, answer[2])
            return answer[0]
        error = _exception(*answer)
        if error is None:
            self.failure = ProgramError(f"it raised {answer[0]!r:.200}, which is no Exception")
            raise self.failure
        raise error


def _refilled(old: object, new: object) -> object:
    """The caller's own container, made what has become of it, where its type is still the same; else the new value."""
    if isinstance(old, list) and type(new) is list:
        old[:] = [*map(_refilled, old, new), *new[len(old) :]]
    elif isinstance(old, dict) and type(new) is dict:
        items = {key: _refilled(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set) and type(new) is set:
        old.clear()
        old.update(new)
    elif isinstance(old, tuple) and type(new) is tuple:
        return (*map(_refilled, old, new), *new[len(old) :])
    else:
        return new
    return old


def _exception(names: list[str], message: str) -> Exception | None:
    """The first of a class and its bases, by name, that Python has too; None where it is no Exception."""
    if "Exception" not in names:
        return None
    for name in names:
        raised = getattr(builtins, name, None)
        if isinstance(raised, type) and issubclass(raised, Exception):
            if issubclass(raised, CONTROL_FLOW):
                break
            with contextlib.suppress(TypeError):  # of those that need more arguments
                return raised.__new__(raised, message)
    return CandidateError(message)


def _passes(check, candidate: Candidate) -> bool:
    random.seed(0)  # tests that draw their arguments draw the same ones each time
    try:
        check(candidate)
    except Exception:
        if not candidate.calls:
            raise
        if candidate.broken is None:
            return False
    if candidate.broken is not None:
        raise ValueError("a test calls the candidate with what is not plain data") from candidate.broken
    if not candidate.calls:
        raise ValueError("the tests never call the candidate")
    return candidate.failure is None and candidate.program.seconds_left >= 0


def _defined_check(tests: dict):
    """The data set's `check`, beside what its prompt defines; the function under test is `candidate` everywhere."""
    namespace: dict = {"__name__": "tests"}
    for name in ("prompt", "test"):
        exec(compile(with_body(tests["prompt"]) if name == "prompt" else tests["test"], f"<{name}>", "exec"), namespace)
    check = namespace["check"]

    def run(candidate: Candidate) -> None:
        namespace[tests["entry_point"]] = candidate
        check(candidate)

    return run


def _returns(cases: list[dict]):
    def check(candidate: Candidate) -> None:
        for case in cases:
            assert _as_json(candidate(*case["args"])) == case["expected"]

    return check


def _as_json(value):
    """JSON has one kind of sequence, so a tuple may answer a list, and of keys: an int may answer its digits."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        renamed = {str(key) if type(key) is int else key: _as_json(item) for key, item in value.items()}
        return renamed if len(renamed) == len(value) else value
    return value


def _prints(case: dict, code: str, sandbox: str, limits: Limits) -> bool:
    with Program(sandbox, [code], None, limits) as program:
        printed, status = program.run(case["input"].encode())
    return status == 0 and _lines(printed.decode(errors="replace")) == _lines(case["output"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
