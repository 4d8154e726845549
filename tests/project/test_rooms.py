"""What is run by default: a sample of large cross-products, and every test on the kernels of every backend."""

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path

import backends
import pytest
import sampling
from once import once

ROOT = backends.TESTS.parent
ROOMS = {
    "kernels", "losses", "linear", "hardening", "train", "rewards", "integrations", "gpu", "emulator", "project",
    "real", "support",
}


@pytest.mark.parametrize("sizes", [(2, 3), (5, 4, 3, 2), (11, 4, 3), (3, 3, 3, 3)])
def test_a_sample_has_every_pair_of_values(sizes: tuple[int, ...]) -> None:
    cases = [dict(zip("abcd", values, strict=False)) for values in itertools.product(*map(range, sizes))]
    chosen = sampling.pairwise(cases)
    assert chosen == sorted(set(chosen)) and chosen == sampling.pairwise(cases)
    covered = set().union(*(sampling.pairs(cases[number]) for number in chosen))
    assert covered == set().union(*map(sampling.pairs, cases))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(chosen) <= 2 * largest[0] * largest[1]


def test_a_sample_of_single_parameters_or_odd_cases_leaves_nothing_out() -> None:
    assert sampling.pairwise([{"a": n} for n in range(30)]) == list(range(30))
    assert sampling.pairwise([{"a": 0, "b": 0, "c": 0}] * 3 + [{"a": 1, "b": 0, "c": 0}]) == [0, 3]


@pytest.mark.parametrize("count", [1, 12, 13, 60, 97])
def test_a_spread_is_of_different_numbers(count: int) -> None:
    numbers = sampling.spread(count, 12, start=1000)
    assert len(set(numbers)) == min(count, 12) and set(numbers) <= set(range(count))


# ---- the rooms in a small tree of tests -----------------------------------------------------------------------

NEW = """
import pytest
from r1kernels import testing

BACKENDS = ("cpu", "triton", "cuda")

# Parts of these names once kept tests from the kernels of GPUs.
@pytest.mark.parametrize("case", ["float64", "threads", "every_bfloat16"])
def test_reference_gradcheck_bad_input_opcheck_fakes(case):
    assert testing.KERNELS in BACKENDS

@pytest.mark.not_on("triton", reason="never there")
def test_not_there(): pass

@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow_on("triton", reason="takes its time"))])
def test_one_case_is_slow(case): pass

@pytest.mark.parametrize("a", range(5))
@pytest.mark.parametrize("b", range(5))
@pytest.mark.parametrize("c", range(5))
def test_product(a, b, c): pass
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folders with this project's settings, `conftest.py` and helpers, and one new file of tests."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    tests = tmp_path / "tests"
    (tests / "kernels").mkdir(parents=True)
    (tests / "conftest.py").write_text((backends.TESTS / "conftest.py").read_text())
    (tests / "support").symlink_to(backends.SUPPORT)
    (tests / "kernels" / "test_new.py").write_text(NEW)
    return tests


def counted(completed: subprocess.CompletedProcess[str]) -> str:
    """"3 passed, 1 skipped" of "3 passed, 1 skipped in 1.23s"."""
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout.strip().splitlines()[-1].partition(" in ")[0].strip("= ")


@pytest.mark.few(1)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.slow(reason="starts pytest")
def test_a_new_test_runs_on_the_triton_kernels(tree: Path, full: bool) -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's, which is not installed")
    environment = {"TRITON_INTERPRET": "1", "R1KERNELS_BACKEND": "triton", "PYTHONPATH": str(ROOT)}
    completed = backends.run_room("kernels", environment, full=full, tests=tree)
    passed = 3 + 2 + sampled() if full else min(3, interpreted()) + 1 + interpreted()
    assert counted(completed).startswith(f"{passed} passed"), completed.stdout
    assert "not on triton: never there" in completed.stdout
    assert ("on triton with --full only: takes its time" in completed.stdout) != full


def interpreted() -> int:
    """Of the product, where programs are interpreted."""
    text = (backends.TESTS / "conftest.py").read_text()
    return ast.literal_eval(text.partition("\nMOST_INTERPRETED = ")[2].partition("\n")[0])["kernels"]


def sampled() -> int:
    return len(sampling.pairwise([dict(zip("abc", v, strict=True)) for v in itertools.product(range(5), repeat=3)]))


@pytest.mark.few(1)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.slow(reason="starts pytest")
def test_full_runs_the_whole_product(tree: Path, full: bool) -> None:
    completed = backends.run_room("kernels", {"PYTHONPATH": str(ROOT), "R1KERNELS_BACKEND": ""}, full=full, tests=tree)
    assert counted(completed).startswith(f"{6 + (125 if full else sampled())} passed"), completed.stdout
    assert 25 <= sampled() <= 50


@pytest.mark.parametrize("mark", [
    pytest.mark.not_on("triton"), pytest.mark.not_on(reason="nowhere"), pytest.mark.slow_on("tritonn", reason="x"),
    pytest.mark.long, pytest.mark.long("x"), pytest.mark.slow, pytest.mark.slow("x"),
])
def test_a_marker_without_a_backend_or_a_reason_is_an_error(mark: pytest.MarkDecorator) -> None:
    class Item:
        nodeid = "test_x"

        def iter_markers(self, name: str) -> list[pytest.Mark]:
            return [mark.mark] if mark.name == name else []

    with pytest.raises(pytest.UsageError, match="test_x"):
        backends.skip_reason(Item(), "cpu", False)


def test_a_long_test_runs_with_full_only() -> None:
    class Item:
        nodeid = "test_x"

        def iter_markers(self, name: str) -> list[pytest.Mark]:
            return [pytest.mark.long(reason="hours").mark] if name == "long" else []

    assert "hours" in backends.skip_reason(Item(), "cpu", False) and backends.skip_reason(Item(), "cpu", True) == ""


def test_every_backend_runs_every_room() -> None:
    for name in ("triton_interpreter", "cuda_emulated"):
        text = (backends.TESTS / "emulator" / f"test_{name}.py").read_text()
        assert 'parametrize("room", backends.ROOMS)' in text and "backends.run_room(room, " in text
        assert '"-k"' not in text and "deselect" not in text and "ignore" not in text


def test_every_test_lies_in_a_room_and_has_a_name_of_its_own() -> None:
    files = sorted(backends.TESTS.rglob("test_*.py"))
    names = [path.name for path in files]
    assert not [name for name in names if names.count(name) > 1]
    outside = [path for path in files if path.parent.name not in ROOMS]
    assert not outside


def test_shared_work_is_done_once_and_again_after_a_failure(tmp_path_factory: pytest.TempPathFactory) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "part").touch()
        calls.append(folder)
        if len(calls) == 1:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        once(tmp_path_factory, "shared", make)
    assert once(tmp_path_factory, "shared", make) == once(tmp_path_factory, "shared", make) == calls[1]
    assert len(calls) == 2


def test_the_summary_of_a_process_that_fails_is_shown(tmp_path: Path) -> None:
    completed = subprocess.run([sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"], capture_output=True,
                               text=True, env=os.environ)
    with pytest.raises(AssertionError, match="1 failed"):
        backends.check(completed)
