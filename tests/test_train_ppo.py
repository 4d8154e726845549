"""PPO: its critic against formulas, and its trainer against itself when stopped."""

import copy
import math

import pytest
import torch

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
