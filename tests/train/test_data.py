"""Data sets: what is read from files, the hub and functions, and what is refused with its file and line."""

import gzip
import json
import re
import sys

import pytest

from r1kernels.train import data as data_module
from r1kernels.train.data import (
    Pair,
    Problem,
    Template,
    check_data,
    load_demonstrations,
    load_pairs,
    load_problems,
    read_jsonl,
    read_rows,
)
from r1kernels.train.errors import ConfigError, DataError
from r1kernels.train.recipe_file import build_recipe

TESTS = {"cases": [{"args": [], "expected": 1}], "entry_point": "f"}
PLAIN, OPENED = Template("r1_zero", None), Template("r1_zero", None, open_think=True)
GRPO = {"kind": "grpo", "model": "base", "problems": ["file"]}
SFT = {"kind": "sft", "model": "base", "samples": ["file"]}
PAIRS = {"kind": "preference", "model": "base", "pairs": "file"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


class Said(list):
    def say(self, text, *, warning=False):
        assert warning
        self.append(text)


@pytest.fixture
def make(tmp_path):
    """A recipe with the data set `file`, the held-out set `sums`, and perhaps a stage that uses the former."""

    def recipe(rows=None, test=None, *, stage=None, **keys):
        keys = {"kind": "jsonl", **keys}
        for key, content in (("path", rows), ("test_path", test)):
            if content is not None:
                keys[key] = write(tmp_path / f"{key}.jsonl", *content)
        held_out = write(tmp_path / "sums.jsonl", {"question": "1+1", "answer": "2"})
        stages = {"base": {"kind": "model", "path": "x"}} | ({"more": stage} if stage else {})
        sets = {"file": keys, "sums": {"kind": "jsonl", "test_path": held_out}}
        return build_recipe({"run_dir": str(tmp_path / "run"), "data": sets, "stages": stages})

    return recipe


def sums(count, first=0):
    return [{"question": f"{number}+1?", "answer": str(number + 1)} for number in range(first, first + count)]


def gsm8k(question="2 + 2?", answer="2 + 2 = <<2+2=4>>4\n#### 4"):
    return {"question": question, "answer": answer}


def test_gsm8k_is_read_in_the_order_of_the_file(make):
    recipe = make([gsm8k(), gsm8k(" a? ", "#### $1,234,567.5 "), gsm8k("b?", "1 #### 2 #### -3"),
                   gsm8k("c?", "####x, y")])
    assert [problem[1:3] for problem in load_problems(recipe, "file", "train")] == [
        ("2 + 2?", "4"), ("a?", "$1,234,567.5"), ("b?", "-3"), ("c?", "x, y")]


def test_problems_of_every_kind(make):
    recipe = make([
        {"question": " 2 + 2? ", "answer": " 4 "}, {"question": "Which?", "answer": "B", "kind": "choice", "id": 7},
        {"question": "Hello!", "kind": "open", "language": "en"}, {"question": "f?", "answer": TESTS, "kind": "code"},
    ], language="zh")
    assert load_problems(recipe, "file", "train") == [
        Problem("path.jsonl, line 1", "2 + 2?", "4", "math", "zh"), Problem("7", "Which?", "B", "choice", "zh"),
        Problem("path.jsonl, line 3", "Hello!", "", "open", "en"),
        Problem("path.jsonl, line 4", "f?", json.dumps(TESTS), "code", "zh"),
    ]


def test_only_mathematical_references_are_read_after_their_solution(make):
    recipe = make([{"question": "x?", "answer": "a #### b", "kind": "exact"}, gsm8k("y?", "2 ####")], stage=GRPO)
    assert [problem.answer for problem in load_problems(recipe, "file", "train")] == ["a #### b", ""]
    said = Said()
    check_data(recipe, said)
    assert "1 of 2 references" in said[0] and "line 2" in said[0]


def test_columns_of_a_file_are_renamed(make):
    rows, keys = [{"problem": "x?", "answer": "B"}], {"columns": {"question": "problem"}, "answers": "choice"}
    assert load_problems(make(rows, **keys), "file", "train") == [Problem("path.jsonl, line 1", "x?", "B", "choice")]
    with pytest.raises(DataError, match=r"'file'.*'problem'"):
        load_problems(make([*rows, {"answer": "1"}], **keys), "file", "train")


BAD_ROWS = [
    ({"question": "x"}, ["answer"]), ({"question": " ", "answer": "1"}, ["question"]),
    ({"question": "x", "answer": 4}, ["answer", "4"]), ({"answer": "1"}, ["question"]),
    ({"question": "x", "answer": "y", "language": "fr"}, ["language", "fr", "en"]),
    ({"question": "x", "answer": "y", "kind": "riddle"}, ["kind", "riddle", "choice"]),
    ({"question": ["x"], "answer": "1"}, ["question"]), ([1, 2], ["list"]),
]


@pytest.mark.parametrize(("row", "named"), BAD_ROWS, ids=[str(row)[:40] for row, _ in BAD_ROWS])
def test_a_bad_row_is_named(make, row, named):
    with pytest.raises(DataError) as error:
        load_problems(make([*sums(1), row]), "file", "train")
    assert all(word in str(error.value) for word in ["path.jsonl, line 2", *named])


BAD_LINES = [
    b"{'question': 1}", b'{"question": "a?"', b"\xff\xfe{}", b'{"question": "\\ud800"}', b"NaN",
    b'{"question": "a", "deep": {"x": ["\\udfff"]}}', b'{"question": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("line", BAD_LINES, ids=[line[:30].decode("latin-1") for line in BAD_LINES])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "sums.jsonl"
    path.write_bytes(b'{"question": "a"}\n\n' + line + b'\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"sums\.jsonl, line 3: "):
        list(read_jsonl(path))


def test_a_missing_a_damaged_and_an_empty_file_are_named(make, tmp_path):
    with pytest.raises(DataError, match=r"'file'.*rows"):
        load_problems(make([]), "file", "train")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a"}\n' * 100)[:-10])
    (tmp_path / "no.jsonl.gz").write_bytes(b"no gzip")
    for name in ("none.jsonl", "cut.jsonl.gz", "no.jsonl.gz", "."):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
            list(read_jsonl(tmp_path / name))


def test_held_out_problems_are_the_first_ones(make):
    recipe = make(test=sums(200))
    assert len(load_problems(recipe, "file", "test")) == recipe.eval.questions == 128
    with pytest.raises(ConfigError, match=r"data\.file\.path"):
        load_problems(recipe, "file", "train")


def test_questions_in_both_splits_are_refused(make):
    check_data(make(sums(3), sums(3, first=3), stage=GRPO), Said())
    with pytest.raises(DataError, match=r"'file'.*'2\+1\?'"):
        check_data(make(sums(3), sums(3, first=2), stage=GRPO), Said())
    check_data(make(sums(3), sums(3, first=2)), Said())  # no stage trains on it


def test_what_a_stage_needs_is_checked_before_work(make):
    assert check_data(make(sums(1), stage=GRPO), Said())[0] == {"math"}
    code = make([{"question": "f?", "answer": TESTS, "kind": "code"}], stage=GRPO)
    assert check_data(code, Said())[0] == {"math", "code"}
    check_data(make([{"question": "q", "response": "r"}], stage=SFT), Said())
    check_data(make([{"question": "q", "chosen": "a", "rejected": "b"}], stage=PAIRS), Said())
    for stage, key in ((SFT, "response"), (PAIRS, "chosen")):
        with pytest.raises(DataError, match=rf"path\.jsonl, line 1: '{key}'"):
            check_data(make(sums(1), stage=stage), Said())


def test_references_that_cannot_be_read_are_counted(make, monkeypatch):
    monkeypatch.setattr(data_module, "check_reference", lambda text: "no number" if "?" in text else None)
    said = Said()
    check_data(make([*sums(4), {"question": "a", "answer": "??"}, {"question": "b", "answer": "two", "kind": "choice"},
                     {"question": "c", "answer": {"cases": []}, "kind": "code"}], stage=GRPO), said)
    [text] = said
    assert all(word in text for word in ("'file'", "'train'", "3 of 7", "line 5", "'??'", "no number", "'two'", "case"))
    with pytest.raises(DataError, match=r"2 of 2.*'\?'"):
        check_data(make([{"question": q, "answer": "?"} for q in "ab"], stage=GRPO), said)
    check_data(make([{"question": "a", "answer": "?", "kind": "exact"}], stage=GRPO), said)


def test_demonstrations_are_rendered_and_an_opened_thought_is_not_opened_again(make):
    selected = {"question": "x", "prompt": "p <think>", "completion": "t</think> a"}
    recipe = make([{"question": " hi ", "response": "<think>so</think> hello"}, selected])
    rows = read_rows(recipe, "file", "train")
    assert load_demonstrations(rows, PLAIN) == [
        (PLAIN.render("hi"), "<think>so</think> hello"), (PLAIN.render("x"), "<think>t</think> a")]
    opened = load_demonstrations(rows, OPENED)
    assert opened[0] == (OPENED.render("hi"), "so</think> hello")


def test_pairs_and_selected_samples(make, tmp_path):
    recipe = make([{"question": "q", "chosen": "a", "rejected": "b"}])
    assert load_pairs(recipe, "file") == [Pair("q", "a", "b")]
    path = write(tmp_path / "selected.jsonl", {"question": "q", "prompt": "p <think>", "completion": "t</think> a"})
    assert load_demonstrations(read_jsonl(path), PLAIN) == [(PLAIN.render("q"), "<think>t</think> a")]


MODULE = """
def rows(split, count, seed, fail=False, size=3):
    if fail:
        raise ValueError("too few")
    return [{"id": f"{split}-{seed}-{i}", "question": f"{split} {i}?", "answer": str(i), "response": "r", "chosen": "a",
             "rejected": "b"} for i in range(size)][:count]
"""


def test_one_function_serves_as_problems_demonstrations_and_pairs(make, tmp_path, monkeypatch):
    (tmp_path / "rows_of_mine.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    mine = {"kind": "function", "function": "rows_of_mine:rows"}
    recipe = make(**mine)
    assert load_problems(recipe, "file", "train")[1] == Problem("train-0-1", "train 1?", "1")
    assert load_problems(recipe, "file", "test")[1] == Problem("test-0-1", "test 1?", "1")
    assert load_demonstrations(read_rows(recipe, "file", "train"), PLAIN)[2] == (PLAIN.render("train 2?"), "r")
    assert load_pairs(recipe, "file")[0] == Pair("train 0?", "a", "b")
    for stage in (GRPO, SFT, PAIRS):
        check_data(make(**mine, stage=stage), Said())
    for options, message in (({"fail": True}, "too few"), ({"other": 1}, "other"), ({"size": 0}, "row")):
        with pytest.raises(DataError, match=rf"'file'.*'train'.*{message}"):
            check_data(make(**mine, options=options, held_out=False, stage=GRPO), Said())
    with pytest.raises(ValueError, match="nothing_here"):
        check_data(make(kind="function", function="rows_of_mine:nothing_here"), Said())


def test_a_local_directory_is_read_as_from_the_hub(make, tmp_path):
    pytest.importorskip("datasets", reason="kind 'hub' needs the package datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", {"problem": "1+1", "solution": "2", "extra": None},
          {"problem": "2+2", "solution": "4"})
    write(folder / "test.jsonl", {"problem": "3+3", "solution": "6"})
    hub = {"kind": "hub", "path": str(folder), "test_split": "test",
           "columns": {"question": "problem", "answer": "solution"}}
    recipe = make(**hub, stage=GRPO)
    assert [problem[1:3] for problem in load_problems(recipe, "file", "train")] == [("1+1", "2"), ("2+2", "4")]
    assert [problem[1:3] for problem in load_problems(recipe, "file", "test")] == [("3+3", "6")]
    check_data(recipe, Said())
    for changes, word in (({"split": "dev"}, "dev"), ({"path": str(tmp_path / "no")}, "no"),
                          ({"columns": {"question": "q"}}, "'q'")):
        with pytest.raises(DataError, match=rf"'file'.*'train'.*{word}"):
            load_problems(make(**hub | changes), "file", "train")
