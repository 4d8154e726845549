"""Measured numbers of README and docs come from committed result files, and none is written by hand."""

import json
import re
from pathlib import Path

import bench_results
import make_numbers
import number_blocks
import pytest
from number_blocks import BLOCKS, Missing

# What a page may say outside of a block: settings, limits, and exact counts by formula. Each with the reason.
ALLOWED = {
    "buffers of 1 MiB and more": "a limit in csrc/cpu",
    "At most 4 GiB": "a limit in csrc/cpu",
    "64 MiB, or one float32 result": "a limit in csrc/cpu",
    "at most 8 MiB of logits": "a limit in r1kernels/ops",
    "copies 4.3 TB/s": "an assumption from which the limits in tests/gpu follow",
    "needs about 21 KB in flight": "the product of assumptions from which the limits in tests/gpu follow",
    "have 48 KB in flight, the gradient 32 KB": "threads times bytes of a thread times blocks",
    "all rows active | 2 | 7.5 GB": "products times V times H times 4 bytes",
    "60 % clipped | 1 | 2.5 GB": "products times V times H times 4 bytes",
    "take less than 2 GiB": "a limit in r1kernels/ops/linear",
    "about 80 MiB of temporary memory": "ten tensors of 2^20 float64 numbers",
    "1 MiB of results": "a limit in r1kernels/rewards",
    "16 MiB in": "a limit in r1kernels/rewards",
    "files above 16 MiB": "a limit in r1kernels/train",
    "more than 30 seconds": "a limit of torchrun",
    "2 GiB more for its context": "an assumption of r1kernels plan",
    "45 % of 989 TFLOP/s": "an assumption of benchmarks/scaling.py",
    "60 % of the memory's bandwidth": "an assumption of benchmarks/scaling.py",
    "75 % of 450 GB/s": "an assumption of benchmarks/scaling.py",
    "of 50 GB/s a GPU": "an assumption of benchmarks/scaling.py",
    "behind 80 % of the computation": "an assumption of benchmarks/scaling.py",
    "18 times the bytes": "671 divided by 37, the parameters of DeepSeek-V3 and those of a token",
    "more than 80 % of the memory": "a limit in benchmarks/scaling.py",
    "15 microseconds times log2(ranks)": "an assumption of benchmarks/scaling.py",
    "half of the time of decoding 64": "computed by benchmarks/scaling.py",
    "first four minutes": "the order of stages in benchmarks/run_on_gpu.sh",
    "five minutes and a training loop": "what a reader has",
    "about 11 minutes on two idle cores": "what a contributor should expect",
    "need about 10 GB of memory": "what a contributor should expect",
    "(5 GB, not in CI)": "what a contributor should expect",
    "at most 1 MiB from a program": "a limit in r1kernels/rewards",
    "of 16 MB and 1,024 files": "a limit in r1kernels/rewards",
    "longer than 1 MiB is ended": "a limit in r1kernels/rewards",
    "about 0.5 GB in addition to the limit": "a bound on what the kernel of the system adds to a limit",
}
UNITS = (
    r"ns|us|µs|ms|s|sec|seconds?|min|minutes?|hours?|h|[KMGT]i?B|[kMGTP]?FLOP/s|[kKMGT]?i?B/s|tokens/s|x(?!\s\d)|times|%|percent"
    r"|tests?|passed"
)
WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|sixty|"
    "eighty|ninety|hundreds?|thousands?|dozens"
)
LONG_UNITS = r"(?:nano|micro|milli)?seconds?|minutes?|hours?|(?:kilo|mega|giga|tera|kibi|mebi|gibi|tebi)bytes?|percent"
COMPARED = r"(?:as|more|less|faster|slower|smaller|larger|shorter|longer)\b"
MEASURED = re.compile("|".join((
    rf"(?<![\w.,-])(?!0 times)\d[\d.,]*[ \u00a0]?(?:{UNITS}|{LONG_UNITS})(?![\w/])",
    rf"(?i:\b(?:{WORDS})[ -](?:{LONG_UNITS})\b)",
    rf"(?i:\b(?:(?:{WORDS})\s+times|twice|thrice|half)\s+{COMPARED})",
    rf"(?i:(?:\d|\b(?:{WORDS}))-?fold\b)", r"(?i:\bspeed-?ups?\b)", r"(?i:\bhalf\s+(?:of\s+)?the\s+(?:time|memory)\b)",
)))


def prose(text: str) -> str:
    """A page without generated blocks and code."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", make_numbers.MARKS.sub("", text))
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"(?m)^(?: {4}|\t).*$", "", text))


def spelled(phrase: str) -> str:
    """A pattern of a phrase, wherever its lines break."""
    return r"\s+".join(map(re.escape, phrase.split()))


def measured(text: str) -> list[str]:
    """The lines of a page's prose with a number that looks measured."""
    text = prose(re.sub("|".join(map(spelled, ALLOWED)), "", text))
    return [text[text.rfind("\n", 0, match.start()) + 1: text.find("\n", match.end())]
            for match in MEASURED.finditer(text)]


ROOT = make_numbers.ROOT
SCANNED = [*make_numbers.pages(), *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
           *sorted(ROOT.glob("examples/**/README.md"))]


@pytest.mark.parametrize("page", SCANNED, ids=lambda page: str(page.relative_to(make_numbers.ROOT)))
def test_no_measured_number_is_written_by_hand(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "README.md" and page.parent == make_numbers.ROOT and not make_numbers.MARKS.search(text):
        pytest.skip("README.md has no generated block yet")
    assert not measured(text), f"{page.name}: use a block of docs/make_numbers.py"


def test_every_allowed_number_is_still_on_a_page() -> None:
    texts = [page.read_text(encoding="utf-8") for page in SCANNED]
    assert not [phrase for phrase in ALLOWED if not any(re.search(spelled(phrase), text) for text in texts)]
    assert all(ALLOWED.values())


@pytest.mark.parametrize("text", [
    "takes 12 ms", "takes 12ms.", "1.5 GiB of memory", "is 2.6x as fast", "is 2.6 times as fast", "reaches 83 %",
    "83% of it", "at 4.8 TB/s", "1,234 tokens/s", "| 323 ms, 294 MiB |", "all 1,200 tests pass", "about 30 minutes",
    "350 GFLOP/s", "is three times as fast", "is ten times faster", "is twice as fast", "gives a tenfold gain",
    "gives a 10-fold gain", "takes twelve milliseconds", "takes 12 milliseconds", "needs two gigabytes",
    "needs 1.5 gigabytes", "has a speedup of 3", "is 20% faster", "is thirty percent faster", "takes half of the time",
])
def test_the_scan_finds_measured_numbers(text: str) -> None:
    assert measured(f"Before.\nIt {text} here.\n")


@pytest.mark.parametrize("text", [
    "V = 151,936 and H = 1,024", "temperature 0.7", "`12 ms`", "    12 ms", "```\n12 ms\n```", "TRL 1.16",
    "0 times -inf", "3 units", "<!-- numbers: head-table -->\n12 ms\n<!-- numbers: end -->", "arXiv 2402.03300",
    "fp32 logits", "read three times", "twice the error", "half of the groups", "the second one", "a second loss",
    "manifold", "a second walk",
])
def test_the_scan_leaves_out_sizes_and_code(text: str) -> None:
    assert not measured(f"Before.\n\n{text}\n")


def test_the_generator_changes_nothing() -> None:
    made = make_numbers.make(make_numbers.pages())
    assert not make_numbers.outdated(made), "run: python docs/make_numbers.py"
    for path, picture in made.pictures.items():
        assert "<script" not in path.read_text() and picture.alt


# Result files that no page shows -> the code that reads them.
READERS = {
    "*/gpu.json": "benchmarks/choose.py",  # its argument
    "mutation.json": "benchmarks/mutation.py",
    "scaling.json": "tests/project/test_scaling.py",
}


def unread(results: Path, shown: set[Path]) -> list[str]:
    """The result files that are neither shown on a page nor read by code."""
    files = [path.relative_to(results) for path in sorted(results.rglob("*")) if path.is_file()]
    return [str(path) for path in files
            if results / path not in shown and not any(path.match(pattern) for pattern in READERS)]


def test_every_result_file_is_shown_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, read = set(), number_blocks.read
    monkeypatch.setattr(number_blocks, "read", lambda path: (shown.add(path), read(path))[1])
    make_numbers.make(make_numbers.pages())
    assert len(shown) > 8
    assert not unread(number_blocks.RESULTS, shown), "show it in a block of docs/number_blocks.py, or delete it"
    for pattern, code in READERS.items():
        assert pattern.startswith("*/") or Path(pattern).name in (make_numbers.ROOT / code).read_text(), pattern


def test_a_result_file_that_nothing_reads_is_found(tree: Path) -> None:
    assert unread(number_blocks.RESULTS, {number_blocks.BENCH}) == ["recipe/a.json"]
    (number_blocks.RESULTS / "example" / "gpu.json").write_text("{}")
    assert unread(number_blocks.RESULTS, {number_blocks.BENCH}) == ["recipe/a.json"]


@pytest.mark.parametrize("name", BLOCKS)
def test_each_file_that_a_block_shows_says_where_it_comes_from(name: str) -> None:
    try:
        block = BLOCKS[name]()
    except Missing as missing:
        pytest.skip(f"{missing.path.relative_to(make_numbers.ROOT)} is missing: measure it")
    assert block.text or block.pictures
    for path in block.files:
        result, text = number_blocks.read(path), number_blocks.source(path)
        fields = [field for field in ORIGIN if field in result]
        assert fields and all(str(result[field]) in text for field in fields), path
    assert block.files or "not measured" in block.text


# What a result file says about its origin; CONTRIBUTING.md has a line for each kind. `sources` has two other names: the
# tree of csrc/, and the kernels of a GPU.
ORIGIN = ("device", "torch", "r1kernels", "triton", "nvcc", "date", "sources", "csrc_tree", "cuda_sources")
MEASURED_FILE = {"device", "torch", "r1kernels", "date", "sources"}
OTHER_KINDS = {
    "gpu.json": {"device", "torch", "r1kernels", "triton", "sources"},
    "ptxas.json": {"nvcc", "cuda_sources"},
    "aot/*.json": {"triton", "sources"},
    "scaling.json": {"assumptions"},
}
FORMS = {"date": r"\d{4}-\d\d-\d\d", "sources": r"[0-9a-f]{7,}", "cuda_sources": r"[0-9a-f]{7,}",
         "torch": r"\d+\.\d+.*", "r1kernels": r"\d+\.\d+.*", "triton": r"\d+\.\d+.*",
         "nvcc": r"\d+\.\d+.*", "device": r"\S.*"}


def wrong_origin(name: str, result: dict) -> list[str]:
    """What a result file does not say, or says without need, about its origin."""
    needed = next((fields for kind, fields in OTHER_KINDS.items() if Path(name).match(kind)), MEASURED_FILE)
    said = {"sources" if field in ("csrc_tree", "kernels") else field: value for field, value in result.items()
            if field in (*ORIGIN, "kernels", "assumptions")}
    wrong = needed - set(said) if needed is MEASURED_FILE else needed ^ set(said)
    return [f"{name}: {field}" for field in sorted(wrong)] + [
        f"{name}: {field} is {value!r}" for field, value in said.items()
        if field in FORMS and not re.fullmatch(FORMS[field], str(value))]


def test_each_result_file_says_what_its_kind_must_say() -> None:
    files = {str(path.relative_to(number_blocks.RESULTS)): json.loads(path.read_text())
             for path in number_blocks.RESULTS.rglob("*.json")}
    assert len(files) > 8 and not [wrong for item in files.items() for wrong in wrong_origin(*item)]
    text = (make_numbers.ROOT / "CONTRIBUTING.md").read_text()
    for kind in OTHER_KINDS:
        assert f"`{kind}`" in text, kind


@pytest.mark.parametrize("name, change", [
    ("a/b.json", {"device": None}), ("a/b.json", {"date": "today"}), ("a/b.json", {"sources": None}),
    ("a/b.json", {"torch": ""}), ("aot/b.json", {}), ("ptxas.json", {}),
    ("scaling.json", {}),
])
def test_a_result_file_without_its_origin_is_found(name: str, change: dict) -> None:
    fine = {"device": "Example", "torch": "2.13.0", "r1kernels": "0.2.0", "date": "2026-11-30", "sources": "89abcdef"}
    assert wrong_origin("a/b.json", fine) == []
    assert wrong_origin(name, {field: value for field, value in (fine | change).items() if value is not None})


# ---- the generator on a small tree ---------------------------------------------------------------------------------

@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with the results of a made-up device and recipe, and a page with a few of their blocks."""
    results = tmp_path / "benchmarks" / "results"
    files = {"ROOT": tmp_path, "RESULTS": results, "PICTURES": tmp_path / "docs" / "pictures",
             "BENCH": results / "example" / "bench.json", "RECIPES": results / "recipe"}
    for name, path in files.items():
        monkeypatch.setattr(number_blocks, name, path)
    for name in ("ROOT", "PICTURES"):
        monkeypatch.setattr(make_numbers, name, files[name])
    for path, content in ((files["BENCH"], bench_results.example()), (files["RECIPES"] / "a.json", recipe())):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    number_blocks.read.cache_clear()
    (tmp_path / "docs").mkdir()
    (tmp_path / "recipes").mkdir()
    for page in ("docs/page.md", "recipes/README.md", "README.md"):
        (tmp_path / page).write_text("Nothing.\n")
    page_of(tmp_path, "head-table", "head-picture", "recipe-picture")
    yield tmp_path
    number_blocks.read.cache_clear()


def page_of(tree: Path, *names: str) -> None:
    (tree / "docs" / "page.md").write_text(
        "\n".join(f"<!-- numbers: {name} -->\nold\n<!-- numbers: end -->\n" for name in names))


def recipe() -> dict:
    curve = [{"step": step, "pass_at_1": step / 10, "reward": 0.1, "completion_length": 20.0 + step}
             for step in range(1, 9)]
    stage = {"name": "r1", "label": "R1-Zero", "pass_at_1": 92.8, "plus_minus": 1.8, "language_consistency": 14.0}
    return {"format": 1, "recipe": "recipes/demo_r1.yaml", "seed": 0, "date": "2026-11-30", "device": "Example",
            "instruction_set": "avx2", "threads": 1, "r1kernels": "0.2.0", "torch": "2.13.0", "sources": "89abcdef",
            "commit": "abc", "seconds": 250, "curves": {"r1_zero": curve}, "stages": [stage]}


OTHER_FILES = {"amx-table", "trl-step", "student-topk", "plan-memory", "sampling-replay", "scaling-costs",
               "gpu-instructions"}


def test_every_block_is_written_and_then_up_to_date(tree: Path) -> None:
    page_of(tree, *(name for name in BLOCKS if name not in OTHER_FILES))
    made = make_numbers.make(make_numbers.pages(tree))
    assert not made.missing and make_numbers.write(made)
    page = (tree / "docs" / "page.md").read_text()
    assert "old" not in page and "92.8 ± 1.8" in page and "2026-11-30" in page and "0123456789abcdef" in page
    assert "r1kernels" in page and "ms" in page and "MiB" in page
    pictures = re.findall(r"!\[[^\]]+\]\(pictures/([\w-]+\.svg)\)", page)
    assert sorted(pictures) == sorted(path.name for path in made.pictures)
    assert {"head.svg", "recipe.svg"} < {*pictures}
    assert all((tree / "docs" / "pictures" / picture).exists() for picture in pictures)
    again = make_numbers.make(make_numbers.pages(tree))
    assert again.pages == made.pages and not make_numbers.outdated(again)


def test_new_data_changes_blocks_and_pictures(tree: Path) -> None:
    make_numbers.write(make_numbers.make(make_numbers.pages(tree)))
    changed = bench_results.example()
    for row in changed["rows"]:
        row["median_s"] *= 2 if row["implementation"] == "TRL" else 1
    number_blocks.BENCH.write_text(json.dumps(changed))
    number_blocks.read.cache_clear()
    names = {path.name for path in make_numbers.outdated(make_numbers.make(make_numbers.pages(tree)))}
    assert {"page.md", "head.svg"} == names


def test_a_picture_that_no_page_shows_is_removed(tree: Path) -> None:
    make_numbers.write(make_numbers.make(make_numbers.pages(tree)))
    (tree / "docs" / "pictures" / "old.svg").write_text("<svg/>")
    assert [path.name for path in make_numbers.write(make_numbers.make(make_numbers.pages(tree)))] == ["old.svg"]


def test_a_missing_file_is_named_in_the_block(tree: Path) -> None:
    number_blocks.BENCH.unlink()
    made = make_numbers.make(make_numbers.pages(tree))
    assert made.missing["head-table"] == number_blocks.BENCH
    assert "benchmarks/results/example/bench.json" in made.pages[tree / "docs" / "page.md"]


@pytest.mark.parametrize("text, named", [
    ("<!-- numbers: unheard-of -->\n<!-- numbers: end -->\n", "unheard-of"),
    ("<!-- numbers: head-table -->\nwithout an end\n", "head-table"),
    ("<!-- numbers: head-table -->\n\n<!-- numbers: recipe-table -->\n<!-- numbers: end -->\n", "head-table"),
    ("<!-- numbers: end -->\n", "end"),
])
def test_a_wrong_block_is_an_error_that_names_it(tree: Path, text: str, named: str) -> None:
    (tree / "README.md").write_text(text)
    with pytest.raises(ValueError, match=f"README.md.*{named}"):
        make_numbers.make(make_numbers.pages(tree))
    assert (tree / "README.md").read_text() == text
