"""What mkdocs adds to docs/: pages that live elsewhere in the repository, and links that suit both places.

A page of the repository links to files beside it, so that its links work where it is read as text. On the site, a link
to another page leads there. A link to any other file of the repository becomes the path of that file, because the site
has no copy of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
INCLUDED = {
    "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md",
    "recipes/README.md": "recipes.md",
    **{f"examples/{name}/README.md": f"examples/{name}.md"
       for name in sorted(path.parent.name for path in ROOT.glob("examples/*/README.md"))},
    **{f"examples/{path.name}": "examples/index.md" for path in ROOT.glob("examples/README.md")},
}
PAGES = {"README.md": "index.md", **INCLUDED}  # the site's front page is written for it
SOURCES = {page: source for source, page in INCLUDED.items()}
# [text](target), outside of code; a target with a scheme or an anchor alone is left as it is.
LINK = re.compile(r"(`+).*?\1|(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", re.DOTALL)
HIDDEN = re.compile(r"^<!-- test:.*?-->\n", re.MULTILINE | re.DOTALL)  # for the tests that run a page's code
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> None:
    """Fills the section "Examples" of the navigation with the pages of examples/."""
    examples = sorted((page for page in SOURCES if page.startswith("examples/")), key=lambda page: "index" not in page)
    next(section for section in config.nav if "Examples" in section)["Examples"] = examples


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that live outside of docs/."""
    for source, page in INCLUDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page that lives at another place in the repository than on the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def rewritten(match: re.Match[str]) -> str:
        code, image, text, target, anchor = match.groups()
        if code:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            raise PluginError(f"{here}: the link to {target!r} leads to {path!r}, which is not in the repository")
        if not image and posixpath.join(path, "README.md") in PAGES:
            path = posixpath.join(path, "README.md")
        if path in PAGES or path.startswith("docs/"):
            there = PAGES.get(path, path.removeprefix("docs/"))
            return f"{image}[{text}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor or ''})"
        return text if path in text else f"`{path}`" if text == target else f"{text} (`{path}`)"

    parts = FENCE.split(HIDDEN.sub("", markdown))
    return "".join(part if number % 2 else LINK.sub(rewritten, part) for number, part in enumerate(parts))
