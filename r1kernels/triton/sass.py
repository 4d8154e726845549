"""How many instructions a kernel's loops issue for an entry, counted in the machine code of NVIDIA GPUs. Needs no GPU.

A loop is what a branch backwards closes. Its body may have branches to rare cases (the tile that has the token, the end
of a row), so a loop is as long as its shortest way round that takes an exponential for each of its entries: an entry of
a vocabulary kernel needs one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")
NEVER = 1 << 30


class Instruction(NamedTuple):
    """text: without its label and address, as in "@P0 BRA `(.L_x_7)"."""

    text: str
    target: int | None  # where a branch goes

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can be reached from here."""
        return self.text.startswith("@") or not re.match(r"(BRA|EXIT|RET|BRX|JMP)\b", self.text)


class Loop(NamedTuple):
    """begin and end: the loop's first instruction and its branch backwards. instructions: of the shortest way round."""

    begin: int
    end: int
    entries: int
    instructions: int

    @property
    def of_an_entry(self) -> float:
        return round(self.instructions / self.entries, 2)


# ---- machine code -------------------------------------------------------------------------------------------


@cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit on PATH, of a toolkit in CUDA_HOME, or of Triton's package."""
    places = [os.environ.get("PATH", "")]
    if home := os.environ.get("CUDA_HOME"):
        places.append(str(Path(home) / "bin"))
    if package := importlib.util.find_spec("triton"):
        places.append(str(Path(str(package.origin)).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(places))


def machine_code(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a cubin, by its symbol."""
    program = tool("nvdisasm")
    if program is None:
        raise FileNotFoundError("nvdisasm was not found on PATH, in CUDA_HOME or in Triton's package")
    text = subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    return kernels_of(text)


def kernels_of(disassembly: str) -> dict[str, list[Instruction]]:
    """The same from what `nvdisasm -c` prints."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^\s,]+),.*$", disassembly, flags=re.MULTILINE)[1:]
    return {name: _instructions(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def _instructions(code: str) -> list[Instruction]:
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(texts)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            texts.append(found[1])
    branches = [re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text) for text in texts]
    return [
        Instruction(text, None if branch is None else labels.get(branch[1]))
        for text, branch in zip(texts, branches, strict=True)
    ]


# ---- loops --------------------------------------------------------------------------------------------------


def loops(code: Sequence[Instruction], entries: int) -> list[Loop]:
    """The innermost loops of a kernel that take at least `entries` exponentials each time round, in their order."""
    found: list[Loop] = []
    for end, instruction in enumerate(code):
        begin = instruction.target
        if begin is None or begin > end or any(begin <= loop.begin and loop.end <= end for loop in found):
            continue
        shortest = _shortest(code, begin, end, entries)
        if shortest < NEVER:
            found.append(Loop(begin, end, entries, shortest))
    return found


def _shortest(code: Sequence[Instruction], begin: int, end: int, entries: int) -> int:
    """The fewest instructions from `begin` to `end`, both counted, on a way with so many exponentials."""
    # fewest[i][k]: on a way to instruction i, not counted, that has taken k exponentials (`entries`: or more).
    fewest: dict[int, dict[int, int]] = {begin: {0: 0}}
    for at in range(begin, end + 1):
        ways = fewest.pop(at, None)
        if ways is None:
            continue
        takes = int(EXPONENTIAL.search(code[at].text) is not None)
        after: dict[int, int] = {}
        for taken, length in ways.items():
            now = min(taken + takes, entries)
            after[now] = min(length + 1, after.get(now, NEVER))
        if at == end:
            return after.get(entries, NEVER)
        target = code[at].target
        successors = [at + 1] if code[at].falls_through else []
        if target is not None and at < target <= end:
            successors.append(target)
        for successor in successors:
            known = fewest.setdefault(successor, {})
            for taken, length in after.items():
                known[taken] = min(length, known.get(taken, NEVER))
    return NEVER
