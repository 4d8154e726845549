"""Data sets and prompts: what is read, and what is refused with its file and line."""

import json

import pytest

from r1kernels.train.data import DataError, Problem, load_gsm8k
from r1kernels.train.prompt import R1_ZERO_TEMPLATE, render


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'question': 1}", "not JSON .*expected one JSON object a line"),
        ('{"question": "a?"', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"question": "a?"}', "no 'answer'; expected the keys 'question' and 'answer', found: question"),
        ("{}", "no 'question'; .* found: none"),
        (row(answer="no mark"), "'answer' must end in '#### ' and the reference, got 'no mark'"),
        (row(answer="four\n####  "), "'answer' must end in '#### '"),
        ('{"question": "a?", "answer": 4}', "'answer' must be a string that is not blank, got 4"),
        ('{"question": " ", "answer": "#### 4"}', "'question' must be a string that is not blank"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "sums.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(row().encode() + b"\n\n" + line + b"\n" + row().encode())
    with pytest.raises(DataError, match=rf"sums\.jsonl, line 3: {message}"):
        load_gsm8k(path)


def test_a_missing_file_a_directory_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read data file .*none\.jsonl: No such file"):
        load_gsm8k(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"cannot read data file .*: Is a directory"):
        load_gsm8k(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no problem; expected one JSON object a line"):
        load_gsm8k(empty)


def test_the_prompt_is_the_template_around_the_question():
    before, after = R1_ZERO_TEMPLATE.split("{question}")
    assert render(" What is {question}? {x} ") == f"{before}What is {{question}}? {{x}}{after}"
    assert render("2 + 2").endswith("User: 2 + 2. Assistant:")
    assert render("2 + 2", open_think=True) == render("2 + 2") + " <think>"
    with pytest.raises(ValueError, match="question must not be blank"):
        render(" \n")
