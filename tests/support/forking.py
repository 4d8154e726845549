"""A program that imports everything once, and forks a process for every request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


class ForkingProgram:
    """Starts the program, which says "ready", and then answers each request, a line of JSON, with lines of text."""

    def __init__(self, program: str, **variables: str) -> None:
        paths = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env={**os.environ, "PYTHONPATH": paths, **variables})
        assert self.answer() == "ready"

    def ask(self, request: dict[str, Any]) -> str:
        """Sends a request; returns the first line of the answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        """The next line of the answer."""
        line = self._process.stdout.readline().strip()
        assert line, "the process that forks has ended"
        return line

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
