"""The example that makes preference pairs with a judge: which pairs it keeps, and how it goes on."""

import sys

import pytest
from supervised_cases import EXAMPLES, save_model, stage_of, write_rows

from r1kernels.rewards import EndpointError
from r1kernels.train.data import load_pairs
from r1kernels.train.log import read_lines

sys.path.insert(0, str(EXAMPLES))
from judged_pairs import candidates, judge_pairs


class Wise:
    """Sees summaries, prefers the working, is unsure about 2+2 and fails at its call number `failing`."""

    def __init__(self, failing: int | None = None) -> None:
        self.asked, self.failing = [], failing

    def compare(self, question, first, second):
        assert "<think>" not in first + second
        if len(self.asked) == self.failing:
            raise EndpointError("connection refused")
        self.asked.append(question)
        return (("=" in first) - ("=" in second)) * (0.25 if question == "Compute 2+2" else 1)


@pytest.fixture
def selected(tmp_path):
    """Samples whose prompts had opened the thought: two different ones and a repeated one of each question."""
    texts = [(f"Compute {a}+{a}", f"so</think>{text}") for a in range(1, 7)
             for text in (f"It is {2 * a}.", f"{a}+{a}={2 * a}", f"It is {2 * a}.")]
    return write_rows(tmp_path / "selected.jsonl", [
        {"step": 0, "question": question, "prompt": "Assistant: <think>", "completion": text}
        for question, text in texts])


def test_candidates_are_different_and_drawn_by_the_seed(tmp_path):
    rows = [{"question": question, "prompt": "Assistant:", "completion": text}
            for question, texts in (("q", "abcdef"), ("p", "aa")) for text in texts]
    path = write_rows(tmp_path / "selected.jsonl", rows)
    drawn = [candidates(path, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4 and all(pair[0] == "q" and pair[1] != pair[2] for pair in drawn[0])


def test_pairs_on_which_the_judge_is_clear_are_kept_and_an_interruption_changes_nothing(selected, tmp_path):
    pairs, judge = candidates(selected), Wise()
    assert judge_pairs(judge, pairs, tmp_path / "pairs.jsonl", concurrency=1) == 5 and len(judge.asked) == 6
    rows = read_lines(tmp_path / "pairs.jsonl")
    assert all("=" in row["chosen"] and "=" not in row["rejected"] for row in rows)
    assert [row["question"] for row in rows] == [f"Compute {a}+{a}" for a in (1, 3, 4, 5, 6)]
    with pytest.raises(EndpointError):
        judge_pairs(Wise(failing=3), pairs, tmp_path / "other.jsonl", concurrency=1)
    with open(tmp_path / "other.jsonl", "a") as file:
        file.write('{"step": 3, "quest')  # killed in the middle of a line
    judge = Wise()
    assert judge_pairs(judge, pairs, tmp_path / "other.jsonl", concurrency=1) == 5 and len(judge.asked) == 3
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()


def test_the_file_is_a_data_set_of_pairs(selected, tmp_path):
    judge_pairs(Wise(), candidates(selected), tmp_path / "pairs.jsonl")
    write_rows(tmp_path / "test.jsonl", [{"question": "Compute 9+9", "answer": "18"}])
    stage = stage_of(f"""
run_dir: run
precision: fp32
data:
  pairs: {{kind: jsonl, path: {tmp_path}/pairs.jsonl, test_path: {tmp_path}/test.jsonl}}
stages:
  base: {{kind: model, path: {save_model(tmp_path / "model")}}}
  scores: {{kind: preference, model: base, pairs: pairs}}
""", "scores", tmp_path)
    pairs = load_pairs(stage.recipe, "pairs")
    assert [pair.chosen for pair in pairs][:2] == ["<think>so</think>1+1=2", "<think>so</think>3+3=6"]
