"""The documentation in a real browser: every page at the width of a phone; the search, from a server and from files."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import built_site
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]
PHONE, DESK = {"width": 390, "height": 800}, {"width": 1200, "height": 900}
# What is wider than the window and does not scroll by itself: the first such elements, for the message.
WIDER = """() => document.documentElement.scrollWidth <= window.innerWidth ? "" :
    [...document.querySelectorAll("main *")].filter(one => one.getBoundingClientRect().right > window.innerWidth)
        .slice(0, 3).map(one => one.outerHTML.slice(0, 80)).join(" ")"""

# The first formula with more lines on the screen than in the text.
BROKEN = """() => {
    for (const code of document.querySelectorAll(".language-text pre > code")) {
        const range = document.createRange();
        range.selectNodeContents(code);
        const tops = new Set([...range.getClientRects()].filter(one => one.width).map(one => Math.round(one.top / 4)));
        if (tops.size > code.textContent.trimEnd().split("\\n").length) return code.textContent;
    }
    return "";
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_site.build(tmp_path_factory)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A browser with a new profile. It ends with the test, because its event loop is in the way of others."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=OPTIONS, viewport=PHONE)
        yield context
        context.close()


def watched(browser: Any, address: str) -> tuple[Any, list[str]]:
    """A new page, and the list of all that goes wrong on it."""
    page, faults = browser.new_page(), []
    page.set_default_timeout(180_000)  # milliseconds: other processes may keep all cores busy
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: request.failure == "net::ERR_ABORTED" or  # by going on to the next page
            faults.append(f"{request.failure}: {request.url}"))
    page.on("response", lambda response: response.status >= 400 and faults.append(f"{response.status}: {response.url}"))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or
            faults.append(f"elsewhere: {request.url}"))
    return page, faults


def found(page: Any, words: str) -> int:
    """The number of pages that the search finds."""
    page.locator("input[name=query]").focus()
    page.keyboard.type(words)
    page.locator(".md-search-result__item").first.wait_for()
    return page.locator(".md-search-result__item").count()


@pytest.mark.slow(reason="opens all pages")
def test_every_page_opens_without_a_fault(browser: Any, address: str, site: Path) -> None:
    page, faults = watched(browser, address)
    paths = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert len(paths) > 30
    for path in paths:
        page.goto(f"{address}/{path}")
        assert page.title(), path
        assert page.locator("h1").first.inner_text(), path
        assert not (wider := page.evaluate(WIDER)), f"{path}: wider than a phone: {wider}"
        assert not (broken := page.evaluate(BROKEN)), f"{path}: a formula goes on in the next line: {broken}"
        assert not faults, f"{path}: {faults}"


def test_faults_are_found(browser: Any, address: str) -> None:
    page, faults = watched(browser, address)
    page.goto(f"{address}/index.html")
    page.set_content(f"""<main><div style='width: 600px'>x</div><img src='http://127.0.0.1:9/x.png'>
        <img src='{address}/none.png'></main><script>console.error('a message'); missing()</script>""")
    page.wait_for_load_state("networkidle")
    assert "600px" in page.evaluate(WIDER)
    page.set_content(f"<div class=language-text><pre style='white-space: pre-wrap'><code>{'l = z_y - lse ' * 9}")
    assert "lse" in page.evaluate(BROKEN)
    page.set_content(f"<div class=language-text><pre><code>{'l = z_y - lse ' * 9}")
    assert not page.evaluate(BROKEN)
    for part in ("elsewhere: http://127.0.0.1:9/x.png", "a message", "missing is not defined",
                 f"404: {address}/none.png"):
        assert any(part in fault for fault in faults), (part, faults)


@pytest.mark.parametrize("as_files", [False, True])
def test_the_search_finds_pages(browser: Any, address: str, site: Path, as_files: bool) -> None:
    start = site.as_uri() if as_files else address
    page, faults = watched(browser, start)
    page.set_viewport_size(DESK)
    page.goto(f"{start}/index.html")
    assert found(page, "entropy") > 5
    assert not faults


def test_the_colours_can_be_changed(browser: Any, address: str) -> None:
    page, faults = watched(browser, address)
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/index.html")
    colour = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.locator("label[title='Use light colours']").click()
    assert page.evaluate(colour) != dark and not faults
