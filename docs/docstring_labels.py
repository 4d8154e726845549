"""How docstrings look on the site. They are written to be read in the code, and a few things need other marks here.

- "Memory:", "Equivalent to:" and "Source:" begin a paragraph, with a bold label.
- Two arguments or attributes that share a description are two entries.
- A description that begins with ">" is no quotation.
- The text of "Returns:" begins with the type: without it, a part that ends with a colon would be taken for one.
- Names of the public interface and pages of docs/ are links.

`r1kernels.rewards` has functions and modules of the same name, as `code`. The functions are public.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

PACKAGE = ast.parse((Path(__file__).resolve().parents[1] / "r1kernels/__init__.py").read_text(encoding="utf-8"))
PUBLIC = next(ast.literal_eval(node.value) for node in PACKAGE.body
              if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__")
# Most docstrings mean the argument of this name, and not the function.
LINKED = [name for name in PUBLIC if name not in ("__version__", "importance_weights")]

LABEL = re.compile(r"\n*^(Memory|Equivalent to|Source): ", re.MULTILINE)
PAIR = re.compile(r"^( +)(?!\w+Error)(\w+), (\w+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
QUOTATION = re.compile(r"^( +\w+: )>", re.MULTILINE)
RETURNS = re.compile(r"^(Returns:\n +)(?=\S)", re.MULTILINE)
NAME = re.compile(rf"(?<!\[)`(?:r1kernels\.)?({'|'.join(LINKED)})`")
PAGE = re.compile(r"\bdocs/([\w/]+\.md)")


class DocstringLabels(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        rewards = pkg["rewards"]
        alone = griffe.visit("rewards", filepath=rewards.filepath, parent=pkg,
                             code=rewards.filepath.read_text(encoding="utf-8"))
        for name, function in alone.functions.items():
            if rewards[name].is_module:
                rewards.set_member(name, function)
                self.on_object(obj=function)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if not obj.docstring:
            return
        text = LABEL.sub(r"\n\n**\1.** ", obj.docstring.value)
        text = PAIR.sub(r"\1\2: \4\n\1\3: see `\2`.", text)
        text = QUOTATION.sub(r"\1\\>", text)
        if obj.is_function and obj.returns is not None:
            text = RETURNS.sub(lambda begin: f"{begin[0]}{obj.returns}: ", text)
        text = NAME.sub(lambda name: name[0] if name[1] == obj.name else f"[{name[0]}][r1kernels.{name[1]}]", text)
        obj.docstring.value = PAGE.sub(r"[docs/\1](../\1)", text)
