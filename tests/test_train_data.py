"""Files of problems, demonstrations and preferences: what is read, and what is refused with its file and line."""

import json

import pytest

from r1kernels.train.data import (
    DataError,
    Demonstration,
    Pair,
    Problem,
    load_gsm8k,
    load_jsonl,
    load_math,
    load_pairs_jsonl,
    read_selected,
)

TESTS = {"cases": [{"args": [], "expected": 1}], "entry_point": "f"}


def selected(path):
    return read_selected(path, lambda question: f"[{question}]")


def row(question="2 + 2?", answer="2 + 2 = <<2+2=4>>4\n#### 4"):
    return json.dumps({"question": question, "answer": answer})


def test_problems_in_file_order(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(
        "\n".join([row(), "", row(" a? ", "#### $1,234,567.5 "), row("b?", "1 #### 2 #### -3"), row("c?", "####x, y")])
        + "\n"
    )
    assert load_gsm8k(path) == load_gsm8k(str(path))
    assert load_gsm8k(path) == [
        Problem("sums-1", "2 + 2?", "4"),
        Problem("sums-3", "a?", "$1234567.5"),
        Problem("sums-4", "b?", "-3"),
        # Only a number loses its commas: elsewhere they separate.
        Problem("sums-5", "c?", "x, y"),
    ]


BAD = [
    ("{'question': 1}", "not JSON .*expected one JSON object a line"),
    ('{"question": "a?"', "not JSON"),
    (b"\xff\xfe{}", "not JSON"),
    ("[1, 2]", "expected a JSON object, got list"),
    ('{"question": "a?"}', "no 'answer', found: question"),
    ("{}", "no 'question', found: no key"),
    (row(answer="no mark"), "'answer' must end in '#### ' and the reference, got 'no mark'"),
    (row(answer="four\n####  "), "'answer' must end in '#### '"),
    ('{"question": "a?", "answer": 4}', "'answer' must be a string that is not blank, got 4"),
    ('{"question": " ", "answer": "#### 4"}', "'question' must be a string that is not blank"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[str(line)[:30] for line, _ in BAD])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "sums.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(row().encode() + b"\n\n" + line + b"\n" + row().encode())
    with pytest.raises(DataError, match=rf"sums\.jsonl, line 3: {message}"):
        load_gsm8k(path)


@pytest.mark.parametrize("load", [load_gsm8k, load_math, load_jsonl, load_pairs_jsonl, selected])
def test_a_missing_file_a_directory_and_an_empty_file_are_named(tmp_path, load):
    with pytest.raises(DataError, match=r"cannot read data file .*none\.jsonl: No such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"cannot read data file .*: Is a directory"):
        load(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds nothing; expected one JSON object a line"):
        load(empty)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_problems_of_every_kind(tmp_path):
    path = lines(
        tmp_path / "mixed.jsonl",
        {"question": " 2 + 2? ", "answer": " 4 "},
        {"question": "Which?", "answer": "B", "kind": "choice", "id": 7},
        {"question": "Hello!", "kind": "open", "language": "zh"},
        {"question": "f?", "answer": TESTS, "kind": "code"},
    )
    assert load_jsonl(path, "zh") == [
        Problem("mixed-1", "2 + 2?", "4", "math", "zh"),
        Problem("7", "Which?", "B", "choice", "zh"),
        Problem("mixed-3", "Hello!", "", "open", "zh"),
        Problem("mixed-4", "f?", json.dumps(TESTS), "code", "zh"),
    ]
    for bad, message in (
        ({"question": "x", "answer": "y", "language": "fr"}, "'language' is 'fr', expected one of en, zh"),
        ({"question": "x", "answer": "two", "kind": "choice"}, "'answer' is 'two', expected the letter of an option"),
        ({"question": "x", "answer": "{}", "kind": "code"}, "'answer' holds no tests of a program: tests need"),
        ({"question": "x", "answer": "y", "kind": "poem"}, "'kind' is 'poem', expected one of math, choice, "),
        ({"question": "x"}, "no 'answer', found: question"),
        ({"question": "x", "answer": None}, "'answer' must be a string that is not blank, got None"),
        ({"answer": "x"}, "no 'question', found: answer"),
    ):
        with pytest.raises(DataError) as error:
            load_jsonl(lines(tmp_path / "bad.jsonl", {"question": "x", "answer": "y"}, bad))
        assert "bad.jsonl, line 2: " + message in str(error.value)


def test_math_pairs_and_selections(tmp_path):
    path = lines(tmp_path / "m.jsonl", {"problem": " x? ", "answer": " \\frac12 ", "level": 3})
    assert load_math(path) == [Problem("m-1", "x?", "\\frac12")]
    path = lines(tmp_path / "p.jsonl", {"question": "q", "chosen": " a ", "rejected": "b"})
    assert load_pairs_jsonl(path) == [Pair("p-1", "q", "a", "b")]
    row = {"question": "q", "prompt": "p<think>", "completion": "c"}
    path = lines(tmp_path / "s.jsonl", {"id": "one", "question": "q", "prompt": " p ", "completion": " c\n"}, row)
    assert selected(path) == [Demonstration("one", "[q]", " c\n"), Demonstration("2", "[q]", "<think>c")]
    opened = read_selected(path, lambda question: f"[{question}] <think>")
    assert [sample.completion for sample in opened] == ["c\n", "c"]
    for load, keys in ((load_math, "problem"), (load_pairs_jsonl, "question"), (selected, "question")):
        with pytest.raises(DataError, match=rf"bad\.jsonl, line 1: no '{keys}', found: x"):
            load(lines(tmp_path / "bad.jsonl", {"x": 1}))
