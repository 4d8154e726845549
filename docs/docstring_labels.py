"""How docstrings look on the site: "Memory:", "Equivalent to:" and "Source:" begin a paragraph, with a bold label."""

from __future__ import annotations

import re
from typing import Any

import griffe

LABEL = re.compile(r"\n*^(Memory|Equivalent to|Source): ", re.MULTILINE)


class DocstringLabels(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = LABEL.sub(r"\n\n**\1.** ", obj.docstring.value)
