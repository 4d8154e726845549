"""Prints what an extra of pyproject.toml asks for, one package a line: `python tools/requirements.py dev`.

pip installs it while the extension is compiled; the extra itself would wait for that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extra: str, extras: dict[str, list[str]]) -> Iterator[str]:
    """The packages of an extra, and of the extras that it names."""
    for requirement in extras[extra]:
        if own := re.fullmatch(r"r1kernels\[(.+)\]", requirement):
            for name in own[1].split(","):
                yield from requirements(name.strip(), extras)
        else:
            yield requirement


if __name__ == "__main__":
    declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    print("\n".join(requirements(sys.argv[1], declared)))
