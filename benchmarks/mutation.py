"""Mutation score: how many deliberate mistakes in formulas the tests find.

    python benchmarks/mutation.py [--only TEXT] [--part I/N] [--copy FOLDER] [--out FILE]

Each mutant of `mutants.MUTANTS` is one replaced line in a copy of the tree. Its tests run until one fails. That test
then runs without the mutant: if it passes, the mutant is killed, and if not, the script stops with an error. A mutant
that no test notices survives. One whose tests do not end in time is neither, and the score leaves it out.

Each result is added to benchmarks/results/mutation.json, with its date and the hash of all sources. It holds until the
mutant, the mutated file or the function of the test that noticed it changes. A mutant that was killed is not run again
while its result holds; one that was not killed is. So parts of the list can run at the same time, each with another
folder for its copy. The exit status is 0 if all mutants that were chosen are killed. The CPU kernels are built without
the wider instruction sets, which share their source.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mutants

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutation"
OUT = ROOT / "benchmarks" / "results" / "mutation.json"
LIMIT_S = 300  # of one run of tests
BACKENDS = {"cpu": {}, "triton": {"TRITON_INTERPRET": "1", "R1KERNELS_BACKEND": "triton"}, "train": {}}
PRELOADED = {"cpu": ("hypothesis", "torch"), "triton": ("hypothesis", "torch", "triton"),
             "train": ("hypothesis", "torch", "transformers.models.llama.modeling_llama")}
OUT_OF_TIME = "out of time"
ABOUT = ("date", "device", "instruction_set", "r1kernels", "torch", "sources")  # of the last run


def copy_tree() -> None:
    """The tracked files and new ones, as they are in the working tree. Objects of an earlier run are kept."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard", "--", "r1kernels", "csrc", "tests", "benchmarks/*.py",
         "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "examples"], cwd=ROOT, text=True)
    for folder in ("r1kernels", "csrc", "tests"):
        shutil.rmtree(COPY / folder, ignore_errors=True)
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, COPY / name)


@contextlib.contextmanager
def locked_copy() -> Iterator[None]:
    """Keeps other runs out of the copy. In one folder, two runs would see each other's mutants."""
    COPY.mkdir(parents=True, exist_ok=True)
    with (COPY / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"--copy is {COPY}, which another run uses; give each run another folder") from None
        yield


def build() -> None:
    variables = {**os.environ, "R1KERNELS_CUDA": "0", "R1KERNELS_PORTABLE": "1"}
    completed = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=variables,
                               capture_output=True, text=True)
    if completed.returncode:
        raise RuntimeError(f"the build failed:\n{completed.stderr[-3000:]}")


class Runner:
    """A process that has imported torch, and forks one for every run of tests."""

    def __init__(self, backend: str, preloaded: Sequence[str] | None = None, limit_s: float = LIMIT_S) -> None:
        paths = os.pathsep.join([str(COPY), str(COPY / "benchmarks")])
        variables = {**os.environ, **BACKENDS[backend], "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                     "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
        names = PRELOADED[backend] if preloaded is None else preloaded
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(limit_s), *names]
        self._process = subprocess.Popen(command, cwd=COPY, env=variables, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)
        self._clean: dict[str, int | str] = {}

    def run(self, test: str) -> dict[str, Any]:
        """{"code": the exit status of pytest, minus a signal, or `OUT_OF_TIME`, "failed": the first failure}"""
        self._process.stdin.write(json.dumps(test) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def clean(self, test: str) -> int | str:
        """How a test ends in the copy without a mutant."""
        if test not in self._clean:
            self._clean[test] = self.run(test)["code"]
        return self._clean[test]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class FirstFailure:
    """A plugin of pytest."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def run_in_child(test: str, limit_s: float) -> dict[str, Any]:
    """Forks a process that runs one test or file. It is killed, with those that it started, at the limit."""
    import pytest

    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        log = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # of the last run
        os.dup2(log, 1)
        os.dup2(log, 2)
        found = FirstFailure()
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no",
                   "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = pytest.main([*options, test], plugins=[found])
        os.write(write, json.dumps({"code": int(code), "failed": found.name}).encode())
        os._exit(0)
    os.close(write)
    late = not select.select([read], [], [], limit_s)[0]
    if late:
        os.killpg(child, signal.SIGKILL)
    answer = b"" if late else os.read(read, 65536)  # shorter than what a pipe takes at once
    os.close(read)
    status = os.waitpid(child, 0)[1]
    if late:
        return {"code": OUT_OF_TIME, "failed": ""}
    crashed = {"code": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else 3, "failed": ""}
    return json.loads(answer) if answer else crashed


def serve(limit_s: float, modules: Sequence[str]) -> None:
    for module in ("pytest", *modules):
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(run_in_child(json.loads(line), limit_s)), flush=True)


def status_of(code: int | str) -> str:
    """A crash is noticed, as a failure is; other statuses of pytest say that it could not run the tests."""
    if isinstance(code, str):
        return code
    return "killed" if code == 1 or code < 0 else "survived" if code == 0 else f"pytest ended with {code}"


def judge(runner: Runner, mutant: mutants.Mutant) -> dict[str, Any]:
    """Runs the tests of a mutant. Raises RuntimeError if the one that fails does so without the mutant, too."""
    path, started = COPY / mutant.file, time.monotonic()
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times, expected once")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        if mutant.is_compiled:
            build()
        for test in mutant.tests:
            if (result := runner.run(test))["code"] != 0:
                break
    finally:
        path.write_text(text, encoding="utf-8")
        if mutant.is_compiled:
            build()
    status, by = status_of(result["code"]), result["failed"] or (test if result["code"] != 0 else "")
    clean = runner.clean(by) if status == "killed" else 0
    if clean == OUT_OF_TIME:
        status = OUT_OF_TIME
    elif clean != 0:
        raise RuntimeError(f"{by} fails without a mutant, so it judges none; its output is in {COPY / 'pytest.log'}")
    print(f"{status:11} {time.monotonic() - started:5.0f} s  {mutant.file}: {mutant.what}  {by}", flush=True)
    return {"file": mutant.file, "what": mutant.what, "status": status, "by": by, "of": hash_of(mutant, by, COPY)}


def hash_of(mutant: mutants.Mutant, by: str, tree: Path) -> str:
    """Sixteen digits of the SHA-256 over a mutant, the file that it changes, and the function of the test `by`."""
    formulas, (file, _, test) = tree / mutant.file, by.partition("::")
    if not formulas.is_file() or (by and not (tree / file).is_file()):
        return ""
    text = (tree / file).read_text(encoding="utf-8") if by else ""
    for node in ast.walk(ast.parse(text)) if test else ():
        if isinstance(node, ast.FunctionDef) and node.name == test.partition("[")[0].rpartition("::")[2]:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
            break
    made_of = mutant.old, mutant.new, formulas.read_text(encoding="utf-8"), text
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


def key(item: mutants.Mutant | dict[str, Any]) -> tuple[str, str]:
    return (item["file"], item["what"]) if isinstance(item, dict) else (item.file, item.what)


def recorded(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The results in a file's text that hold: those of mutants that are listed, and of files that have not changed."""
    listed, results = {key(mutant): mutant for mutant in mutants.MUTANTS}, json.loads(text or "{}").get("results", [])
    return {key(r): r for r in results if key(r) in listed and r["of"] == hash_of(listed[key(r)], r["by"], ROOT)}


def counts(results: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many ran to an end, and how these ended; how many did not."""
    number = Counter(r["status"] for r in results)
    killed, survived, late = number.pop("killed", 0), number.pop("survived", 0), number.pop(OUT_OF_TIME, 0)
    return {"run": killed + survived, "killed": killed, "survived": survived, OUT_OF_TIME: late,
            "not judged": sum(number.values())}


def add_result(out: Path, result: dict[str, Any], about: dict[str, Any]) -> None:
    """Adds a result to those that hold."""
    with out.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        dated = result | {"date": about["date"], "sources": about["sources"]}
        results = recorded(file.read()) | {key(result): dated}
        ordered = [results[key(m)] for m in mutants.MUTANTS if key(m) in results]
        record = about | {"listed": len(mutants.MUTANTS)} | counts(ordered) | {"results": ordered}
        file.truncate(0)
        file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def report(out: Path, chosen: Sequence[mutants.Mutant]) -> int:
    """Prints what is recorded of the chosen mutants; 0 if all of them are killed."""
    found = recorded(out.read_text(encoding="utf-8") if out.exists() else "")
    results = [found[key(mutant)] for mutant in chosen if key(mutant) in found]
    number = counts(results)
    rest = "".join(f", {number[name]} {name}" for name in (OUT_OF_TIME, "not judged") if number[name])
    print(f"{number['run']} of {len(chosen)} run, {number['killed']} killed, {number['survived']} survived{rest}")
    for result in results:
        if result["status"] != "killed":
            print(f"  {result['status']}: {result['file']}: {result['what']}")
    return 0 if number["killed"] == len(chosen) else 1


def about_this_run() -> dict[str, Any]:
    import torch  # here, because a process that serves must not have imported what is mutated

    from r1kernels.bench.results import Results

    everything = Results(torch.device("cpu"), "default").about
    return {name: everything[name] for name in ABOUT}


def run_all(waiting: Sequence[mutants.Mutant], out: Path, about: dict[str, Any]) -> None:
    with locked_copy(), contextlib.ExitStack() as runners:
        copy_tree()
        build()
        ready = {name: runners.enter_context(contextlib.closing(Runner(name))) for name in {m.backend for m in waiting}}
        for mutant in waiting:
            add_result(out, judge(ready[mutant.backend], mutant), about)


def main(arguments: Sequence[str] | None = None) -> int:
    global COPY
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="run the mutants whose file or description has this text")
    parser.add_argument("--part", default="0/1", help="run every N-th of them, from the I-th, such as 0/2 and 1/2")
    parser.add_argument("--copy", type=Path, default=COPY, help="the folder of the copy")
    parser.add_argument("--out", type=Path, default=OUT, help="where the result is written")
    given = parser.parse_args(arguments)
    COPY = given.copy.resolve()
    part, parts = map(int, given.part.split("/"))
    chosen = [m for m in mutants.MUTANTS if given.only in f"{m.file} {m.what}"][part::parts]
    about = about_this_run()
    known = recorded(given.out.read_text(encoding="utf-8") if given.out.exists() else "")
    waiting = [m for m in chosen if known.get(key(m), {}).get("status") != "killed"]
    waiting.sort(key=lambda m: m.is_compiled)  # those that need a build are the last
    if waiting:
        run_all(waiting, given.out, about)
    return report(given.out, chosen)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(float(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
