"""Every Triton kernel compiles for every kind of device, into the instructions meant. No GPU is needed for that.

One process compiles and writes rows; each test reads its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aot_rows import FAULTY
from once import once

import r1kernels
from r1kernels.triton import aot, sources

ROOT = Path(r1kernels.__file__).parents[1]
SUPPORT = Path(__file__).parents[1] / "support"
FOLDER = ROOT / "benchmarks" / "results" / "aot"
OLDEST, NEWEST = "3.6.0", "3.9.0"  # the Triton that is supported
REFRESH = "python -m r1kernels.triton.aot benchmarks/results/aot, with each Triton"
ARCHES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
Row = dict[str, Any]


def committed_table(version: str) -> dict[str, Any]:
    """The one of this version of Triton, or for one without a table the newest."""
    path = FOLDER / f"triton-{version}.json"
    return json.loads((path if path.exists() else FOLDER / f"triton-{NEWEST}.json").read_text())


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels compile to, those of `faulty_kernels` as well.

    The committed table has all rows, and it is of these kernels (`test_a_committed_table_is_of_these_kernels`). So by
    default a sample is compiled, which must give the committed rows again. `--full` compiles all kernels, and so does
    any run with another Triton than that of the table.
    """
    committed = committed_table(aot.triton.__version__)
    how = "sample" if committed["triton"] == aot.triton.__version__ else "full"
    how = "full" if request.config.getoption("--full") else how

    def compile_rows(folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}",
                        "OMP_NUM_THREADS": "1"}
        command = (sys.executable, str(SUPPORT / "aot_rows.py"), str(folder / "rows.json"), how)
        completed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert (folder / "rows.json").exists(), completed.stdout + completed.stderr

    compiled = json.loads((once(tmp_path_factory, "aot", compile_rows) / "rows.json").read_text())
    rows = compiled["rows"]
    fresh = {key_of(row): row for row in rows[: compiled["tasks"]]}
    if how == "sample":
        rows = [*committed["rows"], *rows[compiled["tasks"] :]]
    return {**committed, "rows": rows, "fresh": fresh}


def key_of(row: Row) -> tuple[str, str, str]:
    return row["kernel"], row["variant"], row["arch"]


@pytest.fixture(scope="module")
def rows(table: dict[str, Any]) -> list[Row]:
    return [row for row in table["rows"] if not row["kernel"].startswith("faulty_kernels")]


# ---- what can be wrong with a row: "" where nothing is -----------------------------------------------------


def failure(row: Row, table: dict[str, Any]) -> str:
    return row.get("error", "")


# Bytes that a kernel may spill. Triton 3.9 needs more than the 127 registers that a tile of 128 x 256 leaves a thread:
# it moves most of the others out before a tile's products begin and back after they end.
TOLERATED = {("3.9.0", "linear_statistics_kernels.tiles_kernel", "BLOCK_N=256"): 512}


def spilling(row: Row, table: dict[str, Any]) -> str:
    found = [most for (version, kernel, word), most in TOLERATED.items()
             if (version, kernel) == (table["triton"], row["kernel"]) and word in row["variant"].split()]
    most = max(found, default=0)
    spills = {kind: amount for kind, amount in row.get("spills", {}).items() if amount > most}
    return f"spills {spills} with {row['registers']} registers" if spills else ""


def excess(row: Row, table: dict[str, Any]) -> str:
    limits = {"shared": table["devices"][row["arch"]]["shared_limit"], "tensor_memory": table["tensor_memory_limit"]}
    over = [f"{row[name]} of {limit} {name}" for name, limit in limits.items() if row.get(name, 0) > limit]
    return ", ".join(over)


def lacking(row: Row, table: dict[str, Any]) -> str:
    found = row.get("instructions", {})
    return ", ".join(f"no {name}" for name in row["expects"] if found and not found[name])


def listed(rows: list[Row], arch: str, wrong: Callable[[Row, Any], str], table: dict[str, Any]) -> str:
    """A line for each row of an architecture that has something wrong with it."""
    mine = [(row, wrong(row, table)) for row in rows if row["arch"] == arch]
    assert mine, f"nothing was compiled for {arch}"
    return "\n".join(f"{row['kernel']} [{row['variant']}] on {arch}: {what}" for row, what in mine if what)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_every_kernel_compiles(table: dict[str, Any], rows: list[Row], arch: str) -> None:
    assert not (wrong := listed(rows, arch, failure, table)), wrong


@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_little_is_spilled_on_sm_90(table: dict[str, Any], rows: list[Row]) -> None:
    for arch in ARCHES:
        print(listed(rows, arch, spilling, table))
    assert not (wrong := listed(rows, "sm_90", spilling, table)), wrong


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_programs_fit_into_shared_memory(table: dict[str, Any], rows: list[Row], arch: str) -> None:
    assert not (wrong := listed(rows, arch, excess, table)), wrong


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_the_instructions_meant_are_there(table: dict[str, Any], rows: list[Row], arch: str) -> None:
    assert not (wrong := listed(rows, arch, lacking, table)), wrong


@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_no_compilation_is_named_twice(rows: list[Row]) -> None:
    names = [key_of(row) for row in rows]
    assert not (twice := sorted({name for name in names if names.count(name) > 1})), twice


def declared() -> set[str]:
    """"token_stats.segment_kernel" and all others, as the sources have them."""
    return {
        f"{path.stem}.{name}"
        for path in sources.kernel_sources() if path.suffix == ".py"
        for name in re.findall(r"^@(?:kernel|checking_kernel)\ndef (\w+)", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_no_kernel_is_left_out(rows: list[Row], arch: str) -> None:
    assert declared()
    assert declared() == {row["kernel"] for row in rows if row["arch"] == arch}


# ---- the checks can fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_faults_are_found(table: dict[str, Any], arch: str) -> None:
    faulty = {
        row["kernel"].removeprefix("faulty_kernels."): row
        for row in table["rows"] if row["kernel"].startswith("faulty_kernels") and row["arch"] == arch
    }
    if not faulty:
        assert arch not in FAULTY
        pytest.skip("compiled for this architecture with --full only")
    checks = (failure, spilling, excess, lacking)
    found = {name: {check.__name__ for check in checks if check(row, table)} for name, row in faulty.items()}
    expected = {
        "sound_kernel": set(), "narrow_kernel": {"lacking"}, "spilling_kernel": {"spilling"},
        "large_kernel": {"excess"}, "wrong_kernel": {"failure"},
    }
    if arch == "gfx942":
        expected["deadly_kernel"] = {"failure"}
    assert found == expected
    assert lacking(faulty["narrow_kernel"], table) == "no wide_loads, no matrix"
    assert set(faulty["sound_kernel"]["instructions"]) == {"wide_loads", "wide_stores", "matrix"}
    assert all(faulty["sound_kernel"]["instructions"].values())
    assert "incompatible dimensions" in faulty["wrong_kernel"]["error"]


# ---- the committed tables ---------------------------------------------------------------------------------

versions = pytest.mark.parametrize("version", [OLDEST, NEWEST])


def test_there_are_tables_of_the_oldest_and_the_newest_triton() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"triton-{version}.json" for version in (OLDEST, NEWEST)}
    assert f"\ntriton=={NEWEST}\n" in (ROOT / "constraints.txt").read_text()


@versions
def test_a_committed_table_is_of_these_kernels(version: str) -> None:
    committed = committed_table(version)
    assert committed["triton"] == version
    assert committed["sources"] == sources.kernel_sources_hash(), f"kernels have changed: {REFRESH}"
    assert {row["kernel"] for row in committed["rows"]} == declared()
    for check in (failure, excess, lacking):
        for arch in ARCHES:
            assert not (wrong := listed(committed["rows"], arch, check, committed)), wrong


@versions
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_little_is_spilled(version: str, arch: str) -> None:
    committed = committed_table(version)
    assert not (wrong := listed(committed["rows"], arch, spilling, committed)), wrong


@pytest.mark.slow(reason="compiles kernels for GPUs")
def test_what_is_compiled_is_what_the_table_says(table: dict[str, Any]) -> None:
    if table["triton"] != aot.triton.__version__:
        pytest.skip(f"there is no table of Triton {aot.triton.__version__}")
    committed = {key_of(row): row for row in committed_table(table["triton"])["rows"]}
    assert len(table["fresh"]) >= 10
    for key, row in table["fresh"].items():
        assert row == committed[key], f"{REFRESH}"


def test_the_hash_follows_kernels_and_tables_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(sources.FOLDER, tmp_path / "triton")
    monkeypatch.setattr(sources, "FOLDER", tmp_path / "triton")
    before = sources.kernel_sources_hash()
    for name in ("aot.py", "sources.py", "__init__.py", "notes.txt"):
        (sources.FOLDER / name).write_text("# other text\n")
        assert sources.kernel_sources_hash() == before, name
    seen = {before}
    for name in ("token_stats.py", "common.py", "another.py", "tables/another.json"):
        (sources.FOLDER / name).parent.mkdir(exist_ok=True)
        (sources.FOLDER / name).write_text("# other text\n")
        assert sources.kernel_sources_hash() not in seen, name
        seen.add(sources.kernel_sources_hash())


def test_the_hash_needs_no_triton() -> None:
    program = "import sys, r1kernels.triton.sources as s; print(s.kernel_sources_hash(), 'triton' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    completed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert completed.stdout.split() == [sources.kernel_sources_hash(), "False"], completed.stderr
