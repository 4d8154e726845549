"""The loop of RL: what a step learns from, what it reports, and that it continues as if it had never stopped."""

import math
import random
import re

import pytest
import torch
from rl_cases import StopAfter, equal, load_shards, outcome, parity, stage_of, timeless

import r1kernels
from r1kernels.rewards import Scores
from r1kernels.train import update
from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.data import Problem
from r1kernels.train.errors import ConfigError, Interrupted, TrainingError
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.log import read_lines
from r1kernels.train.rollout import collect
from r1kernels.train.update import Rollout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    stage = stage_of(tmp_path_factory.mktemp("whole"))
    return stage, GRPOTrainer(stage).run()


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
    optimizer = load_shards(latest_checkpoint(stage.directory))["optimizer"]
    assert {value.item() for name, value in optimizer.items() if name.endswith(".step")} == {3 * 2}
    assert state["step"] == 3


def test_stopped_again_and_again_it_ends_the_same(trained, tmp_path):
    """In evaluations, each of 12 checks, and in rollouts, each of 6."""
    rng, seen = random.Random(0), []
    while True:
        try:
            stage = stage_of(tmp_path, interrupt=StopAfter(rng.randint(3, 24)))
            GRPOTrainer(stage).run()
            break
        except Interrupted:
            seen.append(latest_checkpoint(tmp_path / "run" / "rl").name)
    assert len(set(seen)) > 2 and len(seen) > 3
    assert equal(outcome(stage.directory), outcome(trained[0].directory))


def test_one_step_ahead_it_samples_from_weights_one_step_older(tmp_path):
    """The next step is sampled while this one updates: importance weights see the difference."""
    stage = stage_of(tmp_path, ["rollout_ahead=1", "importance.mode=truncate"])
    GRPOTrainer(stage).run()
    plain, lines = stage_of(tmp_path / "plain", ["importance.mode=truncate"]), stage.directory / "metrics.jsonl"
    GRPOTrainer(plain).run()
    lines, others = read_lines(lines), read_lines(plain.directory / "metrics.jsonl")
    assert lines[0]["logprob_gap_max"] < 1e-4 and all(line["logprob_gap_max"] > 1e-3 for line in lines[1:3])
    assert all(line["logprob_gap_max"] < 1e-4 for line in others[:3])
    assert timeless(lines[0]) == timeless(others[0])
    assert all(line["first_ratio_deviation"] < 1e-4 for line in lines[:3])  # to the weights before the updates


@pytest.mark.few(2)
@pytest.mark.parametrize("truncated", ["top_p=0.8", "top_k=9", "min_p=0.1"])
def test_truncated_sampling_is_replayed(tmp_path, truncated):
    """The sampler and the policy score the same sets, those of a step ahead too; without replay they differ."""
    ahead = ["rollout_ahead=1", "importance.mode=truncate", "learning_rate=1e-6"]
    stage = stage_of(tmp_path, [truncated, "steps=2", *ahead])
    GRPOTrainer(stage).run()
    lines = read_lines(stage.directory / "metrics.jsonl")[:2]
    assert all(line["first_ratio_deviation"] < 1e-4 and line["logprob_gap_max"] < 1e-3 for line in lines)
    plain = stage_of(tmp_path / "plain", [truncated, "sampling_replay=false", "steps=1"])
    GRPOTrainer(plain).run()
    assert read_lines(plain.directory / "metrics.jsonl")[0]["logprob_gap_max"] > 1e-2


@pytest.mark.few(1)
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_checkpoint_holds_what_sampling_kept(tmp_path, monkeypatch, ahead):
    """Of a rollout between two updates, and of a step that was sampled ahead."""
    settings = ["top_p=0.8", "steps=2", ".checkpoint.every=1", f"rollout_ahead={ahead}", "importance.mode=mask"]

    def stop(trainer, *arguments):
        if len(trainer.updates) == 1 or (trainer.step == 1 and ahead):
            raise Interrupted("SIGTERM")
        return work(trainer, *arguments)

    name = "score" if ahead else "update"
    work = getattr(GRPOTrainer, name)
    monkeypatch.setattr(GRPOTrainer, name, stop)
    stage = stage_of(tmp_path / "stopped", settings)
    with pytest.raises(Interrupted):
        GRPOTrainer(stage).run()
    monkeypatch.undo()
    state = torch.load(latest_checkpoint(stage.directory) / "state.pt", weights_only=True)
    held = state["sampled"] if ahead else state["rollout"][0]
    assert [len(counts) for _, counts in held["supports"]] == held["mask"].sum(-1).tolist()
    GRPOTrainer(stage).run()
    assert all(line["first_ratio_deviation"] < 1e-4 for line in read_lines(stage.directory / "metrics.jsonl")[:2])
    if not ahead:  # else the resumed run samples the next step from newer weights
        whole = stage_of(tmp_path / "whole", settings)
        GRPOTrainer(whole).run()
        assert equal(outcome(stage.directory), outcome(whole.directory))


def test_each_epoch_asks_every_question_once(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path, ["questions=3", "oversample=1", "minibatches=1"]))
    asked = []
    for step in range(8):
        names = [problem.question for problem in trainer.questions(step)]
        assert all(len(set(names[first : first + 4])) == 1 for first in range(0, 12, 4))  # of a group
        asked += names[::4]
    assert all(len(set(asked[first : first + 8])) == 8 for first in (0, 8, 16)) and asked[:8] != asked[8:16]


def test_each_pass_over_each_rollout_has_other_minibatches(tmp_path):
    trainer, seen = GRPOTrainer(stage_of(tmp_path)), set()
    for trainer.step, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        parts = trainer.minibatches(epoch)
        assert [len(part) for part in parts] == [8, 8] and sorted(torch.cat(parts).tolist()) == list(range(16))
        seen.add(tuple(torch.cat(parts).tolist()))
    assert len(seen) == 4


def test_the_reference_is_new_every_so_many_steps(tmp_path, monkeypatch):
    trainer, seen = GRPOTrainer(stage_of(tmp_path, ["steps=2", "ref_refresh_every=2"])), []
    monkeypatch.setattr(trainer.reference, "refresh", lambda policy: seen.append((trainer.step, policy)))
    trainer.run()
    assert seen == [(2, trainer.policy)]


def test_samples_are_drawn_and_trained_at_the_temperature_of_the_recipe(tmp_path):
    entropies = []
    for temperature in (0.5, 1.0):
        folder = tmp_path / str(temperature)
        folder.mkdir()
        stage = stage_of(folder, [f"temperature={temperature}", "steps=1"])
        GRPOTrainer(stage).run()
        line = read_lines(stage.directory / "metrics.jsonl")[0]
        assert line["logprob_gap_max"] < 1e-4 and line["first_ratio_deviation"] < 1e-4
        entropies.append(line["entropy"])
    assert entropies[0] < 0.9 * entropies[1]


def test_open_problems_are_asked_where_something_judges_them(tmp_path):
    (tmp_path / "open.jsonl").write_text("".join(f'{{"question": "Say {n}", "kind": "open"}}\n' for n in range(3)))
    given = [f".data.open={{kind: jsonl, path: {tmp_path}/open.jsonl}}", "problems=[sums, open]"]
    trainer = GRPOTrainer(stage_of(tmp_path, [*given, "rewards={accuracy: 1.0, format: 1.0}"]))
    assert asked_kinds(trainer, 3) == {"math"} and len(trainer.pools["all"]) == 11
    assert asked_kinds(GRPOTrainer(stage_of(tmp_path, given)), 3) == {"math", "open"}  # a reward function
    trainer = GRPOTrainer(stage_of(tmp_path, [*given, "problems=[open]", "rewards={accuracy: 1.0}"]))
    with pytest.raises(TrainingError, match=r"judge.*preference"):
        trainer.questions(0)


def asked_kinds(trainer, steps):
    """The kinds of the questions of the first steps."""
    return {problem.kind for step in range(steps) for problem in trainer.questions(step)}


def test_a_preference_counts_in_the_last_steps(tmp_path):
    """Until then only checkable problems are asked, and then all in an order from its begin."""
    (tmp_path / "open.jsonl").write_text("".join(f'{{"question": "Say {n}", "kind": "open"}}\n' for n in range(8)))
    given = [f".data.open={{kind: jsonl, path: {tmp_path}/open.jsonl}}", "problems=[sums, open]",
             "rewards={accuracy: 1.0, format: 1.0}"]
    trainer = GRPOTrainer(stage_of(tmp_path, given))
    item = type("Preference", (), {"model": "scores", "weight": 2.0, "last_steps": 1})()
    trainer.settings = trainer.settings.model_copy(update={"preference": [item]})
    trainer.reward_models["scores"] = Judge({" good": 1.0, " bad": -1.0})
    problems = [Problem("a", "Hi?", "", "open"), Problem("b", "1+1?", "2"), Problem("c", "Ho?", "", "open")]
    texts = [" good", " good", " bad"]
    total, parts = trainer.preference_rewards(problems, texts)
    assert not total.any() and parts == {} and asked_kinds(trainer, 2) == {"math"}
    trainer.step = 2
    total, parts = trainer.preference_rewards(problems, texts)
    assert total.tolist() == [2.0, 0.0, -2.0] and parts == {"reward_scores": 0.0}
    assert asked_kinds(trainer, 3) == {"math", "open"}
    trainer.settings = trainer.settings.model_copy(update={"steps": 6, "preference": [
        type("Preference", (), {"model": "scores", "weight": 2.0, "last_steps": 4})()]})
    asked = []
    for step in range(2, 6):
        asked += trainer.questions(step)
    assert len(set(asked)) == 16  # a whole epoch
    total, parts = trainer.preference_rewards(problems[1:2], texts[1:2])
    assert total.tolist() == [0.0] and math.isnan(parts["reward_scores"])


class Judge:
    """A reward model that knows a few responses by heart."""

    def __init__(self, scores, target="response"):
        self.scores, self.target = scores, target

    def score(self, questions, responses):
        assert len(questions) == len(responses)
        return [self.scores[response] for response in responses]


def test_a_response_without_a_summary_scores_no_more_than_the_others(tmp_path):
    trainer, item = GRPOTrainer(stage_of(tmp_path)), type("Preference", (), {})()
    item.model, item.weight, item.last_steps = "scores", 1.0, None
    trainer.settings = trainer.settings.model_copy(update={"preference": [item]})

    def rewards(target, texts):
        trainer.reward_models["scores"] = Judge(scores, target)
        return trainer.preference_rewards([Problem("a", "q", "", "open")] * len(texts), texts)[0]

    scores = {"<think>a</think> x": 0.5, "<think>a</think> y": -1.0, "<think>no end": 3.0, "<think>worse": -2.0,
              "<think>a</think> z": math.nan}
    found = rewards("summary", list(scores))
    assert found[:4].tolist() == [0.5, -1.0, -1.0, -2.0] and found[4].isnan()
    assert rewards("summary", ["<think>no end"]).tolist() == [3.0]  # no others
    assert rewards("response", list(scores))[2] == 3.0


def test_the_length_follows_its_schedule(tmp_path):
    stage = stage_of(tmp_path, ["length_schedule={1: 3}", "steps=2"])
    GRPOTrainer(stage).run()
    lines = read_lines(stage.directory / "metrics.jsonl")
    assert [line["limit"] for line in lines[:2]] == [6, 3] and lines[1]["length"] <= 3 < lines[0]["length"]


def test_oversampling_trains_on_groups_that_differ(tmp_path, monkeypatch):
    seen = []
    make = GRPOTrainer.update
    monkeypatch.setattr(GRPOTrainer, "update", lambda *given: seen.append(given[1]) or make(*given))
    stage = stage_of(tmp_path, ["oversample=2", "group_size=2", "steps=2", 'rewards={"test_grpo:mostly_equal": 1.0}'])
    GRPOTrainer(stage).run()
    lines = read_lines(stage.directory / "metrics.jsonl")[:2]
    assert any(line["zero_spread"] > 0.3 for line in lines)
    for line, rollout in zip(lines, seen[::2], strict=True):
        differing = (rollout.advantages.view(4, 2) != 0).all(1).sum()
        assert differing == min(4, round(8 * (1 - line["zero_spread"]))) > 0


def mostly_equal(completions, question, **columns):
    """Differs only for questions with an even first number."""
    even = [int(re.search(r"\d+", text)[0]) % 2 == 0 for text in question]
    return [value * here for value, here in zip(parity(completions), even, strict=True)]


def test_without_anything_to_learn_nothing_breaks(tmp_path):
    stage = stage_of(tmp_path, ['rewards={"test_grpo:always": 1.0}', "steps=2", "objective={preset: grpo}"])
    GRPOTrainer(stage).run()
    lines = read_lines(stage.directory / "metrics.jsonl")[:2]
    assert [line["zero_spread"] for line in lines] == [1, 1] and lines[0]["entropy"] > 0


def always(completions, **columns):
    return [1.0] * len(completions)


def test_what_cannot_be_scored_is_counted_and_teaches_nothing(tmp_path, capsys, monkeypatch):
    seen = []
    make = GRPOTrainer.update
    monkeypatch.setattr(GRPOTrainer, "update", lambda *given: seen.append(given[1]) or make(*given))
    stage = stage_of(tmp_path, ['rewards={"test_grpo:some": 1.0}', "steps=1"])
    GRPOTrainer(stage).run()
    line = read_lines(stage.directory / "metrics.jsonl")[0]
    assert 0 < line["unscorable"] < 16 and 0 < line["reward"] < 1
    assert (seen[0].advantages == 0).sum() >= line["unscorable"] and seen[0].advantages.any()
    count = line["unscorable"]
    assert re.search(rf"step 0: .*'test_grpo:some': {count}", " ".join(capsys.readouterr().out.split()))


def some(completions, **columns):
    """None for some of them."""
    return [None if text[:1] < "M" else value for text, value in zip(completions, parity(completions), strict=True)]


def test_rewards_of_functions_and_of_reward_models_are_added(tmp_path, monkeypatch):
    stage = stage_of(tmp_path, ['rewards={"test_grpo:always": 1.0}', "advantage_scale=none"])
    trainer, preference = GRPOTrainer(stage), torch.arange(16, dtype=torch.float64)
    monkeypatch.setattr(trainer, "preference_rewards", lambda *given: (preference, {"reward_scores": 7.5}))
    trainer.step, trainer.scorer = 1, stage.scorer(trainer.settings.rewards)
    trainer.sampler.update(trainer.policy)
    rollout, metrics = trainer.roll_out()
    assert rollout.advantages.view(4, 4).tolist() == [[-1.5, -0.5, 0.5, 1.5]] * 4
    assert (metrics["reward"], metrics["reward_test_grpo:always"], metrics["reward_scores"]) == (8.5, 1.0, 7.5)


@pytest.mark.parametrize("broken", ["loss", "ratio"])
def test_training_that_cannot_go_on_is_named_and_the_checkpoint_stays(tmp_path, monkeypatch, broken):
    real, directory = update.minibatch_gradient, tmp_path / "run" / "rl"

    def gradient(*arguments, **options):
        metrics = real(*arguments, **options)
        return metrics | ({"loss": math.nan} if broken == "loss" else {"ratio_deviation": 0.5})

    GRPOTrainer(stage_of(tmp_path, ["steps=1"])).run()
    before = outcome(directory)
    monkeypatch.setattr(update, "minibatch_gradient", gradient)
    with pytest.raises(TrainingError, match=rf"step 1, minibatch 0.*{'nan' if broken == 'loss' else '0.5'}"):
        GRPOTrainer(stage_of(tmp_path)).run()
    assert equal(outcome(directory)["state"], before["state"])


@pytest.mark.parametrize("baseline", ["leave_one_out", "length_weighted"])
def test_baselines_of_advantages(tmp_path, monkeypatch, baseline):
    seen, rewards = [], []
    make, given = GRPOTrainer.update, r1kernels.group_advantages
    monkeypatch.setattr(GRPOTrainer, "update", lambda *given: seen.append(given[1]) or make(*given))
    monkeypatch.setattr(r1kernels, "group_advantages", lambda *a, **k: rewards.append(a[0]) or given(*a, **k))
    settings = [f"advantage_baseline={baseline}", "advantage_scale=none", "steps=1", "group_size=4",
                "importance={mode: truncate, level: sequence_mean, normalize: true}"]
    GRPOTrainer(stage_of(tmp_path, settings)).run()
    rollout, rows = seen[0], rewards[0].double().view(-1, 4)
    lengths = rollout.mask.sum(-1).view(-1, 4) if baseline == "length_weighted" else torch.ones(len(rows), 4)
    total = (lengths * rows).sum(1, keepdim=True)
    means = (total - rows) / 3 if baseline == "leave_one_out" else total / lengths.sum(1, keepdim=True)
    expected = rows - means
    assert expected.any() and rollout.importance_weights.shape == rollout.advantages.shape
    torch.testing.assert_close(rollout.advantages.view(-1, 4).double(), expected, rtol=1e-6, atol=1e-6)


def test_advantages_of_your_own(tmp_path):
    stage = stage_of(tmp_path, ['advantages={function: "test_grpo:Rewards", options: {factor: 2.0}}', "steps=2"])
    GRPOTrainer(stage).run()
    lines = read_lines(stage.directory / "metrics.jsonl")[:2]
    assert [line["largest"] for line in lines] == [2.0, 2.0] and [line["learned"] for line in lines] == [1.5, 3.5]
    state = torch.load(latest_checkpoint(stage.directory) / "state.pt", weights_only=True)
    assert state["advantages"] == {"updates": 4}
    with pytest.raises(ConfigError, match="test_grpo:Nothing"):
        GRPOTrainer(stage_of(tmp_path / "other", ['advantages={function: "test_grpo:Nothing"}']))


class Rewards:
    """The rewards themselves, one for each token; it counts its updates."""

    def __init__(self, trainer, factor):
        assert isinstance(trainer, GRPOTrainer)
        self.factor, self.updates = factor, 0

    def __call__(self, rewards, tokens, old_logprobs, ref_logprobs):
        assert old_logprobs.shape == ref_logprobs.shape == tokens.mask.shape
        advantages = self.factor * rewards[:, None] * tokens.mask
        return advantages, {"largest": advantages.max().item()}

    def learn(self, rollout, rows):
        assert rows.shape == (8,)
        assert isinstance(rollout, Rollout) and rollout.advantages.shape == rollout.mask.shape
        self.updates += 1
        return {"learned": float(self.updates)}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def test_a_scorer_gets_every_column_in_the_order_of_the_completions(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path, ["rollout_batch_size=4"]))
    seen = {}

    class Scorer:
        def score(self, texts, **columns):
            seen.update(columns, texts=texts)
            return Scores({}, [0.0] * len(texts))

    trainer.scorer = Scorer()
    problems = [problem for problem in trainer.pools["all"][:4] for _ in range(4)]
    completions = collect(trainer.sampling(0))
    trainer.score(problems, completions, 6)
    assert seen.keys() == {"texts", "prompts", "question", "answer", "kind", "language", "lengths", "limit"}
    assert seen["texts"] == completions.texts and seen["limit"] == [6] * 16
    assert seen["question"] == [problem.question for problem in problems]
    assert seen["lengths"] == completions.lengths.tolist()
