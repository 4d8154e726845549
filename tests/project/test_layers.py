"""Who imports whom: arrows point downwards only, and the trainer sees nothing but the public API."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import r1kernels

PACKAGE = Path(r1kernels.__file__).parent
# Every module of the package belongs to the first layer whose prefix it has. A module may import from layers below
# its own and from its own package.
LAYERS = [
    ("rewards", ("r1kernels.rewards",)),
    ("kernels", ("r1kernels.triton", "r1kernels._C")),
    ("tables", ("r1kernels._schemas", "r1kernels._choice", "r1kernels._memory", "r1kernels._operator_checks")),
    ("registry", ("r1kernels._library", "r1kernels.objectives")),
    ("dispatch", ("r1kernels._dispatch",)),
    ("operations", ("r1kernels.ops",)),
    ("origin", ("r1kernels._origin",)),
    ("users", ("r1kernels.train", "r1kernels.integrations", "r1kernels.testing")),
    ("measurements", ("r1kernels.bench",)),
    ("entry", ("r1kernels._command",)),
    ("command", ("r1kernels.__main__",)),
    ("public", ("r1kernels",)),
]
HEIGHT = {"rewards": 0, "kernels": 0, "tables": 0, "registry": 1, "dispatch": 2, "operations": 3, "public": 4,
          "origin": 5, "users": 6, "measurements": 7, "entry": 8, "command": 9}
# They also say where a result came from, and the benchmarks use the inputs and oracles of the tests.
PUBLIC_ONLY = ("r1kernels.train", "r1kernels.integrations", "r1kernels.bench")


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


def test_imports_point_downwards() -> None:
    wrong = [
        f"{module} imports {target}"
        for module in MODULES for target, _ in imports(module)
        # Type checkers alone read this import of the package: users get it as an attribute.
        if (package(target) != package(module) or module == "r1kernels") and (module, target) != (
            "r1kernels", "r1kernels.testing")
        and HEIGHT[layer(target)] >= HEIGHT[layer(module)]
    ]
    assert not wrong, "\n".join(wrong)


def hidden_names(module: str) -> Iterator[str]:
    """What a module uses of this package that is neither public, nor its own, nor of rewards and origin."""
    public = {*r1kernels.__all__, "rewards", "_origin", *(["testing"] if module.startswith("r1kernels.bench") else [])}
    for target, name in imports(module):
        if target == "r1kernels":
            if name is not None and name not in public:
                yield f"{module} imports r1kernels.{name}"
        elif package(target) != package(module) and target.removeprefix("r1kernels.").split(".")[0] not in public:
            yield f"{module} imports {target}"
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if attribute and node.value.id == "r1kernels" and node.attr not in public:
            yield f"{module}:{node.lineno} uses r1kernels.{node.attr}"


def test_users_see_the_public_api_only() -> None:
    wrong = [line for name in MODULES if name.startswith(PUBLIC_ONLY) for line in hidden_names(name)]
    assert not wrong, "\n".join(wrong)


def test_rewards_import_neither_this_package_nor_torch() -> None:
    for module in (name for name in MODULES if layer(name) == "rewards"):
        assert all(layer(target) == "rewards" for target, _ in imports(module)), module
        for node in ast.walk(ast.parse(MODULES[module].read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "torch" not in {name.split(".")[0] for name in names}, f"{module}:{node.lineno}"


def test_operations_do_not_import_each_other_in_a_circle() -> None:
    below = {m: {t for t, _ in imports(m) if t in MODULES and t != m} for m in MODULES if ".ops." in m}
    done: set[str] = set()
    while rest := {m: {t for t in targets if t in below} - done for m, targets in below.items() if m not in done}:
        free = {m for m, targets in rest.items() if not targets}
        assert free, f"a circle among {sorted(rest)}"
        done |= free


def test_the_linear_family_is_above_the_other_operations() -> None:
    family = "r1kernels.ops.linear"
    assert sum(name.startswith(f"{family}.") for name in MODULES) > 10
    for module in (name for name in MODULES if layer(name) == "operations" and not name.startswith(family)):
        assert not [target for target, _ in imports(module) if target.startswith(family)], module


def test_the_public_names_are_those_exported() -> None:
    assert sorted(r1kernels.__all__) == r1kernels.__all__
    assert all(hasattr(r1kernels, name) for name in r1kernels.__all__)
    assert all(getattr(r1kernels, name).__doc__ for name in r1kernels.__all__ if name != "__version__")


def test_importing_the_library_imports_no_heavy_package() -> None:
    """Neither a kernel compiler nor a trainer's dependencies; torch itself is all there is."""
    program = "import torch, sys; before = set(sys.modules); import r1kernels; print(*(set(sys.modules) - before))"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in completed.stdout.split()}
    assert "r1kernels" in imported
    assert not imported & {"triton", "transformers", "safetensors", "yaml", "rich", "matplotlib", "trl", "liger_kernel"}
    assert not any(name.startswith("r1kernels.train") for name in completed.stdout.split())
