"""Runs a file of examples/ as its reader does: `python examples/NAME.py ARGUMENTS`."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(name: str, *arguments: object) -> dict[str, Any]:
    """What the names of the file stand for at the end of the run. In this process, because imports take seconds."""
    path = EXAMPLES / f"{name}.py"
    with mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]):
        return runpy.run_path(str(path), run_name="__main__")


def load_example(name: str) -> dict[str, Any]:
    """What the file defines, without a run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def commands(name: str) -> list[str]:
    """The command lines in the docstring of an example, without their comments."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()), clean=False) or ""
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return [line.partition(" #")[0].strip() for line in lines]
