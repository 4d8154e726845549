"""Presets, their published defaults, and every combination of fields that makes no sense."""

import dataclasses
import math
from typing import Any

import pytest
from backends import host_code

from r1kernels import Objective, objectives

pytestmark = host_code

DEFAULTS = Objective()
# The table of published defaults: only what differs from `Objective()`.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {}),
    "r1": ({}, {"clip_low": 10.0, "clip_high": 10.0, "kl_coef": 0.001}),
    "bnpo": ({}, {"aggregate": "token_mean"}),
    "dr_grpo": ({"max_length": 4096}, {"aggregate": "constant", "max_length": 4096}),
    "dapo": ({}, {"clip_high": 0.28, "aggregate": "token_mean"}),
    "gspo": ({}, {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    "gspo_token": ({}, {"ratio": "sequence_token", "clip_low": 3e-4, "clip_high": 4e-4}),
    "gmpo": ({}, {"surrogate": "gmpo", "ratio": "sequence", "clip_low": 0.4, "clip_high": 0.4}),
    "luspo": (
        {}, {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "constant", "max_length": 1},
    ),
    "cispo": ({}, {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregate": "token_mean"}),
    "dppo": (
        {"divergence": "kl"},
        {"surrogate": "dppo_kl", "clip_low": 0.05, "clip_high": 0.05, "ratio_cap": 20.0, "aggregate": "token_mean"},
    ),
    "ipo": (
        {}, {"surrogate": "ipo", "clip_low": 0.1, "clip_high": 0.1, "tau_pos": 1e-3, "tau_neg": 1e-3,
             "aggregate": "token_mean"},
    ),
    "vespo": (
        {}, {"surrogate": "vespo", "ratio": "sequence_product", "tau_pos": 3.0, "tau_neg": 2.0,
             "aggregate": "token_mean"},
    ),
    "sapo": ({}, {"surrogate": "sapo"}),
    "reinforce": ({}, {"surrogate": "reinforce", "aggregate": "token_mean"}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_ones(name: str) -> None:
    arguments, differences = PRESETS[name]
    assert getattr(objectives, name)(**arguments) == dataclasses.replace(DEFAULTS, **differences)


def test_defaults() -> None:
    assert (DEFAULTS.surrogate, DEFAULTS.ratio, DEFAULTS.aggregate) == ("clip", "token", "sequence_mean")
    assert (DEFAULTS.clip_low, DEFAULTS.clip_high, DEFAULTS.ratio_cap) == (0.2, 0.2, None)
    assert (DEFAULTS.kl, DEFAULTS.kl_coef, DEFAULTS.entropy_coef) == ("k3", 0.0, 0.0)
    assert (DEFAULTS.tau_pos, DEFAULTS.tau_neg) == (1.0, 1.05)


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_of_a_preset_can_be_overridden(name: str) -> None:
    arguments, _ = PRESETS[name]
    changed = getattr(objectives, name)(**arguments, kl_coef=0.5, kl="k2", clip_high=7, entropy_coef=-0.1)
    assert (changed.kl_coef, changed.kl, changed.clip_high, changed.entropy_coef) == (0.5, "k2", 7, -0.1)
    with pytest.raises(ValueError, match=rf"objectives\.{name}: unknown field 'clip_hihg', expected one of surr"):
        getattr(objectives, name)(**arguments, clip_hihg=0.3)


def test_an_objective_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULTS.clip_low = 0.5
    assert len({Objective(), Objective(), objectives.dapo()}) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surrogate": "ppo"}, "surrogate is 'ppo', expected one of clip, cispo, sapo, reinforce"),
        ({"ratio": "word"}, "ratio is 'word', expected one of token, sequence"),
        ({"kl": "k4"}, "kl is 'k4', expected one of k1, k2, k3"),
        ({"aggregate": "mean"}, "aggregate is 'mean', expected one of sequence_mean, token_mean, constant"),
        ({"clip_low": -0.1}, "clip_low is -0.1, expected a finite number >= 0"),
        ({"clip_high": math.inf}, "clip_high is inf, expected a finite number >= 0"),
        ({"clip_low": "0.2"}, "clip_low is '0.2', expected a finite number"),
        ({"clip_low": True}, "clip_low is True, expected a finite number"),
        ({"kl_coef": -1}, "kl_coef is -1, expected a finite number >= 0"),
        ({"kl_coef": math.nan}, "kl_coef is nan, expected a finite number"),
        ({"entropy_coef": math.inf}, "entropy_coef is inf, expected a finite number"),
        ({"tau_pos": 0.0}, "tau_pos is 0.0, expected a finite number > 0"),
        ({"tau_neg": -1.0}, "tau_neg is -1.0, expected a finite number > 0"),
        ({"ratio_cap": 0.0}, "ratio_cap is 0.0, expected a finite number > 0"),
        ({"clip_high": -0.1}, "clip_high is -0.1, expected a finite number >= 0"),
        ({"clip_high": -1.1, "clip_low": 2.0, "surrogate": "cispo"}, "clip_high is -1.1, expected .* >= -1"),
        ({"clip_high": -0.3, "surrogate": "cispo"}, "clip_high is -0.3, expected a finite number >= -0.2"),
        ({"power_pos": -1.0}, "power_pos is -1.0, expected a finite number >= 0"),
        ({"tau_neg": -0.1, "surrogate": "ipo"}, "tau_neg is -0.1, expected a finite number >= 0"),
        ({"kl_ratio": 1}, "kl_ratio is 1, expected True or False"),
        ({"ratio": "sequence", "surrogate": "dppo_tv"}, "ratio is 'sequence' with surrogate 'dppo_tv'"),
        ({"ratio": "sequence_product"}, "ratio is 'sequence_product' with surrogate 'clip'"),
        ({"surrogate": "vespo"}, "ratio is 'token' with surrogate 'vespo', expected 'sequence_product'"),
        ({"surrogate": "vespo", "ratio": "sequence_product", "kl_ratio": True}, "kl_ratio is True with ratio"),
        ({"surrogate": "gmpo"}, "ratio is 'token' with surrogate 'gmpo', expected 'sequence'"),
        ({"surrogate": "gmpo", "ratio": "sequence", "kl_ratio": True}, "kl_ratio is True with surrogate 'gmpo'"),
        ({"ratio_cap": math.inf}, "ratio_cap is inf, expected a finite number"),
        ({"ratio_cap": 3.0, "surrogate": "cispo"}, "ratio_cap is 3.0 with surrogate 'cispo', expected None"),
        ({"ratio": "sequence", "surrogate": "reinforce"}, "ratio is 'sequence' with surrogate 'reinforce'"),
        ({"ratio": "sequence", "surrogate": lambda logprobs, batch: logprobs}, "ratio is 'sequence' with surrogate"),
        ({"aggregate": "constant"}, "max_length is None, expected a positive integer with aggregate 'constant'"),
        ({"aggregate": "constant", "max_length": 0}, "max_length is 0, expected a positive integer"),
        ({"aggregate": "constant", "max_length": 1.5}, "max_length is 1.5, expected a positive integer"),
        ({"max_length": 100}, "max_length is 100 with aggregate 'sequence_mean', expected None"),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (objectives.grpo(), True),
        (objectives.dr_grpo(8), True),
        (objectives.gspo(aggregate="token_mean"), True),
        (objectives.dapo(), False),
    ],
)
def test_needs_sequences(objective: Objective, needs: bool) -> None:
    assert objective.needs_sequences == needs
