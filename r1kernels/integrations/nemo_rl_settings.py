"""The settings of NeMo-RL's clipped policy-gradient loss: what `r1kernels.integrations.nemo_rl` accepts of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import r1kernels
from r1kernels.integrations import require_number

VERSION = "0.6"
# ClippedPGLossConfig and its defaults.
SETTINGS: dict[str, Any] = {
    "disable_ppo_ratio": False, "token_level_loss": True, "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2, "ratio_clip_max": 0.2, "ratio_clip_c": None, "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3", "kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False, "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None, "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None, "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False, "use_cispo": False, "positive_example_nll_weight": 0.0,
}
_OPTIONAL = ("truncated_importance_sampling_ratio", "truncated_importance_sampling_ratio_min", "ratio_clip_c",
             "kl_input_clamp_value", "kl_output_clamp_value")  # None or a number
_NUMBERS = (*_OPTIONAL, "ratio_clip_min", "ratio_clip_max", "reference_policy_kl_penalty",
            "positive_example_nll_weight")


def checked_settings(cfg: Any) -> SimpleNamespace:
    """The settings of `cfg`, a `ClippedPGLossConfig` or a mapping. TypeError, ValueError: as in `R1PolicyLoss`."""
    at = SimpleNamespace(**_given(cfg))
    for name, default in SETTINGS.items():
        value = getattr(at, name)
        if name in _NUMBERS and not (name in _OPTIONAL and value is None):
            require_number(name, value)
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, expected True or False")
    if at.reference_policy_kl_type not in ("k1", "k2", "k3"):
        raise ValueError(f"reference_policy_kl_type is {at.reference_policy_kl_type!r}, expected 'k1', 'k2' or 'k3'")
    if at.sequence_level_importance_ratios and at.token_level_loss:
        raise ValueError("token_level_loss is True with sequence_level_importance_ratios, expected False")
    if at.use_cispo and (at.disable_ppo_ratio or at.force_on_policy_ratio or not at.token_level_loss
                         or at.ratio_clip_c is not None):
        raise ValueError("use_cispo is True, expected token_level_loss and none of disable_ppo_ratio, "
                         "force_on_policy_ratio and ratio_clip_c")
    _check_truncation(at)
    return at


def objective_of(at: SimpleNamespace) -> r1kernels.Objective:
    """The objective of the surrogate. ValueError: a bound is out of range."""
    aggregate = "token_mean" if at.token_level_loss else "sequence_mean"
    if at.disable_ppo_ratio and not at.force_on_policy_ratio:
        return r1kernels.objectives.reinforce(aggregate=aggregate)
    if at.ratio_clip_c is not None and at.ratio_clip_c < 1 + at.ratio_clip_max:
        raise ValueError(f"ratio_clip_c is {at.ratio_clip_c}, expected at least 1 + ratio_clip_max")
    return r1kernels.Objective(
        surrogate="cispo" if at.use_cispo else "clip", clip_low=at.ratio_clip_min, clip_high=at.ratio_clip_max,
        ratio="sequence" if at.sequence_level_importance_ratios else "token", ratio_cap=at.ratio_clip_c,
        aggregate=aggregate)


def _given(cfg: Any) -> dict[str, Any]:
    if isinstance(cfg, Mapping):
        given = dict(SETTINGS, **cfg)
    elif hasattr(cfg, "model_dump"):  # a pydantic model, whose unknown settings vars() does not show
        given = cfg.model_dump()
    else:
        given = dict(getattr(cfg, "__dict__", {}))
    if missing := [name for name in SETTINGS if name not in given]:
        raise TypeError(f"cfg is a {type(cfg).__name__} and has no {missing[0]}, expected ClippedPGLossConfig of "
                        f"NeMo-RL {VERSION}; use that version")
    for name, value in given.items():
        if name not in SETTINGS and value:
            raise ValueError(f"{name} is {value!r}, but NeMo-RL {VERSION} has no such setting; use ClippedPGLossFn")
    return {name: given[name] for name in SETTINGS}


def _check_truncation(at: SimpleNamespace) -> None:
    kind, high, low = (getattr(at, f"truncated_importance_sampling_{name}") for name in ("type", "ratio", "ratio_min"))
    if kind not in (None, "tis", "icepop", "seq-mask-tis"):
        raise ValueError(f"truncated_importance_sampling_type is {kind!r}, expected 'tis', 'icepop' or 'seq-mask-tis'")
    corrected = at.use_importance_sampling_correction and high is not None and (kind == "tis" or low is not None)
    if kind is not None and not corrected:
        raise ValueError(f"truncated_importance_sampling_type is {kind!r} with ratio {high!r} and ratio_min {low!r}, "
                         "expected use_importance_sampling_correction, a ratio, and a ratio_min except with 'tis'")
    if high == 0:
        raise ValueError("truncated_importance_sampling_ratio is 0, expected a number > 0, or None")
    if high is not None and low is not None and low > high:
        raise ValueError(f"truncated_importance_sampling_ratio_min is {low!r}, expected at most "
                         f"truncated_importance_sampling_ratio = {high!r}")
    if kind == "seq-mask-tis" and at.sequence_level_importance_ratios:
        raise ValueError("sequence_level_importance_ratios is True with truncated_importance_sampling_type "
                         "'seq-mask-tis', expected False; use 'tis' or 'icepop' with the ratio of sequences")
