"""The report of a chain: what it says of a whole run and of parts of one, and what models cannot make it do."""

import html.parser
import json
import re

import pytest
import train_run_files as files

from r1kernels.train.data import DataError
from r1kernels.train.record import read_run
from r1kernels.train.report import _fenced, _text, write_report
from r1kernels.train.schema import ConfigError
from r1kernels.train.tables import NONE


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, their attributes and its text, checked to be nested."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = files.write_run(tmp_path_factory.mktemp("runs") / "r1")
    paths = write_report(run_dir)
    assert paths == [run_dir / name for name in ("report.md", "report.html", "curves.png")]
    return run_dir


@pytest.fixture(scope="module")
def markdown(run_dir):
    return (run_dir / "report.md").read_text()


@pytest.fixture(scope="module")
def page(run_dir):
    return Page((run_dir / "report.html").read_text())


def rows_of(markdown, heading):
    """The cells of the table under a heading."""
    table = markdown.partition(f"# {heading}\n")[2].lstrip().partition("\n\n")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]


def test_stages_stand_beside_their_family(markdown):
    head, _, *rows = rows_of(markdown, "From base (1,000 parameters)")
    assert head == ["stage", "kind", "from", "pass@1 (%)", "cons@4 (%)", "language (%)", "length (tokens)",
                    "format (%)", "cut off (%)", "reflective words"]
    assert [row[0] for row in rows] == ["base", r"r1\_zero", r"cold\_start", r"r1\_reason", "r1"]
    assert rows[1][3:] == ["50.0 ± 2.0", "60.0 ± 3.0", "80.0 ± 1.0", "50.0 ± 1.5", "90.0", "1.0", "0.75"]
    small = rows_of(markdown, r"From small\_base (8,000 parameters): distillation and RL on the same model")
    assert [row[0] for row in small[2:]] == [r"small\_base", r"small\_rl", r"small\_r1"]
    assert "128 questions x 4 samples, T 0.6, top-p 0.95, at most 64 tokens, prompts 0123456789ab" in markdown
    assert "10 of 10 stages finished, " in markdown and "Missing" not in markdown


def test_rejection_time_and_trouble_are_accounted_for(markdown, page):
    assert rows_of(markdown, "rejected")[2:] == [["wrong", "2000"], [r"mixed\_language", "596"]]
    assert rows_of(markdown, "Where the time went (seconds)")[2][:2] == ["base", "53.0"]
    share = float(re.search(r"takes ([\d.]+)% of the time of the stages", markdown)[1])
    assert 0 < share < 100
    assert len(re.findall(r"^## (\S+) \(\w+", markdown, flags=re.MULTILINE)) == 10
    trouble = {row[0]: row[1:] for row in rows_of(markdown, "What could not be scored")[2:]}
    assert trouble[r"r1\_zero"][0] == "6" and trouble[r"r1\_zero"][5] == "0 of 40"
    assert "mixed language" in "".join(page.text)


def test_glue_is_all_that_is_not_the_models_work(run_dir):
    run = read_run(run_dir)
    parts = run.stages["r1_zero"].seconds
    assert parts == pytest.approx({"sampling": 24, "scoring": 2, "logprobs": 8, "updates": 12, "the rest": 4,
                                   "evaluation": 3})
    work = sum(
        value for stage in run.stages.values() for name, value in stage.seconds.items()
        if stage.kind != "reject" and name in ("sampling", "logprobs", "updates", "training", "evaluation")
    )
    total = sum(sum(stage.seconds.values()) for stage in run.stages.values() if stage.kind != "reject")
    assert run.glue_share() == pytest.approx(1 - work / total)
    assert run.stages["traces"].seconds == {"not broken down": 50.0}


def test_the_page_needs_nothing_else_and_runs_nothing(run_dir, page):
    text = (run_dir / "report.html").read_text()
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "header", "nav", "section", "h1", "h2", "h3", "p", "a", "b",
        "ul", "li", "div", "span", "i", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "pre",
        "details", "summary", "svg", "g", "path", "defs", "clippath", "rect", "use", "text",
    }
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert links and all(value.startswith("#") for value in links)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names)) and {value[1:] for value in links} <= set(names)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text and "default-src 'none'" in text
    assert text.count("<svg") > 40 and "#26292e" not in text.partition("</style>")[2]


def test_models_write_what_they_like(run_dir, markdown, page):
    shown = files.HOSTILE.replace("\x1b", "[U+001B]").replace("\u202e", "[U+202E]")
    assert f"{shown} 10" in page.text
    assert "Compute 7+5+2+8 | <b> " in page.text
    for name in ("report.md", "report.html"):
        text = (run_dir / name).read_text()
        assert "\x1b" not in text and "\u202e" not in text
    assert f"\n````\n{shown} 10\n````\n" in markdown
    assert r"**Compute 7+5+2+8 \| \<b\>** (answer 22)" in markdown


def test_text_is_only_text():
    assert _fenced("a\n````` b") == "``````\na\n````` b\n``````"
    assert _text("<b>\n| `x` *y* [z](w)\x07") == r"\<b\> \| \`x\` \*y\* \[z\](w)\[U+0007\]"


def test_completions_before_and_after(markdown):
    section = markdown.partition(r"## r1\_zero ")[2].partition("\n## ")[0]
    assert section.count("Before, right:") == section.count("After, right:") == 1
    assert section.count("Before, wrong:") == section.count("After, wrong:") == 1


def test_long_completions_are_cut_in_the_middle(tmp_path):
    run_dir = tmp_path / "run"
    stage = {"name": "base", "kind": "pretrain"}
    files.write_config(run_dir, [stage])
    evaluation = files.evaluation(0.5, completion=f"begin {'x' * 50_000} end")
    files.write_manifest(run_dir, {"base": files.entry(stage, evaluation=evaluation)})
    for path in write_report(run_dir):
        text = path.read_text()
        assert "begin" in text and "end 22" in text and "characters ...]" in text and len(text) < 60_000


def test_numbers_of_different_evaluations_are_told_apart(tmp_path):
    run_dir = tmp_path / "run"
    stages = [{"name": "base", "kind": "model", "path": "x"}, {"name": "sft", "kind": "sft", "model": "base"},
              {"name": "more", "kind": "evaluate", "model": "sft"}]
    files.write_config(run_dir, stages)
    files.write_manifest(run_dir, {
        "base": files.entry(stages[0], evaluation=files.evaluation(0.5, pass_at_1_se=None, language=None)),
        "sft": files.entry(stages[1], evaluation=files.evaluation(0.5, temperature=1.0)),
        "more": files.entry(stages[2], summary=files.evaluation(0.75, k=64)),
    })
    write_report(run_dir)
    text = (run_dir / "report.md").read_text()
    assert "Not measured in the same way, so rows do not compare" in text and "T 1.0, " in text
    rows = rows_of(text, "From base")
    assert rows[0][4] == "cons@k (%)" and rows[2][3:6] == ["50.0", "60.0 ± 3.0", NONE]
    assert rows[4][:4] == ["more", "evaluate", "sft", "75.0 ± 2.0"]


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    run_dir = files.write_run(tmp_path / "run")
    manifest = json.loads((run_dir / "manifest.json").read_text())["stages"]
    for name in list(manifest)[5:]:
        del manifest[name]
    manifest["r1_reason"] = files.entry(files.stages()[4], "running", summary={}, evaluation=None)
    manifest["cold_start"]["evaluation"] = None
    files.write_manifest(run_dir, manifest)
    log = run_dir / "r1_reason" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]) + '{"step": 3, "rew')
    (run_dir / "r1_zero" / "timings.jsonl").unlink()
    (run_dir / "r1_zero" / "samples.jsonl").unlink()
    write_report(run_dir)
    text = (run_dir / "report.md").read_text()
    assert "4 of 10 stages finished" in text
    missing = text.partition("Missing:\n\n")[2].partition("\n\n")[0].splitlines()
    assert missing == [
        r"- r1\_zero: no timings.jsonl", r"- r1\_zero: no samples.jsonl", r"- cold\_start: no evaluation",
        r"- r1\_reason: unfinished", "- scores: not started", "- r1: not started", r"- small\_base: not started",
        r"- small\_rl: not started", r"- small\_r1: not started",
    ]
    assert [row[3] for row in rows_of(text, "From base (1,000 parameters)")[4:]] == [
        "no evaluation", "unfinished", "not started"
    ]
    assert "unfinished" in Page((run_dir / "report.html").read_text()).text


def test_a_run_that_has_not_begun(tmp_path):
    files.write_config(tmp_path, [{"name": "base", "kind": "pretrain"}])
    paths = write_report(tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html"]
    text = paths[0].read_text()
    assert "manifest.json: the run has not begun" in text and "base: not started" in text


def test_what_is_no_run_or_is_damaged_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: no config\.yaml in it"):
        write_report(tmp_path)
    files.write_config(tmp_path)
    for content in ("{", "[]", '{"stages": []}', '{"stages": {"base": 3}}', "\udcff"):
        (tmp_path / "manifest.json").write_text(content, errors="surrogateescape")
        with pytest.raises(ConfigError, match=r"manifest\.json"):
            write_report(tmp_path)
    files.write_manifest(tmp_path, {"base": files.entry(files.stages()[0])})
    files.write_lines(tmp_path / "base" / "metrics.jsonl", [{"loss": 1.0}])
    with pytest.raises(DataError, match=r"base/metrics\.jsonl, line 1: damaged"):
        write_report(tmp_path)
    (tmp_path / "base" / "metrics.jsonl").unlink()
    (tmp_path / "report.md").mkdir()
    with pytest.raises(ConfigError, match=r"report of .* cannot be written: .*report\.md: "):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.yaml"):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_report(tmp_path):
    stage = {"name": "r1", "kind": "grpo", "steps": 5}
    files.write_config(tmp_path, [stage])
    files.write_manifest(tmp_path, {"r1": files.entry(stage)})
    files.write_lines(tmp_path / "r1" / "metrics.jsonl", [files.rl_line(step, 5, 0.5, 0) for step in range(5)])
    first = [path.read_bytes() for path in write_report(tmp_path)[:2]]
    assert [path.read_bytes() for path in write_report(tmp_path)[:2]] == first
