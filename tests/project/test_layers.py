"""Who imports whom: arrows point downwards only. The trainer sees the public API and the rewards, and nothing else."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import r1kernels

PACKAGE = Path(r1kernels.__file__).parent
# Every module of the package belongs to the first layer whose prefix it has. A module may import from layers below
# its own and from its own package.
LAYERS = [
    ("kernels", ("r1kernels.triton", "r1kernels._C", "r1kernels._choice")),
    ("tables", ("r1kernels._schemas", "r1kernels._choice")),
    ("registry", ("r1kernels._library", "r1kernels.objectives")),
    ("operations", ("r1kernels.ops",)),
    ("rewards", ("r1kernels.rewards",)),
    ("users", ("r1kernels.train", "r1kernels.integrations", "r1kernels.testing", "r1kernels.__main__")),
    ("public", ("r1kernels",)),
]
HEIGHT = {"kernels": 0, "tables": 0, "rewards": 0, "registry": 1, "operations": 2, "public": 3, "users": 4}
PUBLIC_ONLY = ("r1kernels.train", "r1kernels.integrations")
# Packages that import nothing else of r1kernels, and that users may import beside the public names.
ALONE = ("r1kernels.rewards",)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module in the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def layer(module: str) -> str:
    return next(name for name, prefixes in LAYERS if any(f"{module}.".startswith(f"{p}.") for p in prefixes))


def package(module: str) -> str:
    """r1kernels.ops of r1kernels.ops.token_stats; a module directly under r1kernels is its own package."""
    return ".".join(module.split(".")[:2])


def imports(module: str) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it or None) of every import of ours in a module, inside functions too."""
    path = MODULES[module]
    folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "r1kernels")
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), folder)
            if source.split(".")[0] == "r1kernels":
                for alias in node.names:
                    nested = f"{source}.{alias.name}"
                    yield (nested, None) if nested in MODULES else (source, alias.name)


def test_every_module_is_found() -> None:
    assert {"r1kernels", "r1kernels._library", "r1kernels.ops.token_stats", "r1kernels.train.grpo"} <= set(MODULES)
    assert layer("r1kernels.ops.token_stats") == "operations" and layer("r1kernels") == "public"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    for target, _ in imports(module):
        inside = package(target) == package(module) and module != "r1kernels"
        if package(module) in ALONE:
            assert inside, f"{module} imports {target}"
        assert inside or HEIGHT[layer(target)] < HEIGHT[layer(module)], f"{module} imports {target}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(PUBLIC_ONLY)])
def test_users_see_the_public_api_only(module: str) -> None:
    public = set(r1kernels.__all__)
    for target, name in imports(module):
        if target == "r1kernels":
            assert name is None or name in public, f"{module} imports r1kernels.{name}"
        elif package(target) not in (package(module), *ALONE):
            assert target.removeprefix("r1kernels.") in public, f"{module} imports {target}"
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "r1kernels":
            assert node.attr in public, f"{module}:{node.lineno} uses r1kernels.{node.attr}"


def test_operations_do_not_import_each_other_in_a_circle() -> None:
    below = {m: {t for t, _ in imports(m) if t in MODULES and t != m} for m in MODULES if ".ops." in m}
    done: set[str] = set()
    while rest := {m: {t for t in targets if t in below} - done for m, targets in below.items() if m not in done}:
        free = {m for m, targets in rest.items() if not targets}
        assert free, f"a circle among {sorted(rest)}"
        done |= free


def test_the_public_names_are_those_exported() -> None:
    assert sorted(r1kernels.__all__) == r1kernels.__all__
    assert all(hasattr(r1kernels, name) for name in r1kernels.__all__)
    assert all(getattr(r1kernels, name).__doc__ for name in r1kernels.__all__ if name != "__version__")


def test_the_names_for_type_checkers_are_those_loaded_at_run_time() -> None:
    checked = {name: source for source, name in imports("r1kernels") if name is not None}
    assert {**checked} == {**r1kernels._MODULES}
    assert sorted([*checked, "__version__", "objectives"]) == r1kernels.__all__
    assert set(r1kernels.__all__) <= set(dir(r1kernels))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        r1kernels.no_such_name  # noqa: B018


def test_names_are_loaded_when_used_and_register_the_operators() -> None:
    program = """
import sys, r1kernels
assert "torch" not in sys.modules and r1kernels.__version__
r1kernels.token_logprobs
import torch
torch.ops.r1kernels.linear_token_stats, torch.ops.r1kernels.group_advantages
from r1kernels import *
assert linear_grpo_loss and objectives.grpo and backend
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_library_imports_no_heavy_package() -> None:
    """Neither a kernel compiler nor a trainer's dependencies; torch itself is all there is."""
    program = "import torch, sys; before = set(sys.modules); import r1kernels; r1kernels.backend; "
    program += "print(*(set(sys.modules) - before))"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in completed.stdout.split()}
    assert "r1kernels" in imported
    assert not imported & {"triton", "transformers", "safetensors", "yaml", "rich", "matplotlib", "trl", "liger_kernel"}
    assert not any(name.startswith("r1kernels.train") for name in completed.stdout.split())
