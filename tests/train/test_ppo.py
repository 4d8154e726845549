"""The example of PPO: GAE and the critic against formulas, and its training against itself when interrupted."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_cases import StopAfter, equal, load_shards, make_model, make_tokenizer, outcome, stage_of

from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.errors import ConfigError, Interrupted
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.log import read_lines
from r1kernels.train.rollout import Tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
from ppo import gae, whiten  # noqa: E402
from ppo.critic import Critic, explained_variance  # noqa: E402

NAN = float("nan")


# ---- generalised advantage estimation ----


def episode(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, term by term."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    return [math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def inputs(rows: int, steps: int, seed: int, kind: str = "ends"):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, steps, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "ends":
        mask = torch.arange(steps) < torch.randint(0, steps + 1, (rows, 1), generator=generator)
    else:
        mask = torch.rand(rows, steps, generator=generator) < 0.6
    return rewards, values, mask


@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.sampled_from(["ends", "holes"]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.0, 0.9, 1.0]),
)
def test_gae_against_the_formula(rows, steps, seed, kind, lam, gamma):
    rewards, values, mask = inputs(rows, steps, seed, kind)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(rows):
        here = mask[row]
        expected = torch.tensor(episode(rewards[row, here].tolist(), values[row, here].tolist(), gamma, lam),
                                dtype=torch.float64)
        torch.testing.assert_close(advantages[row, here], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(returns[row, here], expected + values[row, here], rtol=1e-12, atol=1e-12)
        assert not advantages[row, ~here].any() and not returns[row, ~here].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_behind_the_mask_matters(poison):
    rewards, values, mask = inputs(4, 6, 1)
    hidden = (tensor.masked_fill(~mask, poison) for tensor in (rewards, values))
    assert all(map(torch.equal, gae(*hidden, mask), gae(rewards, values, mask)))
    assert torch.equal(whiten(values.masked_fill(~mask, poison), mask), whiten(values, mask))


def test_whitened_values_have_mean_0_and_deviation_1():
    _, values, mask = inputs(6, 8, 2)
    chosen = whiten(values * 3 + 7, mask)[mask]
    assert abs(chosen.mean().item()) < 1e-12 and chosen.std(correction=0).item() == pytest.approx(1)
    assert not whiten(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)).any()
    assert not whiten(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).any()


# ---- the critic ----


@pytest.fixture(scope="module")
def model():
    return make_model(make_tokenizer())


@pytest.fixture
def trainer(tmp_path):
    """Of PPO without any discount or whitening, whose critic has a random head."""
    made = GRPOTrainer(ppo_stage(tmp_path, "lam: 1.0, gamma: 0.5, kl_coef: 0.01, whiten: false",
                                 ["questions=1", "minibatches=1"]))
    with torch.no_grad():
        weight = made.advantages.critic.head.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return made


def ppo_stage(folder, options="", settings=(), **keywords):
    given = f'{{function: "ppo:critic", options: {{{options}}}}}'
    objective = "{preset: grpo, options: {aggregate: token_mean}}"
    return stage_of(folder, [f"advantages={given}", f"objective={objective}", *settings], **keywords)


def tokens_of(prompts: list[int], lengths: list[int]) -> Tokens:
    """Random tokens of prompts and completions of some lengths."""
    generator = torch.Generator().manual_seed(0)
    rows, width, steps = len(prompts), max(prompts), max(lengths)
    prompt_mask = torch.arange(width) >= width - torch.tensor(prompts)[:, None]
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    return Tokens(
        torch.randint(3, 70, (rows, width), generator=generator) * prompt_mask, prompt_mask,
        torch.randint(3, 70, (rows, steps), generator=generator) * mask, mask)


def test_values_are_of_the_state_before_each_token(model, trainer):
    tokens, critic = tokens_of([3, 5, 2, 4], [4, 1, 3, 2]), trainer.advantages.critic
    assert not Critic(copy.deepcopy(model))(tokens).any()
    values = critic(tokens)
    for row in range(4):
        prompt = tokens.prompt_ids[row, tokens.prompt_mask[row]]
        for t in range(int(tokens.mask[row].sum())):
            ids = torch.cat([prompt, tokens.token_ids[row, :t]])[None]
            expected = critic.head(critic.base_model(ids).last_hidden_state[0, -1]).item()
            assert values[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_the_critic_is_no_part_of_the_policy(trainer):
    critic, before = trainer.advantages.critic, {name: value.clone() for name, value in trainer.policy.weights()}
    (critic(tokens_of([3, 2], [2, 3])) - 1).square().sum().backward()
    torch.optim.SGD(critic.parameters(), lr=1.0).step()
    assert equal(dict(trainer.policy.weights()), before)
    assert all(weight.grad is None for weight in trainer.policy.trained().values())


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_and_its_gradient(trainer, clip, monkeypatch):
    advantages = trainer.advantages
    critic, advantages.value_clip = advantages.critic, clip
    tokens = tokens_of([3, 5, 2, 4, 1], [4, 1, 3, 2, 4])
    generator = torch.Generator().manual_seed(1)
    old, returns = (torch.randn(5, 4, generator=generator) for _ in range(2))
    mask = tokens.mask.clone()
    mask[2] = False  # it has no reward, so it teaches nothing
    old[2] = returns[2] = NAN
    advantages.targets = {"values": old, "returns": returns, "mask": mask}
    rows = torch.tensor([4, 0, 2, 1])
    value, here = critic(tokens.rows(rows)), mask[rows]
    squares = (value[here] - returns[rows][here]) ** 2
    if clip is not None:
        near = torch.minimum(torch.maximum(value, old[rows] - clip), old[rows] + clip)
        clipped = (near[here] - returns[rows][here]) ** 2
        share, squares = (clipped > squares).float().mean().item(), torch.maximum(squares, clipped)
    expected = 0.5 * squares.mean()
    gradients = torch.autograd.grad(expected, list(critic.parameters()))
    nothing = torch.tensor([], dtype=torch.long)
    for batches in ([rows], [rows[:1], rows[1:3], nothing, rows[3:]]):
        critic.zero_grad()
        monkeypatch.setattr(trainer, "micro_batches", lambda tokens, rows, batches=batches: batches)
        metrics = advantages._gradient(tokens, rows)
        assert metrics["value_loss"] == pytest.approx(expected.item(), rel=1e-5)
        if clip is not None:
            assert metrics["value_clip_fraction"] == pytest.approx(share) and 0 < share < 1
        for parameter, gradient in zip(critic.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_rewards_go_to_the_last_token_and_the_penalty_to_each(trainer):
    torch.nn.init.zeros_(trainer.advantages.critic.head.weight)
    tokens = tokens_of([3, 5, 2, 4], [4, 1, 3, 2])
    generator = torch.Generator().manual_seed(2)
    old, ref = (torch.randn(4, 4, generator=generator) * tokens.mask for _ in range(2))
    rewards = torch.tensor([1.0, -2.0, NAN, 3.0])
    found, metrics = trainer.advantages(rewards, tokens, old, ref)
    for row, length in enumerate([4, 1, 3, 2]):
        for t in range(4):
            penalty = sum(0.5 ** (s - t) * 0.01 * (old - ref)[row, s].item() for s in range(t, length))
            here = t < length and row != 2
            expected = 0.5 ** (length - 1 - t) * rewards[row].item() - penalty if here else 0.0
            assert found[row, t].item() == pytest.approx(expected, abs=1e-6)
    assert not trainer.advantages.targets["mask"][2].any()
    assert metrics["value"] == 0 and metrics["reward_kl"] == pytest.approx((old - ref)[tokens.mask].mean().item())
    # If nothing could be scored there is nothing to learn, and nothing breaks.
    found, metrics = trainer.advantages(torch.full((4,), NAN), tokens, old, ref)
    assert not found.any() and math.isnan(metrics["value"]) and math.isnan(metrics["explained_variance"])
    trainer.advantages.critic.zero_grad()
    assert trainer.advantages._gradient(tokens, torch.arange(4))["value_loss"] == 0


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns + 5, returns) == 1
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert math.isnan(explained_variance(returns, torch.ones(4)))


# ---- training ----

OPTIONS = "value_learning_rate: 3.0e-3, kl_coef: 0.01"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    stage = ppo_stage(tmp_path_factory.mktemp("whole"), OPTIONS, ["epochs=2"])
    GRPOTrainer(stage).run()
    return stage


def test_the_critic_learns_beside_the_policy(trained):
    lines = read_lines(trained.directory / "metrics.jsonl")[:3]
    for line in lines:
        assert line["first_ratio_deviation"] < 1e-4 < line["ratio_deviation"]
        assert {"value", "return", "explained_variance", "value_clip_fraction", "reward_kl"} <= line.keys()
    assert lines[0]["value"] == 0 and lines[0]["explained_variance"] == 0 and lines[0]["reward_kl"] == 0
    assert lines[1]["value"] != 0 and lines[1]["reward_kl"] != 0
    state = torch.load(latest_checkpoint(trained.directory) / "state.pt", weights_only=True)
    steps = load_shards(latest_checkpoint(trained.directory))["optimizer"]["state.model.model.norm.weight.step"]
    assert steps == state["advantages"]["optimizer"]["state"][0]["step"] == 3 * 2 * 2


def test_interrupted_again_and_again_it_ends_the_same(trained, tmp_path):
    """An evaluation takes 12 checks, a rollout six."""
    stops = 0
    for patience in (9, 15, 20, 99):
        try:
            GRPOTrainer(ppo_stage(tmp_path, OPTIONS, ["epochs=2"], interrupt=StopAfter(patience))).run()
        except Interrupted:
            stops += 1
    assert stops == 3
    assert equal(outcome(tmp_path / "run" / "rl"), outcome(trained.directory))


def test_the_critic_learns_what_is_to_come(tmp_path):
    stage = ppo_stage(tmp_path, "lam: 1.0, value_clip: null, value_learning_rate: 0.01",
                      ['rewards={"test_ppo:one": 1.0}', "steps=4"])
    GRPOTrainer(stage).run()
    lines = read_lines(stage.directory / "metrics.jsonl")[:4]
    assert lines[0]["value"] == 0 and lines[0]["return"] == 1 and abs(lines[-1]["value"] - 1) < 0.5
    assert "value_clip_fraction" not in lines[0] and "reward_kl" not in lines[0]


def one(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize(("options", "settings", "message"), [
    ("lam: 1.5", [], r"lam.* 1\.5"),
    ("value_clip: 0.0", [], r"value_clip.* 0\.0"),
    ("kl_coef: -1.0", [], r"kl_coef.* -1\.0"),
    ("lambda: 1", [], r"lambda"),
    ("", ["objective={preset: gspo}"], r"objective"),
], ids=str)
def test_options_that_cannot_be_used_are_named(tmp_path, options, settings, message):
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(ppo_stage(tmp_path, options, settings))
