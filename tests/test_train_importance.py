"""Importance weights: exactly 1 without a gap, bounded with one, and unmoved by what is behind the mask."""

import math

import pytest
import torch

from r1kernels.train.importance import ImportanceConfig, importance_weights
from r1kernels.train.schema import ConfigError, build

SETTINGS = [
    ImportanceConfig(mode, level, cap=1.5, floor=0.5)
    for mode in ("truncate", "mask")
    for level in ("token", "sequence")
]


def policies(gap=0.3, rows=6, columns=9):
    torch.manual_seed(0)
    rollout = -torch.rand(rows, columns) * 4
    lengths = torch.arange(rows) + 3
    return rollout, rollout + gap * torch.randn(rows, columns), torch.arange(columns) < lengths[:, None]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equal_log_probs_weigh_exactly_one(settings):
    rollout, _, mask = policies()
    weights, metrics = importance_weights(rollout, rollout.clone(), mask, settings)
    assert torch.equal(weights, torch.ones_like(weights))
    assert weights.shape == (rollout.shape if settings.level == "token" else rollout.shape[:1])
    assert metrics == {
        "logprob_gap_mean": 0.0, "logprob_gap_max": 0.0, "rollout_kl_k1": 0.0, "rollout_kl_k3": 0.0,
        "importance_mean": 1.0, "importance_cut": 0.0, "importance_ess": 1.0,
    }


def test_weights_by_hand():
    rollout, train, mask = policies()
    ratio = (train.double() - rollout.double()).exp()
    product = torch.stack([ratio[row][mask[row]].prod() for row in range(len(mask))])
    for settings in SETTINGS:
        raw = ratio if settings.level == "token" else product
        counted = mask if settings.level == "token" else torch.ones(len(mask), dtype=torch.bool)
        outside = (raw < 0.5) | (raw > 1.5)
        assert 0 < outside[counted].sum() < counted.sum()
        expected = raw.clamp(0.5, 1.5) if settings.mode == "truncate" else raw.masked_fill(outside, 0)
        weights, metrics = importance_weights(rollout, train, mask, settings)
        torch.testing.assert_close(weights[counted], expected[counted].float())
        used = expected[counted]
        assert metrics["importance_cut"] == pytest.approx(outside[counted].double().mean().item())
        assert metrics["importance_mean"] == pytest.approx(used.mean().item())
        assert metrics["importance_ess"] == pytest.approx((used.sum() ** 2 / used.square().sum() / len(used)).item())
        gap = (train.double() - rollout.double())[mask]
        assert metrics["logprob_gap_mean"] == pytest.approx(gap.abs().mean().item())
        assert metrics["logprob_gap_max"] == pytest.approx(gap.abs().max().item())
        assert metrics["rollout_kl_k1"] == pytest.approx(-gap.mean().item())
        assert metrics["rollout_kl_k3"] == pytest.approx((gap.exp() - 1 - gap).mean().item())


def test_none_measures_and_weighs_nothing():
    weights, metrics = importance_weights(*policies(), ImportanceConfig())
    assert weights is None
    assert metrics["importance_cut"] == 0 and 0 < metrics["importance_ess"] < 1 and metrics["rollout_kl_k3"] > 0


def test_weights_make_samples_of_one_policy_speak_for_another():
    """The mean of a reward under pi, from samples of mu; and the k3 estimate of their distance."""
    mu, pi = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(mu, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))[:, None]
    weights, metrics = importance_weights(
        mu.log()[tokens], pi.log()[tokens], torch.ones_like(tokens), ImportanceConfig("truncate", cap=2.0)
    )
    reward = torch.tensor([1.0, 5.0, -2.0])
    assert (weights * reward[tokens]).mean().item() == pytest.approx((pi * reward).sum().item(), abs=0.02)
    distance = (mu * (mu / pi).log()).sum().item()
    assert metrics["rollout_kl_k3"] == pytest.approx(distance, abs=2e-3)
    assert metrics["rollout_kl_k1"] == pytest.approx(distance, abs=2e-3)


@pytest.mark.parametrize("settings", [*SETTINGS, ImportanceConfig()], ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_nothing_behind_the_mask_matters(settings, garbage):
    rollout, train, mask = policies()
    clean = importance_weights(rollout, train, mask, settings)
    dirty = importance_weights(rollout.masked_fill(~mask, garbage), train.masked_fill(~mask, 1.0), mask, settings)
    assert clean[1] == dirty[1]
    assert clean[0] is dirty[0] is None or torch.equal(clean[0], dirty[0])


@pytest.mark.parametrize("settings", [*SETTINGS, ImportanceConfig(), ImportanceConfig("mask", "sequence")], ids=str)
def test_no_gap_overflows(settings):
    rollout = torch.tensor([[-9999.0, -1.0], [-1.0, -1.0], [-math.inf, -1.0], [-1.0, -1.0]])
    train = torch.tensor([[-1.0, -1.0], [-math.inf, -1.0], [-1.0, -math.inf], [-1.0, -1.0]])
    weights, metrics = importance_weights(rollout, train, torch.ones(4, 2), settings)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["logprob_gap_max"] == 9999
    if weights is not None:
        assert weights.isfinite().all() and weights.max() <= settings.cap and weights[-1].eq(1).all()


def test_empty_completions_and_no_counted_token():
    rollout, train, mask = policies()
    mask[2] = False
    weights, metrics = importance_weights(rollout, train, mask, ImportanceConfig("mask", "sequence", cap=1.2))
    assert weights[2] == 1 and metrics["importance_cut"] <= 1
    weights, metrics = importance_weights(rollout, train, torch.zeros_like(mask), ImportanceConfig("truncate"))
    assert torch.equal(weights, torch.ones_like(weights)) and set(metrics.values()) == {0.0}
    weights, metrics = importance_weights(rollout, rollout + 3, mask, ImportanceConfig("mask"))
    assert not weights[mask].any() and metrics["importance_ess"] == 0 and metrics["importance_cut"] == 1


def test_log_probs_that_are_no_numbers_are_named():
    rollout, train, mask = policies()
    rollout[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"token 2 of sample 1 has log-prob nan in the rollout and -.* in training"):
        importance_weights(rollout, train, mask, ImportanceConfig())


@pytest.mark.parametrize("values, message", [
    ({"cap": 0.5}, "cap is 0.5, expected a number from 1 to 485165195"),
    ({"cap": math.inf}, "cap is inf, expected"),
    ({"floor": 1.5}, "floor is 1.5, expected a number from 0 to 1"),
    ({"mode": "clip"}, "'importance.mode' is 'clip', expected one of none, truncate, mask"),
])
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        build(ImportanceConfig, values, "importance")
