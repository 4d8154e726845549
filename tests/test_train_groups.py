"""What a rollout's rewards become: which groups are learned from, and their advantages."""

import torch

from r1kernels.train.groups import advantages_of, choose, spreads

NAN = float("nan")


def test_the_spread_of_a_group_leaves_out_what_could_not_be_scored():
    groups = torch.tensor([[1, 0, NAN, 0.5], [NAN, 2, 2, NAN], [NAN] * 4])
    assert spreads(groups).tolist() == [1, 0, 0]


def test_a_crumb_is_no_success():
    """Divided by their deviation, 0.01 among zeros becomes as large as 1 among zeros."""
    crumb, success = torch.tensor([0.01, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])
    rewards = torch.cat([crumb, success])
    plain = advantages_of(rewards, 4, min_spread=0.0, scale="group_std")
    assert plain[0] > 0.9 * plain[4]
    careful = advantages_of(rewards, 4, min_spread=0.05, scale="group_std")
    assert careful[:4].tolist() == [0] * 4
    assert torch.equal(careful[4:], plain[4:])
    _, shares = choose(rewards, 4, 2, min_spread=0.05)
    assert shares == {"zero_spread": 0.5, "small_spread": 0.5}


def test_groups_that_differ_come_first():
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 1, NAN, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    rows, shares = choose(rewards, 4, 2, min_spread=0.0)
    assert rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert shares["zero_spread"] == 0.5
    rows, _ = choose(rewards, 4, 3, min_spread=0.0)  # filled up in order
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]


def test_a_sample_without_a_reward_teaches_nothing():
    advantages = advantages_of(torch.tensor([1.0, 0, NAN, 0]), 4, min_spread=0.0, scale="group_std")
    assert advantages[2] == 0 and advantages[0] > 0 > advantages[1]
