"""The list of mutants of benchmarks/mutation.py fits the code, and the script tells a killed one from a survivor."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import mutants_training
import mutation
import pytest
from backends import host_code

pytestmark = host_code
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in mutants.MUTANTS}))
def test_what_a_mutant_replaces_is_there_once(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    wrong = {m.old: text.count(m.old) for m in mutants.MUTANTS if m.file == file and text.count(m.old) != 1}
    assert not wrong, f"{file}: adapt benchmarks/mutants.py"


def test_mutants_differ_and_name_tests_that_exist() -> None:
    assert not [key for key, n in Counter((m.file, m.new) for m in mutants.MUTANTS).items() if n > 1 and key[1]]
    assert not [m.what for m in mutants.MUTANTS if m.old == m.new]
    paths = {test.partition("::")[0] for m in mutants.MUTANTS for test in m.tests}
    assert not [path for path in paths if not (ROOT / path).exists()]
    for name in ("r1kernels/ops/", "csrc/", "r1kernels/triton/", "r1kernels/train/", "r1kernels/rewards/"):
        assert len([m for m in mutants.MUTANTS if m.file.startswith(name)]) >= 12, name


FORMULA = "def double(x):\n    return 2 * x\n"
CHECKS = "from formula import double\n\ndef test_double():\n    assert double(3) == 6\n"
CHANGES = (
    ("2 * x", "3 * x", "wrong"), ("2 * x", "x + x", "equal"), ("return", "import os; os.abort(); return", "crashes"),
    ("return", "import time; time.sleep(1000); return", "endless"),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the script on a small formula: its exit status, and what it has recorded."""
    tree, out = tmp_path / "tree", tmp_path / "out.json"
    (tree / "benchmarks").mkdir(parents=True)
    for module in (mutants, mutants_training):
        shutil.copy(module.__file__, tree / "benchmarks")
    (tree / "formula.py").write_text(FORMULA)
    listed = mutants.of_file("formula.py", ("test_formula.py",), *CHANGES)
    monkeypatch.setattr(mutants, "MUTANTS", listed)
    monkeypatch.setattr(mutation, "COPY", tree)
    monkeypatch.setattr(mutation, "ROOT", tree)
    monkeypatch.setattr(mutation, "build", lambda: None)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    runner = mutation.Runner

    def main(checks: str, only: str = "", limit_s: float = 300) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(mutation, "Runner", partial(runner, preloaded=(), limit_s=limit_s))
        monkeypatch.setattr(mutation, "copy_tree", lambda: (tree / "test_formula.py").write_text(checks))
        status = mutation.main(["--copy", str(tree), "--out", str(out), "--only", only])
        return status, json.loads(out.read_text())

    main.out = out
    return main


def test_the_script_tells_kills_from_survivors_and_time_outs(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("wrong", "equal", "crashes"):
        assert run(CHECKS, what)[0] == (what == "equal")
    capsys.readouterr()
    status, found = run(CHECKS, "endless", limit_s=1)
    assert status == 1 and "0 of 1 run, 0 killed, 0 survived, 1 out of time" in capsys.readouterr().out
    assert {r["what"]: r["status"] for r in found["results"]} == {
        "wrong": "killed", "equal": "survived", "crashes": "killed", "endless": "out of time"}
    assert (found["run"], found["killed"], found["survived"], found["out of time"]) == (3, 2, 1, 1)
    assert {"date", "device", "r1kernels", "sources"} <= found.keys()
    assert run(CHECKS, "equal")[0] == 1  # a survivor is run again, and survives
    assert run("", "wrong")[0] == 0  # what was killed is not run again
    better = CHECKS + "    import inspect, formula\n    assert '2 * x' in inspect.getsource(formula)\n"
    status, found = run(better, "equal")
    assert status == 0
    assert found["killed"] == 1 and found["run"] == 1  # the test changed, so earlier results do not hold
    assert {"date", "sources", "of"} <= found["results"][0].keys()


@pytest.mark.parametrize("changed", ["the formula", "the test", "another test", "the mutant"])
def test_a_result_holds_until_its_mutant_its_file_or_its_test_changes(
        run: Any, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(CHECKS, "wrong")
    assert len(mutation.recorded(run.out.read_text())) == 1
    if changed == "the mutant":
        others = [("2 * x", "4 * x", "wrong"), *CHANGES[1:]]
        monkeypatch.setattr(mutants, "MUTANTS", mutants.of_file("formula.py", ("test_formula.py",), *others))
    else:
        more = {"the formula": "# more", "the test": "    assert double(0) == 0", "another test": "def test_b(): pass"}
        with (mutation.ROOT / ("formula.py" if changed == "the formula" else "test_formula.py")).open("a") as file:
            file.write(more[changed] + "\n")
    assert len(mutation.recorded(run.out.read_text())) == (changed == "another test")


def test_a_test_that_fails_without_a_mutant_judges_none(run: Any) -> None:
    with pytest.raises(RuntimeError, match="test_formula"):
        run(CHECKS.replace("== 6", "== 7"), "crashes")
    assert not run.out.exists()


def test_two_runs_cannot_share_a_copy(run: Any) -> None:
    with mutation.locked_copy(), pytest.raises(SystemExit, match=rf"--copy is {mutation.COPY}"):
        run(CHECKS, "wrong")
