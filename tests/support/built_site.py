"""The documentation, built once in a run of pytest."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from once import once


def build(factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site. Skips where mkdocs is not installed."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -c constraints.txt '.[docs]'")

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://localhost:1",
                       "https_proxy": "http://localhost:1"}  # a build needs no network
        done = subprocess.run(command, cwd=pages.ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr

    return once(factory, "site", make)
