"""The documentation builds without a warning, its links lead somewhere, and the API reference has every public name."""

from __future__ import annotations

import functools
import html
import inspect
import json
import re
import runpy
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import built_site
import pages
import pytest

import r1kernels
from r1kernels import objectives, rewards


class Page(HTMLParser):
    """What the tests look at in a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.kinds: dict[str, str] = {}  # of entries of the API reference, by the name of what they describe
        self.kind = ""
        self.links: list[str] = []
        self.resources: list[str] = []
        self.texts: dict[str, list[str]] = defaultdict(list)
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given["id"]} if given.get("id") else set()
        classes = (given.get("class") or "").split()
        if "doc-object" in classes:
            self.kind = next(name for name in classes if name not in ("doc", "doc-object")).removeprefix("doc-")
        elif "doc-heading" in classes and given.get("id"):
            self.kinds[given["id"]] = self.kind
        if tag == "a" or given.get("rel") in ("next", "prev", "canonical"):
            self.links += [given["href"]] if given.get("href") else []
        else:
            self.resources += [given[name] for name in ("src", "href", "srcset", "data") if given.get(name)]
        # Code within a sentence is not part of its text; a block of code is one text.
        if tag in ("title", "h1", "p", "pre") or (tag == "code" and self.open[-1:] == ["p"]):
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_site.build(tmp_path_factory)


@pytest.fixture(scope="module")
def read(site: Path) -> dict[str, Page]:
    """The pages by their path on the site."""
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def target(site: Path, page: str, link: str) -> str:
    """Where a link within the site leads to."""
    return ((site / page).parent / unquote(urlsplit(link).path)).resolve().relative_to(site.resolve()).as_posix()


def is_elsewhere(link: str) -> bool:
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def test_every_page_of_the_repository_is_on_the_site(read: dict[str, Page]) -> None:
    assert {"changelog.html", "contributing.html", "security.html", "recipes.html", "examples/ppo.html"} <= set(read)
    for page in pages.PAGES:
        if page.startswith("docs/"):
            assert re.sub(r"\.md$", ".html", page.removeprefix("docs/")) in read, page


def test_links_and_anchors_lead_somewhere(site: Path, read: dict[str, Page]) -> None:
    checked, broken = 0, []
    for page, content in read.items():
        for link in content.links if page != "404.html" else ():
            if is_elsewhere(link):
                continue
            checked, there = checked + 1, target(site, page, link) if urlsplit(link).path else page
            there = f"{there}/index.html".removeprefix("./") if (site / there).is_dir() else there
            anchor = unquote(urlsplit(link).fragment)
            if not (site / there).is_file() or (anchor and there in read and anchor not in read[there].ids):
                broken.append(f"{page}: {link}")
    assert not broken and checked > 1000


def test_pages_load_nothing_from_elsewhere(site: Path, read: dict[str, Page]) -> None:
    for page, content in read.items():
        for link in content.resources:
            assert not is_elsewhere(link) or link.startswith("data:"), f"{page}: {link}"
            path = urlsplit(link).path
            assert page == "404.html" or not path or (site / target(site, page, path)).exists(), f"{page}: {link}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_pages_have_a_title_and_one_heading(read: dict[str, Page]) -> None:
    for page, content in read.items():
        assert len(content.texts["title"]) == 1 and content.texts["title"][0].strip(), page
        assert page == "404.html" or len(content.texts["h1"]) == 1, page


def test_nothing_is_left_of_markdown(read: dict[str, Page]) -> None:
    """A list or a table without an empty line before it is text for mkdocs; so is a fence that it does not see."""
    for page, content in read.items():
        for text in content.texts["p"]:
            assert not re.search(r"^(?:[-*] |\d+\. |\|.*\|$|```)|\]\(|<!--", text, re.MULTILINE), f"{page}: {text}"
        assert not any("<!-- test:" in text for text in content.texts["pre"]), page


def test_every_public_name_has_an_entry(read: dict[str, Page]) -> None:
    kinds = {name: kind for content in read.values() for name, kind in content.kinds.items()}
    public = {f"r1kernels.{name}": getattr(r1kernels, name) for name in r1kernels.__all__}
    del public["r1kernels.__version__"], public["r1kernels.objectives"]
    public |= {f"r1kernels.rewards.{name}": getattr(rewards, name) for name in rewards.__all__}
    presets = {f"r1kernels.objectives.{name}": value for name, value in vars(objectives).items()
               if inspect.isfunction(value) and value.__module__ == objectives.__name__ and not name.startswith("_")}
    assert {"r1kernels.objectives.grpo", "r1kernels.objectives.reinforce"} <= set(presets)
    for name, value in (public | presets).items():
        kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "attribute"
        assert kinds.get(name) == kind, f"{name} needs an entry in docs/api/, as ::: {name}"
    for module in ("trl", "verl", "verl_head", "transformers", "torchtitan", "prime_rl", "nemo_rl", "slime"):
        assert any(name.startswith(f"r1kernels.integrations.{module}.") for name in kinds), module


def returned(page: Path) -> dict[str, list[str]]:
    """The items under "Returns" of each entry of a page of the API reference, without their type."""
    found = {}
    _, *parts = re.split(r'<h\d id="([\w.]+)" class="doc doc-heading">', page.read_text(encoding="utf-8"))
    for name, entry in zip(parts[::2], parts[1::2], strict=True):
        if section := re.search(r">Returns:</span></p>\s*<ul>(.*?)\n    </ul>", entry, re.DOTALL):
            items = section[1].split('<li class="doc-section-item')[1:]
            found[name] = [html.unescape(re.sub(r"<[^>]+>", "", item.partition("doc-md-description\">")[2]))
                           for item in items]
    return found


def test_what_a_function_returns_is_one_item_with_the_text_of_its_docstring(site: Path) -> None:
    found = {name: items for page in sorted((site / "api").glob("*.html")) for name, items in returned(page).items()}
    assert {"r1kernels.linear_multi_target", "r1kernels.importance_weights"} < set(found) and len(found) > 25
    for name, items in found.items():
        assert len(items) == 1, f"{name}: {items}"
        if ".integrations." in name:  # some need their trainer
            continue
        value = functools.reduce(getattr, name.split(".")[1:], r1kernels)
        text = re.search(r"^Returns:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(value), re.MULTILINE | re.DOTALL)[1]
        assert re.findall(r"\w+", items[0]) == re.findall(r"\w+", text), name


def test_the_search_finds_text(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    assert {"statistics.html", "objectives.html"} <= {
        entry["location"].partition("#")[0] for entry in index["docs"] if "entropy" in entry["text"]}


def test_links_of_the_repository_become_links_of_the_site() -> None:
    mkdocs = pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -c constraints.txt '.[docs]'")
    hooks = runpy.run_path(str(pages.ROOT / "docs/site_hooks.py"))

    def written(page: str, text: str) -> str:
        return hooks["on_page_markdown"](text, SimpleNamespace(file=SimpleNamespace(src_uri=page)))

    assert written("recipes.md", "[a](../docs/cpu.md#exactness) [b](../examples/ppo)") == (
        "[a](cpu.md#exactness) [b](examples/ppo.md)")
    assert written("migrate/trl.md", "[s](../../SECURITY.md) [t](../cpu.md)") == "[s](../security.md) [t](../cpu.md)"
    assert written("cpu.md", "[how](../r1kernels/train/cli.py)") == "how (`r1kernels/train/cli.py`)"
    same = "`[a](none.md)`\n\n```python\nf[a](b)\n```\n\n[a](https://example.org) [b](#exactness)"
    assert written("cpu.md", same) == same
    assert written("cpu.md", "a\n\n<!-- test: set up\nx = 1\n-->\n\nb") == "a\n\n\nb"
    with pytest.raises(mkdocs.exceptions.PluginError, match=r"cpu\.md.*none\.md"):
        written("cpu.md", "[a](none.md)")
