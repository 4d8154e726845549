"""The blocks of code of a page of docs/migrate."""

import re
from pathlib import Path

PAGES = Path(__file__).resolve().parents[2] / "docs/migrate"


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of every block between fences. A page has no block without a language, so a test can say
    how each is run."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (PAGES / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found and all(language for language, _ in found), page
    return found
