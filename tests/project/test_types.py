"""Type checkers know all public names and their types. `make types` runs pyright; these tests need none."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import r1kernels
from r1kernels import objectives
from r1kernels.objectives import Overrides

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "support" / "typed_program.py"


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(r1kernels.__file__).parent / "py.typed").read_text() == ""


def test_type_checkers_find_each_lazy_name_where_it_is_loaded_from() -> None:
    """Names are loaded late by `_MODULES`; type checkers read the imports under TYPE_CHECKING."""
    (block,) = (node for node in ast.parse(Path(r1kernels.__file__).read_text()).body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom)
                for alias in node.names}
    assert {imported.pop(name) for name in r1kernels._SUBMODULES} == {"r1kernels"}
    assert imported == r1kernels._MODULES
    assert {*imported, "objectives", "__version__"} == set(r1kernels.__all__)


@pytest.mark.parametrize("name, call", [
    ("objectives", "grpo()"), ("rewards", "format(['a'])"), ("testing", "random_ids(2, vocab=3)"),
])
def test_a_submodule_is_an_attribute_of_the_package(name: str, call: str) -> None:
    """Without an import statement for it; rewards and objectives without torch."""
    program = (f"import sys, r1kernels; r1kernels.{name}.{call}; "
               f"print({name!r} in dir(r1kernels), 'torch' in sys.modules)")
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                               env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    assert completed.stdout.split() == ["True", str(name == "testing")], completed.stderr


def test_another_name_is_no_attribute() -> None:
    assert not hasattr(r1kernels, "nonsense")


def test_pyright_checks_the_modules_of_public_names() -> None:
    """All that `r1kernels` exports but PolicyBatch: its module computes with tensors of which some are None. Bodies of
    the adapters are not checked: CONTRIBUTING.md and CHANGELOG.md say so."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    assert {"r1kernels/bench", "r1kernels/integrations", "r1kernels/train", "r1kernels/triton"} == {
        path for path in settings["ignore"] if not path.endswith(".py")}
    assert all((ROOT / path).exists() for path in settings["ignore"] + settings["include"])
    ignored = [name for name, module in r1kernels._MODULES.items() if f"{module.replace('.', '/')}.py" in
               settings["ignore"]]
    assert ignored == ["PolicyBatch"]


def test_presets_take_the_fields_of_an_objective() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(objectives.Objective)}
    assert {name: hint.__forward_arg__ for name, hint in Overrides.__annotations__.items()} == fields


def test_the_program_that_pyright_checks_runs() -> None:
    completed = subprocess.run([sys.executable, "-W", "error", PROGRAM], capture_output=True, text=True, cwd=ROOT,
                               env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    assert completed.returncode == 0, completed.stderr
