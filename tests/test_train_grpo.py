"""What a rollout's rewards become: which groups are learned from, and their advantages."""

from types import SimpleNamespace

import torch

from r1kernels.train.grpo import GRPOTrainer, spreads

NAN = float("nan")


def trainer(**settings):
    defaults = {"group_size": 4, "questions": 2, "min_spread": 0.0, "advantage_scale": "group_std"}
    return SimpleNamespace(settings=SimpleNamespace(**defaults | settings))


def test_the_spread_of_a_group_leaves_out_what_could_not_be_scored():
    groups = torch.tensor([[1, 0, NAN, 0.5], [NAN, 2, 2, NAN], [NAN] * 4])
    assert spreads(groups).tolist() == [1, 0, 0]


def test_a_crumb_is_no_success():
    """Divided by their deviation, 0.01 among zeros becomes as large as 1 among zeros."""
    crumb, success = torch.tensor([0.01, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])
    rewards = torch.cat([crumb, success])
    plain = GRPOTrainer.advantages(trainer(), rewards, None)
    assert plain[0] > 0.9 * plain[4]
    careful = GRPOTrainer.advantages(trainer(min_spread=0.05), rewards, None)
    assert careful[:4].tolist() == [0] * 4
    assert torch.equal(careful[4:], plain[4:])
    _, shares = GRPOTrainer._choose(trainer(min_spread=0.05), rewards)
    assert shares == {"zero_spread": 0.5, "small_spread": 0.5}


def test_groups_that_differ_come_first():
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 1, NAN, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    rows, shares = GRPOTrainer._choose(trainer(), rewards)
    assert rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert shares["zero_spread"] == 0.5
    rows, _ = GRPOTrainer._choose(trainer(questions=3), rewards)  # filled up in order
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]


def test_a_sample_without_a_reward_teaches_nothing():
    advantages = GRPOTrainer.advantages(trainer(), torch.tensor([1.0, 0, NAN, 0]), None)
    assert advantages[2] == 0 and advantages[0] > 0 > advantages[1]
