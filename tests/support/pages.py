"""The pages of the repository and their blocks of code; what runs Python blocks, and what checks commands.

A page's Python blocks run in their order and share names, as a reader would run them. What they need beside the text is
in comments of the page, which a reader does not see:

    <!-- test: set up
    hidden = torch.randn(3, 8)
    -->

A comment after `print(...)` that is plain numbers or lists states what is printed. It is compared, in its digits:

    print(loss, ratios)  # 3.61 and [0.5, nan]: a remark after a colon
"""

from __future__ import annotations

import ast
import builtins
import functools
import io
import math
import os
import re
import sys
import tokenize
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(sorted(path.relative_to(ROOT).as_posix() for pattern in (
    "*.md", "docs/**/*.md", "recipes/*.md", "examples/**/*.md") for path in ROOT.glob(pattern)))
# Only a page that needs one of these may skip, and only where it is not installed.
OPTIONAL = {"accelerate", "datasets", "deepspeed", "lightning", "liger_kernel", "nemo_rl", "peft", "prime_rl", "slime",
            "tensorboard", "torchtitan", "transformers", "triton", "trl", "verl", "vllm"}


class Block(NamedTuple):
    """Code of a page. `language`: the word after the fence, "" without one, "indented", or "hidden" for a comment."""

    page: str
    line: int
    language: str
    code: str


@functools.cache
def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").parse(text)


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in their order, also those in lists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for token in parsed(text):
        if token.type == "fence":
            language = (token.info.split() or [""])[0]
            found.append(Block(page, token.map[0] + 2, language, token.content))
        elif token.type == "code_block":
            found.append(Block(page, token.map[0] + 1, "indented", token.content))
        elif token.type == "html_block" and token.content.startswith("<!-- test:"):
            code = re.fullmatch(r"<!-- test:[^\n]*\n(.*?)-->\s*", token.content, re.DOTALL)
            assert code, f"{page}:{token.map[0] + 1}: a comment of a test needs code between its first and last line"
            found.append(Block(page, token.map[0] + 2, "hidden", code[1]))
    return found


def python(page: str) -> list[Block]:
    """What runs of a page."""
    return [block for block in blocks(page) if block.language in ("python", "hidden")]


NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf)(?![\w.])")


def stated(code: str) -> list[tuple[int, str]]:
    """The line of each `print` with a comment of plain numbers or lists, and the comment."""
    comments = {token.start[0]: token.string.lstrip("# ").partition(": ")[0]
                for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type == tokenize.COMMENT}
    calls = {node.lineno: comments.get(node.end_lineno, "") for node in ast.walk(ast.parse(code))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"}
    return [(line, comment) for line, comment in sorted(calls.items())
            if NUMBER.search(comment) and not re.search(r"[^\s\[\](),]", NUMBER.sub("", comment).replace("and", ""))]


def agrees(comment: str, printed: str) -> bool:
    """Whether what was printed has the numbers of a comment: whole ones exactly, others within their digits."""
    expected, found = NUMBER.findall(comment), NUMBER.findall(printed)

    def same(text: str, value: float) -> bool:
        if math.isnan(float(text)):
            return math.isnan(value)
        digits = re.match(r"[-+]?\d+\.(\d+)(?:e([-+]\d+))?", text)
        half = 0.5 * 10.0 ** (int(digits[2] or 0) - len(digits[1])) if digits else 0.0
        return value == float(text) or abs(value - float(text)) <= half * (1 + 1e-9)

    return len(expected) == len(found) and all(map(same, expected, map(float, found)))


def run(page: str, names: dict[str, object] | None = None) -> dict[str, object]:
    """Runs the Python blocks of a page, and returns their names. Errors show the line of the page."""
    module = types.ModuleType("page_" + re.sub(r"\W", "_", page))
    printed: dict[int, list[str]] = defaultdict(list)

    def recorded(*values: Any, **options: Any) -> None:
        printed[sys._getframe(1).f_lineno] += map(str, values)
        builtins.print(*values, **options)

    vars(module).update(names or {}, print=recorded)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        for block in python(page):
            try:
                exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec"), vars(module))
                for line, comment in stated(block.code):
                    found = " ".join(printed[block.line - 1 + line])
                    assert agrees(comment, found), f"{page}:{block.line - 1 + line}: {found!r}, stated: {comment}"
            except ModuleNotFoundError as error:
                missing = (error.name or "").partition(".")[0]
                if missing not in OPTIONAL:
                    raise
                pytest.skip(f"{page}, line {block.line}: {missing} is not installed")
    finally:
        del sys.modules[module.__name__]
    return vars(module)


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(code: str) -> Iterator[str]:
    """The commands of a console block, without prompts, comments and what they print."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        for command in re.split(r"\s(?:&&|\|\|?|;)\s", re.sub(r"(^|\s)#.*", "", line)):
            if command.strip():
                yield command.strip()


def exists(path: str) -> bool:
    """Whether a path or pattern names something in the repository, or is written by a command: a run, a build."""
    return path.startswith(("runs/", "build/", "dist/", ".venv/", "/", "~")) or any(ROOT.glob(path.removeprefix("./")))


def source_tree(folder: Path) -> None:
    """Links in a folder to what pages of the repository name by relative paths."""
    for name in ("recipes", "examples", "docs", "benchmarks"):
        os.symlink(ROOT / name, folder / name)
