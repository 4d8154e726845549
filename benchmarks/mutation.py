"""Mutation score: how many deliberate mistakes in formulas the tests find.

    python benchmarks/mutation.py [--only TEXT] [--part I/N] [--copy FOLDER] [--out FILE]

Each mutant of `mutants.MUTANTS` is one replaced line in a copy of the tree. Its tests run until one fails: the mutant
is killed. A mutant that no test notices survives. Each result is added to benchmarks/results/mutation.json, and what
has a result for the same source is not run again. So parts of the list can run at the same time, each with another
folder for its copy. The CPU kernels are built without the wider instruction sets, which share their source.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mutants

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutation"
OUT = ROOT / "benchmarks" / "results" / "mutation.json"
LIMIT_S = 600
BACKENDS = {"cpu": {}, "triton": {"TRITON_INTERPRET": "1", "R1KERNELS_BACKEND": "triton"}}
STATUS = {0: "survived", 1: "killed"}


def source_hash() -> str:
    """Of the code that is mutated."""
    digest = hashlib.sha256()
    for folder, pattern in (("r1kernels", "*.py"), ("csrc", "*")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


SOURCE = source_hash()


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


def build() -> None:
    variables = {**os.environ, "R1KERNELS_CUDA": "0", "R1KERNELS_PORTABLE": "1"}
    completed = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=variables,
                               capture_output=True, text=True)
    if completed.returncode:
        raise RuntimeError(f"the build failed:\n{completed.stderr[-3000:]}")


class Runner:
    """A process that has imported torch and pytest, and forks one for every run of tests."""

    def __init__(self, backend: str) -> None:
        paths = os.pathsep.join([str(COPY), str(COPY / "benchmarks")])
        variables = {**os.environ, **BACKENDS[backend], "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                     "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self._process = subprocess.Popen(command, cwd=COPY, env=variables, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)

    def run(self, tests: list[str]) -> dict[str, Any]:
        """{"code": the exit status of pytest, "failed": the first test that failed}"""
        self._process.stdin.write(json.dumps(tests) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class FirstFailure:
    """A plugin of pytest."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def serve() -> None:
    import hypothesis  # noqa: F401
    import pytest
    import torch  # noqa: F401

    if "TRITON_INTERPRET" in os.environ:
        import triton  # noqa: F401

    for line in sys.stdin:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(LIMIT_S)
            log = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # of the last run
            os.dup2(log, 1)
            os.dup2(log, 2)
            found = FirstFailure()
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no",
                       "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            code = pytest.main([*options, *json.loads(line)], plugins=[found])
            os.write(write, json.dumps({"code": int(code), "failed": found.name}).encode())
            os._exit(0)
        os.close(write)
        answer = b"".join(iter(lambda: os.read(read, 65536), b"")).decode()  # noqa: B023
        os.close(read)
        status = os.waitpid(child, 0)[1]
        ended = {"code": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else 3, "failed": ""}
        print(answer or json.dumps(ended), flush=True)


def judge(runner: Runner, mutant: mutants.Mutant) -> dict[str, Any]:
    path, started = COPY / mutant.file, time.monotonic()
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times, expected once")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        if mutant.is_compiled:
            build()
        for test in mutant.tests:
            if (result := runner.run([test]))["code"] != 0:
                break
    finally:
        path.write_text(text, encoding="utf-8")
    code = result["code"]
    crashed = code < 0 and code != -signal.SIGALRM
    status = "killed" if crashed else STATUS.get(code, f"pytest ended with {code}")
    seconds = time.monotonic() - started
    print(f"{status:9} {seconds:5.0f} s  {mutant.file}: {mutant.what}  {result['failed']}", flush=True)
    return {"file": mutant.file, "what": mutant.what, "status": status, "by": result["failed"]}


def finished(out: Path) -> set[tuple[str, str]]:
    """The mutants that have a result for this source."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return {(r["file"], r["what"]) for r in known.get("results", []) if known["source"] == SOURCE}


def add_result(out: Path, result: dict[str, Any]) -> None:
    """Adds a result to those of the same source."""
    import torch

    from r1kernels import __version__

    with out.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = json.loads(file.read() or "{}")
        same = known.get("source") == SOURCE
        results = {(r["file"], r["what"]): r for r in [*(known["results"] if same else []), result]}
        order = [(m.file, m.what) for m in mutants.MUTANTS]
        ordered = sorted(results.values(), key=lambda r: order.index((r["file"], r["what"])))
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "r1kernels": __version__,
            "torch": torch.__version__, "source": SOURCE, "listed": len(order), "run": len(ordered),
            "killed": sum(r["status"] == "killed" for r in ordered), "results": ordered,
        }
        file.truncate(0)
        file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    global COPY
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="run the mutants whose file or description has this text")
    parser.add_argument("--part", default="0/1", help="run every N-th of them, from the I-th, such as 0/2 and 1/2")
    parser.add_argument("--copy", type=Path, default=COPY, help="the folder of the copy")
    parser.add_argument("--out", type=Path, default=OUT, help="where the result is written")
    arguments = parser.parse_args()
    COPY = arguments.copy.resolve()
    chosen = [m for m in mutants.MUTANTS if arguments.only in f"{m.file} {m.what}"]
    part, parts = map(int, arguments.part.split("/"))
    done = finished(arguments.out)
    chosen = [m for m in chosen[part::parts] if (m.file, m.what) not in done]
    if not chosen:
        return 0
    chosen.sort(key=lambda m: m.is_compiled)  # those that need a build are the last
    copy_tree()
    build()
    runners = {name: Runner(name) for name in {m.backend for m in chosen}}
    results = []
    for mutant in chosen:
        results.append(judge(runners[mutant.backend], mutant))
        add_result(arguments.out, results[-1])
    if chosen[-1].is_compiled:
        build()
    for backend, runner in runners.items():  # a test that fails by itself judges nothing
        tests = {r["by"] for r, m in zip(results, chosen, strict=True) if m.backend == backend and r["by"]}
        if tests and (clean := runner.run(sorted(tests)))["code"] != 0:
            raise RuntimeError(f"{clean['failed'] or sorted(tests)} fails without a mutant")
        runner.close()
    killed = sum(result["status"] == "killed" for result in results)
    print(f"{killed} of {len(results)} mutants are killed")
    for result in results:
        if result["status"] != "killed":
            print(f"  {result['status']}: {result['file']}: {result['what']}")
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
