"""PPO: its critic against formulas, and its trainer against itself when stopped."""

import copy
import dataclasses
import math
import random

import pytest
import torch

from r1kernels.train.checkpoint import latest_checkpoint, save_checkpoint
from r1kernels.train.config import load_recipe
from r1kernels.train.console import Console
from r1kernels.train.interrupt import Interrupt, Interrupted
from r1kernels.train.metrics import read_metrics
from r1kernels.train.ppo import PPOTrainer
from r1kernels.train.rewards import REWARDS, Reward
from r1kernels.train.schema import ConfigError
from r1kernels.train.stage import Stage
from r1kernels.train.stages.ppo import run
from r1kernels.train.tiny import CorpusConfig, TinyConfig, make_model, make_tokenizer
from r1kernels.train.update import Rollout
from r1kernels.train.value import Critic, explained_variance, rollout_values, value_gradient


@pytest.fixture(scope="module")
def model():
    tokenizer = make_tokenizer(CorpusConfig(), 6, 0)
    return make_model(TinyConfig(hidden_size=16, intermediate_size=32, layers=1, heads=2), tokenizer, 0).eval()


@pytest.fixture
def critic(model):
    critic = Critic(model)
    with torch.no_grad():
        critic.head.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    return critic


def rollout_of(prompts: list[int], lengths: list[int], seed: int = 0) -> Rollout:
    """Random tokens; prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows, width, steps = len(prompts), max(prompts), max(lengths)
    prompt_mask = torch.arange(width) >= width - torch.tensor(prompts)[:, None]
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(rows, steps)
    return Rollout(
        prompt_ids=torch.randint(2, 90, (rows, width), generator=generator) * prompt_mask,
        prompt_mask=prompt_mask,
        token_ids=torch.randint(2, 90, (rows, steps), generator=generator) * mask,
        mask=mask,
        advantages=zeros,
        old_logprobs=zeros,
        ref_logprobs=zeros,
    )


def test_values_are_of_the_state_before_each_token(model, critic):
    rollout = rollout_of([3, 5, 2], [4, 1, 3])
    assert not rollout_values(Critic(model), rollout, [torch.arange(3)], lambda: None).any()
    values = rollout_values(critic, rollout, [torch.tensor([2, 0]), torch.tensor([1])], lambda: None)
    assert values.shape == (3, 4) and not values[~rollout.mask].any()
    for row in range(3):
        prompt = rollout.prompt_ids[row, rollout.prompt_mask[row]]
        for t in range(int(rollout.mask[row].sum())):
            ids = torch.cat([prompt, rollout.token_ids[row, :t]])[None]
            expected = critic.head(model.base_model(ids).last_hidden_state[0, -1]).item()
            assert values[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_the_critic_is_no_part_of_the_model(model, critic):
    before = copy.deepcopy(model.state_dict())
    rollout = rollout_of([3, 2], [2, 3])
    loss = critic(rollout).square().sum()
    loss.backward()
    torch.optim.SGD(critic.parameters(), lr=1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_and_its_gradient(critic, clip):
    rollout = rollout_of([3, 5, 2, 4, 1], [4, 1, 3, 2, 4])
    generator = torch.Generator().manual_seed(1)
    old, returns = (torch.randn(5, 4, generator=generator) for _ in range(2))
    mask = rollout.mask.clone()
    mask[2] = False  # without a reward: it teaches nothing
    old[2] = returns[2] = math.nan
    rows = torch.tensor([4, 0, 2, 1])
    value = critic(rollout.rows(rows))
    here = mask[rows]
    squares = (value[here] - returns[rows][here]) ** 2
    if clip is not None:
        near = torch.minimum(torch.maximum(value, old[rows] - clip), old[rows] + clip)
        clipped = (near[here] - returns[rows][here]) ** 2
        share = (clipped > squares).float().mean().item()
        squares = torch.maximum(squares, clipped)
    expected = 0.5 * squares.mean()
    gradients = torch.autograd.grad(expected, list(critic.parameters()))
    for batches in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        critic.zero_grad()
        metrics = value_gradient(critic, rollout, old, returns, mask, batches, clip=clip, check=lambda: None)
        assert metrics["value_loss"] == pytest.approx(expected.item(), rel=1e-5)
        if clip is not None:
            assert metrics["value_clip_fraction"] == pytest.approx(share) and 0 < share < 1
        for parameter, gradient in zip(critic.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_minibatch_without_any_reward_teaches_nothing(critic):
    rollout = rollout_of([3, 2], [2, 3])
    nothing = torch.full((2, 3), math.nan)
    metrics = value_gradient(
        critic, rollout, nothing, nothing, torch.zeros(2, 3, dtype=torch.bool), [torch.arange(2)], clip=0.2,
        check=lambda: None,
    )
    assert metrics == {"value_loss": 0.0, "value_clip_fraction": 0.0}
    assert not any(parameter.grad.any() for parameter in critic.parameters())


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns + 5, returns) == 1
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert math.isnan(explained_variance(returns, torch.ones(4)))


RECIPE = """
run_dir: {run_dir}
seed: 3
data: {{sums: {{kind: arithmetic, min_terms: 2, max_terms: 3, train_size: 16}}}}
eval: {{every: 2, questions: 4, samples: 2, batch_size: 4, max_new_tokens: 6}}
checkpoint: {{every: 2, keep: 1}}
stages:
  - {{name: base, kind: pretrain}}
  - {{name: rl, kind: ppo, model: base, problems: [sums], rewards: {{accuracy: 1.0, format: 1.0}}, steps: 3,
      questions: 4, group_size: 4, minibatches: 2, epochs: 2, micro_batch_size: 3, learning_rate: 1.0e-3,
      warmup_updates: 4, max_new_tokens: 6, value_learning_rate: 3.0e-3, kl_coef: 0.01, ref_refresh_every: 2}}
"""


def parity(sample) -> float:
    """A reward that even a model of noise gets half of the time."""
    return float(sum(map(ord, sample.completion)) % 2)


@pytest.fixture(scope="module", autouse=True)
def rewards():
    kept = REWARDS["format"]
    REWARDS["format"] = Reward(score=parity)
    yield
    REWARDS["format"] = kept


def stage_of(run_dir, settings=(), interrupt=None):
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "recipe.yaml"
    path.write_text(RECIPE.format(run_dir=run_dir))
    recipe = load_recipe(path, [f"stages.rl.{setting}" for setting in settings])
    tokenizer = make_tokenizer(CorpusConfig(), 6, 0)
    model = make_model(TinyConfig(hidden_size=16, intermediate_size=32, layers=1, heads=2), tokenizer, 0)
    save_checkpoint(run_dir / "base", 1, model=model, tokenizer=tokenizer, state={}, keep=1)
    (run_dir / "rl").mkdir(exist_ok=True)
    return Stage(recipe, recipe.stage("rl"), run_dir / "rl", Console(plain=True), interrupt or Interrupt())


def outcome(directory):
    path = latest_checkpoint(directory)
    state = torch.load(path / "state.pt", weights_only=True)
    kept = {name: state[name] for name in ("step", "optimizer", "reference", "critic", "critic_optimizer")}
    files = [directory / "metrics.jsonl", directory / "samples.jsonl", path / "model" / "model.safetensors"]
    return path.name, str(kept), [file.read_bytes() for file in files]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    stage = stage_of(tmp_path_factory.mktemp("whole") / "run")
    run(stage)
    return stage


def test_a_step_is_epochs_of_minibatches_and_is_measured(trained):
    lines = read_metrics(trained.directory / "metrics.jsonl")[:3]
    for line in lines:
        assert line["first_ratio_deviation"] < 1e-4 < line["ratio_deviation"]
        assert {"value", "return", "explained_variance", "value_clip_fraction", "reward_kl"} <= line.keys()
    assert lines[0]["value"] == 0 and lines[0]["explained_variance"] == 0 and lines[0]["reward_kl"] == 0
    assert lines[1]["value"] != 0 and lines[1]["reward_kl"] != 0
    state = torch.load(latest_checkpoint(trained.directory) / "state.pt", weights_only=True)
    for name in ("optimizer", "critic_optimizer"):
        assert state[name]["state"][0]["step"] == 3 * 2 * 2


class StopAfter(Interrupt):
    def __init__(self, patience):
        super().__init__()
        self.left = patience

    def check(self):
        self.left -= 1
        if self.left <= 0:
            raise Interrupted("SIGINT")


def test_stopped_again_and_again_it_ends_the_same(trained, tmp_path):
    rng, seen, amid = random.Random(0), set(), False
    while True:
        # A rollout with its log-probs, references and values is some 25 checks, a minibatch six.
        patience = rng.randint(2, 9) if amid else rng.randint(12, 40)
        try:
            run(stage_of(tmp_path / "run", interrupt=StopAfter(patience)))
            break
        except Interrupted:
            state = torch.load(latest_checkpoint(tmp_path / "run" / "rl") / "state.pt", weights_only=True)
            amid = state["rollout"] is not None
            seen.add((state["minibatch"], amid))
    assert {(0, False), (0, True), (1, True), (2, True), (3, True)} <= seen
    assert outcome(tmp_path / "run" / "rl") == outcome(trained.directory)


def test_rewards_go_to_the_last_token_and_the_penalty_to_each(tmp_path):
    stage = stage_of(tmp_path / "run", ["lam=1.0", "gamma=0.5", "whiten=false", "questions=1", "minibatches=1"])
    trainer = PPOTrainer(stage)
    rollout = rollout_of([3, 5, 2, 4], [4, 1, 3, 2])
    generator = torch.Generator().manual_seed(2)
    old, ref = (torch.randn(4, 4, generator=generator) * rollout.mask for _ in range(2))
    rollout = dataclasses.replace(rollout, old_logprobs=old, ref_logprobs=ref)
    rewards = torch.tensor([1.0, -2.0, math.nan, 3.0])
    found = trainer.advantages(rewards, rollout)
    for row, length in enumerate([4, 1, 3, 2]):
        for t in range(4):
            here = t < length and row != 2
            penalty = sum(0.5 ** (s - t) * 0.01 * (old - ref)[row, s].item() for s in range(t, length))
            # The critic is new: all its values are 0.
            expected = 0.5 ** (length - 1 - t) * rewards[row].item() - penalty if here else 0.0
            assert found[row, t].item() == pytest.approx(expected, abs=1e-6)
    assert not trainer.values["mask"][2].any()
    # All unscorable: nothing to learn, and nothing breaks.
    assert not trainer.advantages(torch.full((4,), math.nan), rollout).any()


def test_the_critic_learns_what_is_to_come(tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "format", Reward(score=lambda sample: 1.0))
    run(stage_of(tmp_path / "run", ["lam=1", "kl_coef=0", "value_clip=null", "steps=6", "value_learning_rate=0.01"]))
    lines = read_metrics(tmp_path / "run" / "rl" / "metrics.jsonl")[:6]
    assert lines[0]["value"] == 0 and lines[0]["return"] >= 1
    assert abs(lines[-1]["value"] - lines[-1]["return"]) < 0.1
    assert "value_clip_fraction" not in lines[0] and "reward_kl" not in lines[0]


def test_settings_out_of_range_are_named(tmp_path):
    for setting, message in (
        ("lam=1.5", r"stage 'rl': 'lam' is 1.5, expected a number from 0 to 1"),
        ("value_clip=0.0", r"'value_clip' is 0.0, expected a positive number"),
        ("kl_coef=-1.0", r"'kl_coef' is -1.0, expected at least 0"),
        ("epochs=0", r"'epochs' is 0, expected at least 1"),
        ("lambda=1", r"unknown key 'lambda'"),
    ):
        with pytest.raises(ConfigError, match=message):
            stage_of(tmp_path / "run", [setting])
