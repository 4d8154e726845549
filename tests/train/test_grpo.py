"""The loop of RL: what a step learns from, what it reports, and that it continues as if it had never stopped."""

import math
import random
import re

import pytest
import torch
from r1kernels.rewards import Scores
from r1kernels.train.log import read_lines
from rl_cases import StopAfter, equal, outcome, parity, stage_of

from r1kernels.train import grpo
from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.data import Problem
from r1kernels.train.errors import ConfigError, Interrupted, TrainingError
from r1kernels.train.grpo import GRPOTrainer, preference_scores, run
from r1kernels.train.update import Rollout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    stage = stage_of(tmp_path_factory.mktemp("whole"))
    return stage, run(stage)


def test_a_step_is_epochs_of_minibatches_and_is_measured(trained):
    stage, summary = trained
    lines = read_lines(stage.directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {line["step"] for line in lines if "pass_at_1" in line} == {0, 2, 3}
    for line in lines[:3]:
        assert line["first_ratio_deviation"] < 1e-4 < line["ratio_deviation"]
        assert line["reward"] == line["reward_rl_cases:parity"] and 0 < line["reward"] < 1
        assert line["kl"] >= 0 and line["entropy"] > 0 and line["grad_norm"] > 0 and line["limit"] == 6
        assert line["logprob_gap_max"] < 1e-4 and line["importance_ess"] == pytest.approx(1)
        assert {"sampling", "scoring", "logprobs", "updates", "total", "tokens_per_second"} <= line["timing"].keys()
        assert not any(name.startswith("seconds") for name in line)
    # Warm-up over 4 updates, then the full rate; the reference is new after 2 steps.
    assert [line["learning_rate"] for line in lines[:3]] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert lines[0]["kl"] < lines[1]["kl"]
    assert (summary["steps"], summary["questions"]) == (3, 12)
    assert summary["evaluation"]["pass_at_1"] == lines[-1]["pass_at_1"]
    assert {line["step"] for line in read_lines(stage.directory / "samples.jsonl")} == {0, 2, 3}
    state = torch.load(latest_checkpoint(stage.directory) / "state.pt", weights_only=True)
    assert state["optimizer"]["state"][0]["step"] == 3 * 2 and state["rollout"] is None


def test_stopped_again_and_again_it_ends_the_same(trained, tmp_path):
    rng, seen, amid = random.Random(0), set(), False
    while True:
        patience = rng.randint(2, 4) if amid else rng.randint(8, 26)
        try:
            stage = stage_of(tmp_path, [".checkpoint.every_updates=1"], interrupt=StopAfter(patience))
            run(stage)
            break
        except Interrupted:
            state = torch.load(latest_checkpoint(tmp_path / "run" / "rl") / "state.pt", weights_only=True)
            amid = state["rollout"] is not None
            seen.add((state["minibatch"], amid))
    assert {(0, False), (0, True), (1, True)} <= seen
    assert equal(outcome(stage.directory), outcome(trained[0].directory))


def test_more_steps_continue_as_if_there_had_been_as_many_from_the_start(trained, tmp_path):
    changed = [".eval.every=2", "steps=1"]
    run(stage_of(tmp_path, changed))
    stage = stage_of(tmp_path)
    run(stage)
    assert equal(outcome(stage.directory), outcome(trained[0].directory))


def test_each_epoch_asks_every_question_once(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path, ["questions=3", "oversample=1", "minibatches=1"]))
    asked = []
    for _ in range(8):
        pool, questions = trainer.next_questions()
        trainer.cursors[pool] += len(questions)
        asked += [problem.question for problem in questions]
    assert all(len(set(asked[first : first + 8])) == 8 for first in (0, 8, 16)) and asked[:8] != asked[8:16]


def test_open_problems_are_asked_where_something_judges_them(tmp_path):
    (tmp_path / "open.jsonl").write_text("".join(f'{{"question": "Say {n}", "kind": "open"}}\n' for n in range(3)))
    given = [f".data.open={{kind: jsonl, path: {tmp_path}/open.jsonl}}", "problems=[sums, open]"]
    trainer = GRPOTrainer(stage_of(tmp_path, [*given, "rewards={accuracy: 1.0, format: 1.0}"]))
    assert trainer.next_questions()[0] == "checkable" and len(trainer.pools["all"]) == 11
    assert GRPOTrainer(stage_of(tmp_path, given)).next_questions()[0] == "all"  # a reward function
    trainer = GRPOTrainer(stage_of(tmp_path, [*given, "problems=[open]", "rewards={accuracy: 1.0}"]))
    with pytest.raises(TrainingError, match=r"judge.*preference"):
        trainer.next_questions()


def test_a_preference_counts_in_the_last_steps(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path))
    item = type("Preference", (), {"model": "scores", "weight": 2.0, "last_steps": 1})()
    trainer.settings = trainer.settings.model_copy(update={"preference": [item]})
    trainer.reward_models["scores"] = Judge({" good": 1.0, " bad": -1.0})
    problems = [Problem("a", "Hi?", "", "open"), Problem("b", "1+1?", "2"), Problem("c", "Ho?", "", "open")]
    texts = [" good", " good", " bad"]
    total, parts = trainer.preference_rewards(problems, texts)
    assert not total.any() and parts == {} and trainer.next_questions()[0] == "all"
    trainer.step = 2
    total, parts = trainer.preference_rewards(problems, texts)
    assert total.tolist() == [2.0, 0.0, -2.0]
    assert parts["scores"][[0, 2]].tolist() == [1.0, -1.0] and parts["scores"][1].isnan()


class Judge:
    """A reward model that knows a few responses by heart."""

    def __init__(self, scores, target="response"):
        self.scores, self.target = scores, target

    def score(self, questions, responses):
        assert len(questions) == len(responses)
        return [self.scores[response] for response in responses]


def test_a_response_without_a_summary_scores_no_more_than_the_others():
    scores = {"<think>a</think> x": 0.5, "<think>a</think> y": -1.0, "<think>no end": 3.0, "<think>worse": -2.0,
              "<think>a</think> z": math.nan}
    found = preference_scores(Judge(scores, "summary"), ["q"] * 5, list(scores))
    assert found[:4].tolist() == [0.5, -1.0, -1.0, -2.0] and found[4].isnan()
    assert preference_scores(Judge(scores, "summary"), ["q"], ["<think>no end"]).tolist() == [3.0]  # no others
    assert preference_scores(Judge(scores), ["q"] * 5, list(scores))[2] == 3.0
    assert len(preference_scores(Judge({}), [], [])) == 0


def test_the_length_follows_its_schedule(tmp_path):
    stage = stage_of(tmp_path, ["length_schedule={1: 3}", "steps=2"])
    run(stage)
    lines = read_lines(stage.directory / "metrics.jsonl")
    assert [line["limit"] for line in lines[:2]] == [6, 3] and lines[1]["length"] <= 3 < lines[0]["length"]


def test_oversampling_trains_on_groups_that_differ(tmp_path, monkeypatch):
    seen = []
    make = GRPOTrainer.update
    monkeypatch.setattr(GRPOTrainer, "update", lambda *given: seen.append(given[1]) or make(*given))
    stage = stage_of(tmp_path, ["oversample=2", "group_size=2", "steps=2", 'rewards={"test_grpo:mostly_equal": 1.0}'])
    run(stage)
    lines = read_lines(stage.directory / "metrics.jsonl")[:2]
    assert any(line["zero_spread"] > 0.3 for line in lines)
    for line, rollout in zip(lines, seen[::2], strict=True):
        differing = (rollout.advantages.view(4, 2) != 0).all(1).sum()
        assert differing == min(4, round(8 * (1 - line["zero_spread"]))) > 0
    state = torch.load(latest_checkpoint(stage.directory) / "state.pt", weights_only=True)
    assert state["cursors"] == {"all": 16, "checkable": 0}


def mostly_equal(completions, question, **columns):
    """Differs only for questions with an even first number."""
    even = [int(re.search(r"\d+", text)[0]) % 2 == 0 for text in question]
    return [value * here for value, here in zip(parity(completions), even, strict=True)]


def test_without_anything_to_learn_the_console_warns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "IDLE_STEPS", 2)
    stage = stage_of(tmp_path, ['rewards={"test_grpo:always": 1.0}', "steps=2", "objective={preset: grpo}",
                                "measure_all=false"])
    run(stage)
    lines = read_lines(stage.directory / "metrics.jsonl")[:2]
    assert [line["zero_spread"] for line in lines] == [1, 1] and lines[0]["entropy"] is None
    assert "for 2 steps" in " ".join(capsys.readouterr().out.split())


def always(completions, **columns):
    return [1.0] * len(completions)


def test_what_cannot_be_scored_is_counted_and_teaches_nothing(tmp_path, capsys, monkeypatch):
    seen = []
    make = GRPOTrainer.update
    monkeypatch.setattr(GRPOTrainer, "update", lambda *given: seen.append(given[1]) or make(*given))
    stage = stage_of(tmp_path, ['rewards={"test_grpo:some": 1.0}', "steps=1"])
    run(stage)
    line = read_lines(stage.directory / "metrics.jsonl")[0]
    assert 0 < line["unscorable"] < 16 and 0 < line["reward"] < 1
    assert (seen[0].advantages == 0).sum() >= line["unscorable"] and seen[0].advantages.any()
    count = line["unscorable"]
    assert re.search(rf"step 0: {count} samples .*test_grpo:some {count}", " ".join(capsys.readouterr().out.split()))


def some(completions, **columns):
    """None for some of them."""
    return [None if text[:1] < "M" else value for text, value in zip(completions, parity(completions), strict=True)]


@pytest.mark.parametrize("broken", ["loss", "ratio"])
def test_training_that_cannot_go_on_is_named_and_the_checkpoint_stays(tmp_path, monkeypatch, broken):
    real, directory = grpo.minibatch_gradient, tmp_path / "run" / "rl"

    def gradient(*arguments, **options):
        metrics = real(*arguments, **options)
        return metrics | ({"loss": math.nan} if broken == "loss" else {"ratio_deviation": 0.5})

    run(stage_of(tmp_path, ["steps=1"]))
    before = outcome(directory)
    monkeypatch.setattr(grpo, "minibatch_gradient", gradient)
    with pytest.raises(TrainingError, match=rf"step 1, minibatch 0.*{'nan' if broken == 'loss' else '0.5'}"):
        run(stage_of(tmp_path))
    assert equal(outcome(directory)["state"], before["state"])


def test_advantages_of_your_own(tmp_path):
    stage = stage_of(tmp_path, ['advantages={function: "test_grpo:Rewards", options: {factor: 2.0}}', "steps=2"])
    run(stage)
    lines = read_lines(stage.directory / "metrics.jsonl")[:2]
    assert [line["largest"] for line in lines] == [2.0, 2.0] and [line["learned"] for line in lines] == [1.5, 3.5]
    state = torch.load(latest_checkpoint(stage.directory) / "state.pt", weights_only=True)
    assert state["advantages"] == {"updates": 4}
    with pytest.raises(ConfigError, match="test_grpo:Nothing"):
        run(stage_of(tmp_path / "other", ['advantages={function: "test_grpo:Nothing"}']))


class Rewards:
    """The rewards themselves, one for each token; it counts its updates."""

    def __init__(self, trainer, factor):
        assert isinstance(trainer, GRPOTrainer)
        self.factor, self.updates = factor, 0

    def __call__(self, rewards, tokens, old_logprobs, ref_logprobs):
        assert old_logprobs.shape == ref_logprobs.shape == tokens.mask.shape
        advantages = self.factor * rewards[:, None] * tokens.mask
        return advantages, {"largest": advantages.max().item()}

    def learn(self, rollout, batches):
        assert isinstance(rollout, Rollout) and rollout.advantages.shape == rollout.mask.shape
        self.updates += 1
        return {"learned": float(self.updates)}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def test_scores_are_asked_for_while_others_are_sampled(tmp_path, monkeypatch):
    trainer = GRPOTrainer(stage_of(tmp_path, ["rollout_batch_size=4"]))
    events = []

    class Scorer:
        def submit(self, texts, **columns):
            events.append("submit")
            assert all(len(column) == len(texts) for column in columns.values())
            assert columns.keys() == {"prompts", "question", "answer", "kind", "language", "lengths", "limit"}
            return type("Future", (), {"result": lambda self: events.append("result") or Scores(
                {"x": [float(len(text)) for text in texts]}, [0.0] * len(texts))})()

    trainer.scorer = Scorer()
    problems = [problem for problem in trainer.pools["all"][:4] for _ in range(4)]
    completions, scores = trainer.sample_and_score(problems)
    assert events.index("result") == events.count("submit") > 3
    assert scores.parts["x"] == [float(len(text)) for text in completions.texts]
