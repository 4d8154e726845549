"""Rejection sampling: what is kept and counted, and that it goes on as if never stopped."""

import errno
from collections import Counter
from pathlib import Path

import pytest
import torch
from supervised_cases import Killed, StopAt, save_model, stage_of, timeless, write_rows

from r1kernels.rewards import EndpointError
from r1kernels.train import log, reject
from r1kernels.train import stage as stage_module
from r1kernels.train.data import Problem, Template, load_demonstrations, read_jsonl
from r1kernels.train.errors import DataError, Interrupted, StorageError
from r1kernels.train.log import read_lines
from r1kernels.train.rollout import Completions
from r1kernels.train.stage import Stage
from r1kernels.train.supervised import run_sft

RECIPE = """
run_dir: {directory}/run
precision: fp32
threads: 1
template: chat
data:
  questions: {{kind: jsonl, path: {directory}/questions.jsonl, test_path: {directory}/test.jsonl}}
scoring: {{judge: {{url: "http://127.0.0.1:1", model: judge}}, timeout_s: 60}}
stages:
  base: {{kind: model, path: {directory}/model}}
  traces:
    {{kind: reject, model: base, problems: [questions], samples_per_question: 8, questions_per_batch: 3,
     max_new_tokens: 12}}
  cold: {{kind: sft, model: base, samples: [traces], epochs: 1, batch_size: 8, window: 256}}
"""
QUESTIONS = [{"question": f"Compute {a}+{a}", "answer": str(2 * a), "id": f"q{a}"} for a in range(1, 9)]


def answers(question: str) -> list[str]:
    """What the scripted model says, each as likely as the others."""
    a = int(question.rpartition("+")[2].strip(":"))
    right, end = f"{a}+{a}={2 * a}", f"</think>\n<answer>{2 * a}</answer>"
    return [
        f"<think>{right}{end}",
        f"<think>So the sum is {right}{end}",
        f"<think>{right}</think>\n<answer>{2 * a + 1}</answer>",
        f"It is <answer>{2 * a}</answer>",
        f"<think>所以答案是十二 {right}{end}",
        f"<think>```\nprint\n```{end}",
        f"<think>{'so and so ' * 90}{end}",
        "<think>" + f"{right}\n" * 5 + end,
        f"<think>{right}{end} cut",
    ]


class ScriptedSampler:
    """Draws from `answers` by the seed; the last of them is cut off."""

    def __init__(self, model, tokenizer, check=lambda: None) -> None:
        self.tokenizer, self.check = tokenizer, check

    def update(self, model) -> None: ...

    def close(self) -> None: ...

    def sample(self, prompts, sampling) -> Completions:
        texts, finished, generator = [], [], torch.Generator().manual_seed(sampling.seed)
        for prompt in prompts:
            self.check()
            options = answers(prompt)
            drawn = int(torch.randint(len(options), (), generator=generator))
            texts.append(options[drawn].removesuffix(" cut"))
            finished.append(drawn != len(options) - 1)
        lengths = torch.tensor(list(map(len, texts)))
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        zeros = torch.zeros(mask.shape)
        return Completions(mask, mask, mask.long(), mask, zeros, texts, torch.tensor(finished))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("reject")
    save_model(directory / "model")
    write_rows(directory / "questions.jsonl", QUESTIONS)
    write_rows(directory / "test.jsonl", [{"question": "Compute 9+9", "answer": "18"}])
    return directory


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(stage_module, "TransformersSampler", ScriptedSampler)


def stage_at(home: Path, directory: Path, *overrides: str, interrupt=None, name: str = "traces") -> Stage:
    return stage_of(RECIPE.format(directory=home), name, directory, overrides, interrupt)


def left(stage: Stage) -> tuple:
    """All that the stage leaves, without what depends on the clock."""
    return (stage.directory / "selected.jsonl").read_bytes(), timeless(stage.directory / "metrics.jsonl")


def test_what_is_correct_and_readable_is_kept_and_the_rest_counted(home, tmp_path, scripted):
    stage = stage_at(home, tmp_path)
    summary = reject.run(stage)
    rows = read_lines(stage.directory / "selected.jsonl")
    assert len(rows) == summary["kept"] and len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"step", "id", "question", "prompt", "completion", "answer"}
        assert row["prompt"] == f"{row['question']}:" and row["completion"] in answers(row["prompt"])[:2]
        assert row["id"].partition("/")[0] == f"q{int(row['answer']) // 2}"
    assert summary["questions"] == 8 and summary["samples"] == 64
    rejected = summary["rejected"]
    assert sum(rejected.values()) + summary["kept"] == 64
    common = ("wrong", "unfinished", "unreadable", "mixed language", "code block", "repetition", "duplicate")
    assert all(rejected[name] > 0 for name in common), rejected
    assert rejected["unscorable"] == rejected["surplus"] == summary["timeouts"] == summary["crashes"] == 0
    lines = read_lines(stage.directory / "metrics.jsonl")
    assert [line["samples"] for line in lines] == [24, 24, 16]
    assert {name: sum(line[name] for line in lines) for name in rejected} == rejected
    assert {"sampling", "total", "tokens_per_second"} <= lines[0]["timing"].keys()


def test_the_counts_are_those_of_the_script(home, tmp_path, scripted, monkeypatch):
    """Every answer exactly once, so that each reason is known."""
    draws = iter(list(range(9)) * 8)
    monkeypatch.setattr(torch, "randint", lambda *_, **options: next(draws))
    summary = reject.run(stage_at(home, tmp_path, "stages.traces.samples_per_question=9"))
    assert summary["kept"] == 16
    assert {name: count for name, count in summary["rejected"].items() if count} == dict.fromkeys(
        ("wrong", "unfinished", "unreadable", "mixed language", "long paragraph", "code block", "repetition"), 8
    )


def test_at_most_so_many_of_a_question_and_the_same_only_once(home, tmp_path, scripted):
    everything = reject.run(stage_at(home, tmp_path / "other", "stages.traces.samples_per_question=16"))
    stage = stage_at(home, tmp_path, "stages.traces.samples_per_question=16", "stages.traces.keep_per_question=1")
    summary = reject.run(stage)
    template = Template("r1_zero", None)
    rows = read_jsonl(stage.directory / "selected.jsonl")
    per_question = Counter(prompt for prompt, _ in load_demonstrations(rows, template))
    assert set(per_question.values()) == {1} and summary["kept"] == len(per_question) == 8
    assert summary["rejected"]["surplus"] + summary["rejected"]["duplicate"] == (
        everything["rejected"]["duplicate"] + everything["kept"] - summary["kept"]
    )


@pytest.mark.parametrize(("checks", "how"), [(0, Killed), (25, Killed), (30, Interrupted), (66, Killed)])
def test_stopped_and_resumed_it_selects_the_same(home, tmp_path, scripted, checks, how):
    whole = stage_at(home, tmp_path / "whole")
    summary = reject.run(whole)
    with pytest.raises((Interrupted, Killed)):
        reject.run(stage_at(home, tmp_path, interrupt=StopAt(checks, how)))
    stage = stage_at(home, tmp_path)
    assert reject.run(stage) == summary and left(stage) == left(whole)
    # A finished stage that runs again does nothing and says the same.
    assert reject.run(stage_at(home, tmp_path, interrupt=StopAt(0, Killed))) == summary
    assert left(stage) == left(whole)


@pytest.mark.parametrize("writes", [0, 1, 3, 8])
def test_killed_while_it_writes_it_selects_the_same(home, tmp_path, scripted, monkeypatch, writes):
    """Before, between and after the rows of a batch, in the middle of a line."""
    whole = stage_at(home, tmp_path / "whole")
    summary = reject.run(whole)
    stage, done, write = stage_at(home, tmp_path), iter(range(writes)), log.append_line

    def half(path, line):
        if next(done, None) is None:
            with open(path, "ab") as file:
                file.write(b'{"step": 0, "id": "q')
            raise Killed
        write(path, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(reject, "append_line", half)
        patch.setattr(log, "append_line", half)
        reject.run(stage)
    assert reject.run(stage_at(home, tmp_path)) == summary and left(stage) == left(whole)


def test_a_full_disk_is_no_wrong_setting_and_the_stage_continues_later(home, tmp_path, scripted, monkeypatch):
    stage = stage_at(home, tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr("os.fsync", full)
        reject.run(stage)
    whole = stage_at(home, tmp_path / "whole")
    assert reject.run(stage) == reject.run(whole) and left(stage) == left(whole)


def test_without_any_sample_left_it_says_what_became_of_them(home, tmp_path, scripted, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_, **options: 2)
    for _ in range(2):
        with pytest.raises(DataError, match=r"stage 'traces' .*'kept': 0.*'wrong': 64"):
            reject.run(stage_at(home, tmp_path))


def test_samples_that_were_lost_meanwhile_are_noticed(home, tmp_path, scripted):
    with pytest.raises(Interrupted):
        reject.run(stage_at(home, tmp_path, interrupt=StopAt(60)))
    stage = stage_at(home, tmp_path)
    path = stage.directory / "selected.jsonl"
    assert len(read_lines(path)) > 0
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(DataError, match=r"selected\.jsonl is damaged: it holds 0 samples .* expected \d+; .*--from"):
        reject.run(stage)


class FakeJudge:
    """Finds equal texts equivalent, and does not answer about 3+3."""

    def equivalent(self, question: str, answer: str, reference: str) -> float:
        if question.endswith("3+3"):
            raise EndpointError("no answer")
        return float(answer == reference)


def test_open_questions_are_judged_if_asked_for(home, tmp_path, scripted, monkeypatch):
    """Of the questions, 1+1 has an answer the judge finds right, 2+2 one it finds wrong, and 3+3 gets no verdict."""
    problems = [Problem(f"q{a}", f"Compute {a}+{a}", answer, "open") for a, answer in [(1, "2"), (2, "5"), (3, "6")]]
    monkeypatch.setattr(Stage, "problems", lambda self, names: problems)
    monkeypatch.setattr(torch, "randint", lambda *_, **options: 0)
    monkeypatch.setattr(reject, "make_judge", lambda recipe: FakeJudge())
    one = "stages.traces.samples_per_question=1"
    summary = reject.run(stage_at(home, tmp_path, "stages.traces.judge=true", one))
    assert summary["kept"] == 1 and summary["rejected"]["wrong"] == summary["rejected"]["unscorable"] == 1
    assert summary["endpoint_failures"] == 1
    # Without the judge, nothing can be said of their answers.
    assert reject.run(stage_at(home, tmp_path / "other", one))["kept"] == 3


def test_the_model_itself_is_sampled_and_what_it_wrote_can_be_learned(home, tmp_path):
    """A model of noise has no correct answer, so the question is an open one, and nothing is asked of the format."""
    path = write_rows(tmp_path / "open.jsonl", [{"question": f"Say {a}", "kind": "open"} for a in range(4)])
    keys = [f"data.questions.path={path}", *(f"stages.traces.filters.{key}" for key in (
        "format=false", "language=null", "code_blocks=true", "line_repeats=null"))]
    stage = stage_at(home, tmp_path, *keys, "stages.traces.max_new_tokens=200", "stages.traces.samples_per_question=4")
    summary = reject.run(stage)
    assert summary["kept"] > 0 and summary["samples"] == 16 and summary["rejected"]["wrong"] == 0
    assert summary["kept"] + summary["rejected"]["unfinished"] + summary["rejected"]["unreadable"] == 16
    trained = run_sft(stage_at(home, tmp_path, *keys, name="cold"))
    assert trained["samples"] == summary["kept"]
