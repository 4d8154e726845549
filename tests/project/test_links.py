"""Links of the pages outside of docs/ lead to files and headings of the repository, as GitHub shows them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pages
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

OUTSIDE = [page for page in pages.PAGES if not page.startswith("docs/")]


def parsed(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def links(path: Path) -> list[str]:
    """The targets of links and images, without those of other sites."""
    inline = [one for token in parsed(path) for one in token.children or ()]
    found = [str(one.attrs.get("href") or one.attrs.get("src")) for one in inline if one.type in ("link_open", "image")]
    return [link for link in found if not urlsplit(link).scheme]


def anchors(path: Path) -> set[str]:
    """Of headings, as GitHub makes them; a heading that is there twice gets a number. mkdocs reads `{ #name }`."""
    tokens = parsed(path)
    found: set[str] = set()
    for token, inline in itertools.pairwise(tokens):
        if token.type != "heading_open":
            continue
        text = "".join(one.content for one in inline.children or () if one.type in ("text", "code_inline"))
        text, _, given = text.partition("{ #")
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-{sum(re.sub(r'-[0-9]+$', '', one) == slug for one in found)}")
        found |= {given.rstrip(" }")} if given else set()
    return found


def broken(path: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for link in links(path):
        parts = urlsplit(link)
        there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        there = there / "README.md" if there.is_dir() and (there / "README.md").exists() else there
        if not there.exists() or (parts.fragment and there.suffix == ".md" and
                                  unquote(parts.fragment) not in anchors(there)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", OUTSIDE)
def test_links_lead_to_files_and_headings(page: str) -> None:
    assert broken(pages.ROOT / page) == []


def test_the_pages_are_found_and_have_links() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "recipes/README.md",
            "examples/ppo/README.md"} <= set(OUTSIDE)
    assert len(links(pages.ROOT / "README.md")) > 20


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One `two`, three!\n\n## Twice\n\n## Twice\n\n## TRL { #trl }\n")
    page = tmp_path / "a.md"
    page.write_text("# Here\n\n[a](b.md) [b](b.md#one-two-three) [c](#here) [d](b.md#twice-1) [e](b.md#trl)\n"
                    "[f](https://example.org/#none)\n\n| [g](b.md#twice) |\n|---|\n| `[h](none.md)` |\n")
    assert broken(page) == []
    page.write_text("[a](none.md) [b](b.md#none) [c](#none) [d](b.md#twice-2) ![e](none.png)\n\n"
                    "| [f](b.md#no) |\n|---|\n")
    assert len(broken(page)) == 6
