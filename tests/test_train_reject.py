"""Rejection sampling: what is kept and counted, and that it goes on as if never stopped."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from supervised_cases import Killed, StopAt, save_model, stage_of, write_rows

from r1kernels.train import selection
from r1kernels.train.data import DataError, Problem, read_selected
from r1kernels.train.files import write_atomically
from r1kernels.train.interrupt import Interrupted
from r1kernels.train.metrics import read_metrics
from r1kernels.train.rollout import Completions
from r1kernels.train.schema import ConfigError
from r1kernels.train.stage import Stage
from r1kernels.train.stages import reject, sft

RECIPE = """
run_dir: {directory}/run
threads: 1
template: chat
data:
  sums: {{kind: arithmetic}}
  questions: {{kind: jsonl, path: {directory}/questions.jsonl}}
scoring: {{judge: {{url: "http://127.0.0.1:1", model: judge}}}}
stages:
  - {{name: base, kind: model, path: {directory}/model}}
  - name: traces
    kind: reject
    model: base
    problems: [questions]
    samples_per_question: 8
    questions_per_batch: 3
    max_new_tokens: 12
  - {{name: cold, kind: sft, model: base, samples: [traces], epochs: 1, batch_size: 8, window: 256}}
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
        f"<think>{'so and so ' * 80}{end}",
        "<think>" + f"{right}\n" * 5 + end,
        f"<think>{right}{end} cut",
    ]


class ScriptedSampler:
    """Draws from `answers` by torch's generator; the last of them is cut off."""

    def __init__(self, model, tokenizer, check=lambda: None) -> None:
        self.check = check

    def sample(self, prompts, sampling) -> Completions:
        texts, finished = [], []
        for prompt in prompts:
            self.check()
            options = answers(prompt)
            drawn = int(torch.randint(len(options), ()))
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
    return directory


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(reject, "TransformersSampler", ScriptedSampler)


def stage_at(home: Path, directory: Path, *overrides: str, interrupt=None, name: str = "traces") -> Stage:
    return stage_of(RECIPE.format(directory=home), name, directory, overrides, interrupt)


def files(stage: Stage) -> dict[str, bytes]:
    names = ("selected.jsonl", "report.json", "progress.json", "metrics.jsonl")
    return {name: (stage.directory / name).read_bytes() for name in names}


def test_what_is_correct_and_readable_is_kept_and_the_rest_counted(home, tmp_path, scripted):
    stage = stage_at(home, tmp_path)
    summary = reject.run(stage)
    rows = [json.loads(line) for line in (stage.directory / "selected.jsonl").read_text().splitlines()]
    assert len(rows) == summary["kept"] and len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "question", "prompt", "completion", "answer"}
        assert row["prompt"] == f"{row['question']}:" and row["completion"] in answers(row["prompt"])[:2]
        assert row["id"].partition("/")[0] == f"q{int(row['answer']) // 2}"
    assert summary["questions"] == 8 and summary["samples"] == 64
    assert summary["answered"] == len({row["question"] for row in rows}) <= 8
    rejected = summary["rejected"]
    assert sum(rejected.values()) + summary["kept"] == 64
    common = ("wrong", "unfinished", "unreadable", "mixed language", "code block", "repetition", "duplicate")
    assert all(rejected[name] > 0 for name in common), rejected
    assert rejected["unscorable"] == rejected["surplus"] == summary["timeouts"] == summary["crashes"] == 0
    report = json.loads((stage.directory / "report.json").read_text())
    assert report["stage"] == "traces" and report["settings"]["samples_per_question"] == 8
    assert {key: report[key] for key in summary} == summary
    lines = read_metrics(stage.directory / "metrics.jsonl")
    assert [line["samples"] for line in lines] == [24, 24, 16]
    assert {name: sum(line[name] for line in lines) for name in rejected} == rejected


def test_the_counts_are_those_of_the_script(home, tmp_path, scripted, monkeypatch):
    """Every answer exactly once, so that each reason is known."""
    draws = iter(list(range(9)) * 8)
    monkeypatch.setattr(torch, "randint", lambda *_: next(draws))
    summary = reject.run(stage_at(home, tmp_path, "stages.traces.samples_per_question=9",
                                  "stages.traces.filters.paragraph=200"))
    assert summary["kept"] == 16 and summary["answered"] == 8
    assert {name: count for name, count in summary["rejected"].items() if count} == dict.fromkeys(
        ("wrong", "unfinished", "unreadable", "mixed language", "long paragraph", "code block", "repetition"), 8
    )


def test_at_most_so_many_of_a_question_and_the_same_only_once(home, tmp_path, scripted):
    everything = reject.run(stage_at(home, tmp_path / "other", "stages.traces.samples_per_question=16"))
    stage = stage_at(home, tmp_path, "stages.traces.samples_per_question=16", "stages.traces.keep_per_question=1")
    summary = reject.run(stage)
    per_question = Counter(sample.prompt for sample in read_selected(stage.directory / "selected.jsonl", str))
    assert set(per_question.values()) == {1} and summary["kept"] == summary["answered"] == everything["answered"]
    assert summary["rejected"]["surplus"] + summary["rejected"]["duplicate"] == (
        everything["rejected"]["duplicate"] + everything["kept"] - summary["kept"]
    )


@pytest.mark.parametrize("how", [Interrupted, Killed])
@pytest.mark.parametrize("checks", [0, 25, 30, 66])
def test_stopped_and_resumed_it_selects_the_same(home, tmp_path, scripted, how, checks):
    whole = stage_at(home, tmp_path / "whole")
    summary = reject.run(whole)
    with pytest.raises((Interrupted, Killed)):
        reject.run(stage_at(home, tmp_path, interrupt=StopAt(checks, how)))
    stage = stage_at(home, tmp_path)
    assert not (stage.directory / "selected.jsonl").exists()
    assert reject.run(stage) == summary and files(stage) == files(whole)
    # Asked once more, a finished stage does nothing and says the same.
    assert reject.run(stage_at(home, tmp_path, interrupt=StopAt(0, Killed))) == summary
    assert files(stage) == files(whole)


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_killed_while_it_writes_it_selects_the_same(home, tmp_path, scripted, monkeypatch, batches):
    """After the samples of a batch and before its progress; and at last before the file gets its name."""
    whole = stage_at(home, tmp_path / "whole")
    summary = reject.run(whole)
    stage = stage_at(home, tmp_path)
    left = iter(range(batches))

    def write(path, text):
        if next(left, None) is None:
            raise Killed
        write_atomically(path, text)

    def finish(self):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(selection, "write_atomically", write)
        patch.setattr(selection.Selection, "finish", finish)
        reject.run(stage)
    assert reject.run(stage_at(home, tmp_path)) == summary and files(stage) == files(whole)


def test_without_any_sample_left_it_says_what_became_of_them(home, tmp_path, scripted, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_: 2)
    stage = stage_at(home, tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=r"stage 'traces' kept none of 64 samples \(wrong 64\), expected at least"):
            reject.run(stage)
    assert json.loads((stage.directory / "report.json").read_text())["rejected"]["wrong"] == 64
    assert not (stage.directory / "selected.jsonl").exists()


def test_what_was_damaged_meanwhile_is_named(home, tmp_path, scripted):
    with pytest.raises(Interrupted):
        reject.run(stage_at(home, tmp_path, interrupt=StopAt(60)))
    stage = stage_at(home, tmp_path)
    growing = stage.directory / ".selected.jsonl"
    growing.write_bytes(growing.read_bytes()[:10])
    with pytest.raises(DataError, match=r"\.selected\.jsonl is damaged: 10 bytes, expected at least \d+"):
        reject.run(stage)
    (stage.directory / "progress.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot go on from .*progress\.json"):
        reject.run(stage)


class FakeJudge(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        shown = json.loads(body["messages"][-1]["content"])
        verdict = "yes" if shown["answer"] == shown["reference answer"] else "no"
        if shown["question"].endswith("3+3"):
            self.send_error(400)
            return
        reply = json.dumps({"choices": [{"message": {"content": f"Verdict: {verdict}"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments) -> None:
        pass


def test_open_questions_are_judged_if_asked_for(home, tmp_path, scripted, monkeypatch):
    """Of the questions, 1+1 has an answer the judge finds right, 2+2 one it finds wrong, and 3+3 gets no verdict."""
    problems = [Problem(f"q{a}", f"Compute {a}+{a}", answer, "open") for a, answer in [(1, "2"), (2, "5"), (3, "6")]]
    monkeypatch.setattr(Stage, "problems", lambda self, names: problems)
    monkeypatch.setattr(torch, "randint", lambda *_: 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeJudge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"scoring.judge.url=http://127.0.0.1:{server.server_port}"
        small = ("stages.traces.samples_per_question=1", url, "scoring.judge.retries=0")
        judged = stage_at(home, tmp_path, "stages.traces.judge=true", *small)
        summary = reject.run(judged)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert summary["kept"] == 1 and summary["rejected"]["wrong"] == summary["rejected"]["unscorable"] == 1
    # Without the judge, nothing can be said of their answers.
    assert reject.run(stage_at(home, tmp_path / "other", *small))["kept"] == 3


def test_the_model_itself_is_sampled_and_what_it_wrote_can_be_learned(home, tmp_path):
    """A model of noise has no correct answer, so the question is an open one, and nothing is asked of the format."""
    path = write_rows(tmp_path / "open.jsonl", [{"question": f"Say {a}", "kind": "open"} for a in range(4)])
    keys = [f"data.questions.path={path}", *(f"stages.traces.filters.{key}" for key in (
        "format=false", "language=null", "code_blocks=true", "line_repeats=null"))]
    stage = stage_at(home, tmp_path, *keys, "stages.traces.max_new_tokens=200", "stages.traces.samples_per_question=4")
    summary = reject.run(stage)
    assert summary["kept"] > 0 and summary["samples"] == 16 and summary["rejected"]["wrong"] == 0
    assert summary["kept"] + summary["rejected"]["unfinished"] + summary["rejected"]["unreadable"] == 16
    trained = sft.run(stage_at(home, tmp_path, *keys, name="cold"))
    assert trained["samples"] == summary["kept"]


@pytest.mark.parametrize(("override", "message"), [
    ("problems=[]", "'problems' is empty"),
    ("problems=[traces]", "'problems' names 'traces', expected a data set"),
    ("samples_per_question=0", "'samples_per_question' is 0, expected at least 1"),
    ("filters.language=2", "'filters.language' is 2.0, expected a number from 0 to 1"),
    ("filters.line_repeats=1", "'filters.line_repeats' is 1, expected at least 2"),
    ("filters.languages=1", r"unknown key 'languages' in 'stages.traces.filters' \(did you mean 'language'\?\)"),
])
def test_settings_that_cannot_be_used(home, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        stage_at(home, tmp_path, f"stages.traces.{override}")


def test_a_judge_that_is_asked_for_must_be_known(home, tmp_path):
    with pytest.raises(ConfigError, match=r"'judge' is true and 'scoring\.judge' is missing"):
        stage_at(home, tmp_path, "stages.traces.judge=true", "scoring.judge=null")
