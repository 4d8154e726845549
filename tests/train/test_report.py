"""The report of a run: its numbers, its curves, and hostile text that stays text."""

import base64
import html.parser
import json
import re

import pytest
import yaml

from r1kernels.train.errors import ConfigError, StorageError
from r1kernels.train.report import write_report

NONE = "\u2013"
EVALUATION = {
    "pass_at_1": 0.125, "pass_at_1_se": 0.01, "cons_at_k": 0.25, "cons_at_k_se": 0.02, "k": 4, "questions": 16,
    "length": 9.5, "length_se": 0.25, "language": 0.971, "language_se": 0.004, "format": 0.5, "truncated": 0.031,
    "unscorable": 7, "reflective": 0.25, "prompt_hash": "466d2d65d2c8b570", "temperature": 0.6, "top_p": 0.95,
    "max_new_tokens": 56, "seconds": 2.0, "settings": "ab",
    "examples": [{"question": "1+2?", "answer": "3", "completion": "I guess 4", "accuracy": 0.0}],
}
AFTER = [{"question": "1+2?", "answer": "3", "completion": "<think>1+2</think> <answer>3</answer>", "accuracy": 1.0}]
HOSTILE = "</pre><script>alert(1)</script>\"'><img src=x onerror=y> \x1b]52;c;aGk=\x07 \u202e \u200b \ud800 {{ 7*191 }}"


def grpo_lines(count):
    return [
        {"step": step, "reward": 1 + step / 10, "reward_accuracy": 0.5, "loss": None, "unscorable": 1, "timeouts": 0,
         "crashes": 2, "endpoint_failures": 0, **({"pass_at_1": 0.1, "pass_at_1_se": None} if step % 2 else {}),
         "timing": {"sampling": 4.0, "scoring": 1.0, "updates": 4.0, "total": 10.0 * step, "tokens_per_second": 7.0}}
        for step in range(count)
    ]


def record(kind, **more):
    return {"kind": kind, "status": "finished", "origin": [{"r1kernels": "9.8.7", "torch": "8.6"}], "settings": {},
            "inputs": {}, "output": "ab", "summary": {}, "seconds": 1.0, "evaluation": None, **more}


BASE = {"kind": "model", "path": "m"}
GRPO = {"kind": "grpo", "model": "base", "problems": ["sums"], "rewards": {"accuracy": 1.0}, "steps": 10,
        "questions": 2, "group_size": 2, "max_new_tokens": 8}


def make_run(path, stages, records, lines=None, samples=None):
    """A run directory: settings of the stages, their records, and lines of their logs."""
    path.mkdir(parents=True)
    sums = {"kind": "jsonl", "path": "sums", "test_path": "sums"}
    recipe = {"run_dir": "x", "data": {"sums": sums}, "stages": stages}
    (path / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    if records:
        (path / "manifest.json").write_text(json.dumps({"format": 2, "order": list(stages), "stages": records}))
    for file, content in (("metrics.jsonl", lines or {}), ("samples.jsonl", samples or {})):
        for name, values in content.items():
            (path / name).mkdir(exist_ok=True)
            (path / name / file).write_text("".join(json.dumps(line) + "\n" for line in values))
    return path


@pytest.fixture
def run(tmp_path):
    stages = {"base": BASE, "r1": GRPO, "kept": {"kind": "reject", "model": "r1", "problems": ["sums"]},
              "later": {"kind": "sft", "model": "base", "samples": ["kept"]}}
    records = {
        "base": record("model", evaluation=EVALUATION, summary={"parameters": 1234567}),
        "r1": record("grpo", seconds=100.0,
                     evaluation={**EVALUATION, "pass_at_1": 0.875, "reflective": 1.5, "examples": AFTER}),
        "kept": record("reject", seconds=30.0,
                       summary={"kept": 5, "timeouts": 3, "reasons": {"wrong": 42, "loop": 17}}),
    }
    return make_run(tmp_path / "demo", stages, records, {"r1": grpo_lines(10)})


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, as a browser reads them; text of tables cell by cell."""

    def __init__(self, path):
        super().__init__()
        self.in_cell = False
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.rows, self.text = set(), set(), [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, *begin):
        return next(row for row in self.rows if tuple(row[: len(begin)]) == begin)


def test_files_and_numbers(run):
    write_report(run)
    curves = sorted((run / "curves").iterdir())
    assert [path.name for path in curves] == ["r1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in curves)
    page = Page(run / "report.html")
    assert page.row("base", "model", NONE) == [
        "base", "model", NONE, "12.5 ± 1.0", "25.0 ± 2.0", "97.1 ± 0.4", "9.5 ± 0.2", "50.0", "3.1", "0.25"]
    assert page.row("r1", "grpo", "base")[3] == "87.5 ± 1.0" and page.row("r1", "grpo", "base")[-1] == "1.50"
    assert page.row("later", "sft", "base")[3] == "not measured"
    assert page.row("r1", "grpo", "base", "finished")[4:] == ["10", "0:01:42"]
    assert page.row("later", "sft", "base", "not started")[4:] == [NONE, NONE]
    assert page.row("stage", "unscorable")[1:4] == ["unscorable", "timeouts", "crashes"]
    assert page.row("r1", "10") == ["r1", "10", "0", "20", "0", "7"] and page.row("kept", NONE)[2] == "3"
    assert page.row("wrong") == ["wrong", "42"] and page.row("loop") == ["loop", "17"]
    text = " ".join(" ".join(page.text).split())
    for shown in ("3 of 4 stages", "12.5 % \u2192 87.5 %", "base to r1", "16 questions", "9.8.7", "torch 8.6",
                  "parameters 1,234,567", "Before: wrong I guess 4", "After: right <think>1+2</think>", "path: m"):
        assert shown in text


def test_the_page_needs_nothing_but_itself(run):
    write_report(run)
    page = Page(run / "report.html")
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form"}
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in page.source
    addresses = re.findall(r"(?:src|href)=\"(.{0,22})|url\((.{0,22})", page.source)
    assert all(a.startswith(("#", "data:image/png;base64,")) for pair in addresses for a in pair if a)
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.source)
    assert {base64.b64decode(image) for image in images} == {path.read_bytes() for path in (run / "curves").iterdir()}


def test_hostile_text_stays_text(tmp_path):
    example = {"question": HOSTILE, "answer": HOSTILE, "completion": HOSTILE, "accuracy": HOSTILE}
    evaluation = {**EVALUATION, "prompt_hash": HOSTILE, "examples": [example]}
    summary = {HOSTILE: HOSTILE, "reasons": {HOSTILE: 1}}
    stages = {"base": {"kind": "model", "path": HOSTILE.replace("\ud800", "")}}
    samples = {"base": [{"step": 0, **example}]}
    lines = {"base": [{"step": 0, f"reward_{HOSTILE}": 1.0, "timing": {HOSTILE: 1.0}}]}
    records = {"base": record(HOSTILE, origin=[{"r1kernels": HOSTILE}], evaluation=evaluation, summary=summary)}
    write_report(make_run(tmp_path / "run<b>", stages, records, lines, samples))
    page = Page(tmp_path / "run<b>" / "report.html")
    assert not page.tags & {"script", "b"} and not [name for name in page.attributes if name.startswith("on")]
    assert "1337" not in page.source and "{{ 7*191 }}" in page.source
    assert page.source.count("<pre>") == page.source.count("</pre>")


def test_a_huge_completion_is_shown_by_its_ends(tmp_path):
    examples = [{**AFTER[0], "completion": "begin" + "x" * 10**6 + "end"}]
    records = {"base": record("model", evaluation={**EVALUATION, "examples": examples})}
    write_report(make_run(tmp_path / "run", {"base": BASE}, records))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "beginxxx" in page and "xxxend" in page and "996208 characters" in page and len(page) < 100_000


def test_an_unfinished_run_is_reported_as_it_is(tmp_path):
    stages = {"base": BASE, "r1": GRPO}
    waiting = make_run(tmp_path / "waiting", stages, None)
    write_report(waiting)
    assert not (waiting / "curves").exists()
    assert Page(waiting / "report.html").row("r1", "grpo", "base", "not started")
    samples = [{"step": step, "question": "1+2?", "answer": "3", "completion": f"at step {step}", "accuracy": None}
               for step in range(3)]
    records = {"base": record("model"), "r1": record("grpo", status="running", seconds=0.0, origin=[])}
    started = make_run(tmp_path / "started", stages, records, {"r1": grpo_lines(100)}, {"r1": samples})
    with open(started / "r1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 100, "rew')
    write_report(started)
    page = Page(started / "report.html")
    assert page.row("r1", "grpo", "base", "unfinished")[4:] == ["100", "0:00:00"]
    text = " ".join(" ".join(page.text).split())
    assert "Before: not scored at step 0" in text and "After: not scored at step 2" in text


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(OSError, match=rf"{tmp_path}.*config\.yaml"):
        write_report(tmp_path)
    good = {"base": record("model")}
    for number, stages in enumerate([[1], {"base": "x"}, {"../up": BASE}, {"/a": BASE}]):
        with pytest.raises(ConfigError, match=str(tmp_path / str(number))):
            write_report(make_run(tmp_path / str(number), stages, good))
    run = make_run(tmp_path / "run", {"base": BASE}, good)
    (run / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(run)
