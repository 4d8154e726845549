"""The page of `r1kernels bench`: well-formed, without requests, escaped, and good where sections are missing."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import bench_results
import pytest

from r1kernels.bench import report
from r1kernels.bench.report import rows, words
from r1kernels.bench.report.ceilings import FAMILIES
from r1kernels.bench.report.marks import MARKS, mark

VOID = {"meta", "br", "img", "hr", "input", "link"}
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "_hidden", "$\\frac{1}{2}$", "a|b\nc",
           "{{ 7 * 7 }}", "\x00\x1b[31m", "\ud800", "\N{ROBOT FACE} \N{CJK UNIFIED IDEOGRAPH-6F22}", "]]></svg>",
           "&amp;", "%s%n", ""]


class Page(HTMLParser):
    """The elements of a page; an element that is not closed, or closed out of order, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def small() -> dict[str, Any]:
    """The loss head alone at two vocabularies, and the errors of one quantity."""
    results = bench_results.example()
    results["rows"] = [row for row in results["rows"] if row["series"] == "vocabulary" and row["shape"]["V"] < 40_000]
    results["fidelity"] = results["fidelity"][:4]
    return results


def checked(results: dict[str, Any], folder: Path) -> Page:
    """The page of results, after the checks that every page must pass."""
    path = folder / "bench.html"
    report.write_html(json.loads(json.dumps(results)), path)
    assert [file.name for file in folder.iterdir()] == ["bench.html"]
    page = Page(path.read_text(encoding="utf-8"))
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "img", "iframe", "link", "object", "image"}, names
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
        assert "url(h" not in (attributes.get("style") or "")
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert {link["href"][1:] for link in page.all("a")} <= set(ids) and len(ids) == len(set(ids))
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 20 for picture in page.all("svg"))
    assert len(page.all("svg")) == len(page.all("figure"))
    text = "".join(page.text)
    assert not re.search(r"\bnan\b|\binf\b|None", text)
    return page


def test_the_page_of_a_complete_measurement(tmp_path: Path) -> None:
    page = checked(bench_results.example(), tmp_path)
    text = "".join(page.text)
    assert len(page.all("svg")) == 4 + 1 + 4 + 4  # growth, active tokens, ceilings, errors
    assert "http" not in (tmp_path / "bench.html").read_text()
    for fact in ("Example CPU, 2 threads", "avx512_bf16", "24.0 GiB", "2026-11-30", "0123456789abcdef",
                 "abc1234", "trl 1.16.0", "11.0 GB/s", "350 GFLOP/s", "QuACK", "pip install quack-kernels", "2.7x",
                 "linear_grpo_loss"):
        assert fact in text, fact
    assert page.all("meta")[1] == {"name": "viewport", "content": "width=device-width, initial-scale=1"}


def test_the_same_results_give_the_same_picture() -> None:
    assert report.head(small()).svg() == report.head(small()).svg()


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    return lambda results: [results.pop(key) for key in keys]


def each(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda results: [row.update(values) for row in results[section]]


def only_ours(results: dict[str, Any]) -> None:
    for section in ("rows", "fidelity"):
        results[section] = [row for row in results[section] if row["implementation"] == "r1kernels"]


def all_of(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda results: [change(results) for change in changes] and None


EXACT = {"quantiles": {"0.5": 0.0, "0.99": 0.0}, "max": 0.0}


@pytest.mark.parametrize("change, pictures", [
    pytest.param(without("fidelity", "left_out", "peers", "commit"), 4, id="no fidelity"),
    pytest.param(without("ceilings"), 3, id="no ceilings"),
    pytest.param(without("rows"), 1, id="no rows"),
    pytest.param(without("rows", "fidelity", "ceilings", "left_out"), 0, id="nothing"),
    pytest.param(all_of(only_ours, each("rows", ratio=None, max_error=None, iqr_s=None)), 5, id="only ours"),
    pytest.param(each("rows", series=None, bytes_moved=None), 2, id="no series"),
    pytest.param(each("rows", peak_extra_bytes=None, flops=0), 3, id="no memory"),
    pytest.param(each("rows", median_s=None, peak_extra_bytes=0), 1, id="no time"),
    pytest.param(each("rows", median_s=float("nan"), bytes_moved=float("inf")), 1, id="not a number"),
    pytest.param(all_of(without("ceilings"), each("rows", shape=None, dtype=None)), 1, id="no shape"),
    pytest.param(all_of(without("rows"), each("fidelity", **EXACT)), 1, id="exact"),
    pytest.param(all_of(without("rows"), each("fidelity", quantiles={}, max=None, nonfinite=7)), 0, id="all NaN"),
    pytest.param(all_of(without("rows"), each("fidelity", max=float("inf"))), 1, id="infinite"),
])
def test_a_page_without_some_of_it(change: Callable[[dict[str, Any]], None], pictures: int, tmp_path: Path) -> None:
    results = small()
    change(results)
    page = checked(results, tmp_path)
    assert len(page.all("svg")) == pictures
    assert ("No operation was measured." in "".join(page.text)) == (not rows.rows(results))


def test_texts_of_a_result_file_are_escaped(tmp_path: Path) -> None:
    results = bench_results.example()
    for key in ("date", "torch", "device", "instruction_set", "sources", "commit", "size", "r1kernels", "python"):
        results[key] = HOSTILE[len(key) % len(HOSTILE)]
    results["peers"] = dict.fromkeys(HOSTILE, HOSTILE[0])
    results["ceilings"]["gemm_flops_per_s"][HOSTILE[1]] = 1e12
    for number, text in enumerate(HOSTILE):
        for row in results["rows"][number::len(HOSTILE)]:
            row.update({"implementation": text, "variant": HOSTILE[number - 1]})
        results["rows"][number].update({"op": text, "dtype": text, "pass": text, "shape": {"N": 4, "V": 9, text: text}})
        results["fidelity"][number].update({"implementation": text, "dtype": text})
    for entry in results["fidelity"]:
        entry["quantity"] = HOSTILE[0] if entry["quantity"] == "logprob" else HOSTILE[1]
    results["left_out"] = [{"what": text, "why": text} for text in HOSTILE]
    text = "".join(checked(results, tmp_path).text)
    assert "<script>alert(1)</script>" in text and "{{ 7 * 7 }}" in text and "$\\frac{1}{2}$" in text


def test_a_cell_of_markdown_cannot_end_its_row() -> None:
    results = small()
    results["rows"][0]["implementation"] = "a|b\n<script>"
    lines = report.table(results, "linear_grpo_loss").splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 and "<script" not in "".join(lines)


def test_a_table_names_what_its_columns_share_once() -> None:
    table = report.table(small(), "linear_grpo_loss", series="vocabulary")
    head, _, ours, *others = table.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert head == "| linear_grpo_loss, N 2,048, H 1,024 | V 8,192 | V 32,768 |"
    assert ours == "| r1kernels | 368 ms, 48.0 MiB | 1.47 s, 192 MiB |" and len(others) == 4
    with pytest.raises(ValueError, match=r"linear_grpo.*linear_grpo_loss"):
        report.table(small(), "linear_grpo")


@pytest.mark.parametrize("results, named", [([], "list"), ({}, "None"), ({"format": 2}, "2")])
def test_another_document_is_refused(results: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        report.write_html(results, tmp_path / "bench.html")
    assert not list(tmp_path.iterdir())


def test_every_picture_is_a_file_of_svg_with_the_hash_of_its_data() -> None:
    results = bench_results.example()
    pictures = [report.head(results), report.roofline(results), report.shares(results, next(iter(FAMILIES)))]
    assert len({picture.data_hash for picture in pictures}) == len(pictures)
    for picture in pictures:
        text = picture.svg(standalone=True)
        root = ET.fromstring(text)
        assert root.get("aria-label") == words.printable(picture.alt) and float(root.get("width")) > 400
        assert picture.data_hash in text and "prefers-color-scheme" in text


def test_a_picture_of_the_head_needs_its_series() -> None:
    results = small()
    assert report.head(results).data["panels"]["time"]["r1kernels"]
    each("rows", series=None)(results)
    assert report.head(results) is None


def test_the_share_of_a_ceiling_is_that_of_bytes_or_products() -> None:
    """A copy at 11 GB/s takes 2 s for 22 GB; products at 350 GFLOP/s take 4 s for 1400 GFLOP."""
    results = small()
    results["rows"] = [
        bench_results.row("copying", "r1kernels", {"N": 1, "V": 2}, 4.0, bytes_moved=22 * 10**9),
        bench_results.row("multiplying", "r1kernels", {"N": 1, "V": 2, "H": 3}, 5.0, bytes_moved=22 * 10**9,
                          flops=1400 * 10**9)]
    found = {family: list(report.shares(results, family).data["rows"].values()) for family in ("logits", "hidden")}
    assert found == {"logits": [{"r1kernels": pytest.approx(0.5)}], "hidden": [{"r1kernels": pytest.approx(0.8)}]}


def test_errors_from_logits_and_from_hidden_states_are_apart() -> None:
    results = bench_results.example()
    copies = [{**entry, "max": 7e-5, "shape": {**entry["shape"], "H": 64}} for entry in results["fidelity"][:2]]
    kept = {("logprob", "bfloat16"), ("logprob", "float32"), ("advantage", "float32")}
    originals = [entry for entry in results["fidelity"] if (entry["quantity"], entry["dtype"]) in kept]
    results["fidelity"] = copies + originals
    titles = [picture.title for picture in report.errors(results)]
    whats = ("logprob", "advantage", "logprob from hidden states")
    assert titles == [f"Error of {what} against float64" for what in whats]
    head, _, logprob, advantage, from_hidden = report.fidelity_table(results).splitlines()
    assert head == "| bfloat16 | r1kernels | torch eager | TRL |"
    assert logprob == "| logprob | 1.0e-07, 9.0e-06 | 1.0e-03, 9.0e-02 | 4.0e-04, 3.6e-02, 3 not finite |"
    assert advantage.startswith("| advantage (float32) | 0, 0 |")
    assert from_hidden == "| logprob from hidden states | 1.0e-07, 7.0e-05 |  |  |"
    with pytest.raises(ValueError, match="fidelity"):
        report.fidelity_table({**results, "fidelity": []})


def test_active_tokens_have_a_line_for_each_reason() -> None:
    [picture] = report.active(bench_results.example())
    lines = picture.data["lines"]
    assert set(lines) == {
        f"{name}, {why}" for name in ("r1kernels", "torch eager") for why in ("clipped", "advantage 0")}
    assert lines["r1kernels, clipped"][-1] == [1.0, 1.0] and len(lines["r1kernels, clipped"]) == 4
    assert lines["r1kernels, advantage 0"][0][1] < lines["r1kernels, clipped"][0][1]


def test_marks_differ_by_colour_and_by_marker() -> None:
    colors, markers = zip(*MARKS.values(), strict=True)
    assert len(set(colors)) == len(set(markers)) == len(MARKS)
    assert mark("r1kernels, float32 logits") == mark("r1kernels") and mark("another") == mark("another")


@pytest.mark.parametrize("write, value, expected", [
    (words.seconds, 0.0123456, "12.3 ms"), (words.seconds, 0.9999, "1.00 s"), (words.seconds, 17.2, "17.2 s"),
    (words.seconds, 4.2e-6, "4.20 µs"), (words.seconds, None, ""), (words.memory, 294 * 2**20, "294 MiB"),
    (words.memory, 1260 * 2**20, "1.23 GiB"), (words.memory, 0, "0 B"), (words.times, 29.04, "29x"),
    (words.times, 0.407, "0.41x"), (words.error, 0, "0"), (words.error, 1.26e-6, "1.3e-06"),
    (words.percent, 0.031, "3.10 %"), (words.whole, 151936, "151,936"), (words.times, float("nan"), ""),
    (words.seconds, True, ""), (words.times, 1234.5, "1,200x"),
])
def test_numbers_are_written_with_their_units(write: Callable[[Any], str], value: Any, expected: str) -> None:
    assert write(value) == expected
