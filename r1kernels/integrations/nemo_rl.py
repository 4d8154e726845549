"""NeMo-RL: its clipped policy-gradient loss, from log-probs or from logits.

    import nemo_rl.algorithms.grpo as grpo
    from r1kernels.integrations.nemo_rl import R1PolicyLoss

    grpo.ClippedPGLossFn = R1PolicyLoss    # before grpo.setup(...), in your copy of examples/run_grpo.py

Written for NeMo-RL 0.6.0 at commit 7ea279a (2026-08-22), from nemo_rl/algorithms/loss/ (the Protocol `LossFunction`,
`ClippedPGLossConfig`) and docs/design-docs/loss-functions.md. What PyPI has under this name is empty, so the tests call
this file as that commit does; see docs/migrate/nemo_rl.md.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import r1kernels
from r1kernels.integrations import check_version

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
_TOKEN_METRICS = ("probs_ratio", "probs_ratio_clamped", "token_mult_prob_error", "gen_kl_error", "policy_kl_error",
                  "js_divergence_error", "approx_entropy")


class R1PolicyLoss:
    """NeMo-RL's `ClippedPGLossFn`, with its settings, its normalisation and its metrics.

    loss = reduce(w surrogate) + reference_policy_kl_penalty reduce(kl) + positive_example_nll_weight nll

    reduce is the sum over tokens / global_valid_toks if `token_level_loss`, else the sum over sequences of the mean
    over their tokens / global_valid_seqs.

    Args:
        cfg: a `ClippedPGLossConfig`, or a mapping with its keys.
        use_fused_linear_logprobs: as in `ClippedPGLossFn`: NeMo-RL computes log-probs from hidden states.
        any_version: accept every version of NeMo-RL.

    Raises:
        ImportError: another version of NeMo-RL. ValueError, TypeError: a setting that is out of range, missing, or that
        this loss does not know.
    """

    input_name = "LOGPROB"

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False, any_version: bool = False) -> None:
        check_version("nemo-rl", VERSION, any_version)
        names = importlib.import_module("nemo_rl.algorithms.loss.interfaces")
        for name in ("LossType", "LossInputType", "MetricNormalizer"):
            if not hasattr(names, name):
                raise ImportError(f"{names.__name__} has no {name}, expected NeMo-RL {VERSION}; install it")
        self.settings = at = _settings(cfg)
        self.objective = _objective(at)
        self.loss_type = names.LossType.TOKEN_LEVEL if at.token_level_loss else names.LossType.SEQUENCE_LEVEL
        self.input_type = names.LossInputType[self.input_name]
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        # NeMo-RL reads this to know whether it must compute log-probs without top-k and top-p.
        self.reference_policy_kl_penalty = 0 if at.use_kl_in_reward else at.reference_policy_kl_penalty
        by = names.MetricNormalizer
        own = by.TOKENS if at.token_level_loss else by.SEQUENCES
        self.metric_normalizations = {
            "loss": own, "kl_penalty": own, **dict.fromkeys(_TOKEN_METRICS, by.TOKENS),
            "sampling_importance_ratio": by.SEQUENCES if at.sequence_level_importance_ratios else by.TOKENS,
            "is_oob_ratio": by.SEQUENCES if at.truncated_importance_sampling_type == "seq-mask-tis" else by.TOKENS,
            **dict.fromkeys(("num_valid_samples", "positive_nll_loss", "probs_ratio_min", "probs_ratio_max",
                             "probs_ratio_clamped_min", "probs_ratio_clamped_max"), by.NONE),
        }

    def __call__(
        self, next_token_logprobs: Tensor, data: Mapping[str, Any], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch, and its metrics as Python numbers (one transfer from the device).

        Args:
            next_token_logprobs: (B, S - 1), float32, with a gradient.
            data: of B sequences of S tokens: `advantages`, `prev_logprobs`, `generation_logprobs`,
                `reference_policy_logprobs`, `token_mask` (B, S), of which the first token is not used; `sample_mask`
                (B,); maybe `curr_logprobs_unfiltered` (B, S - 1) and `rewards` (B,).
            global_valid_seqs, global_valid_toks: numbers of the whole batch, 0-d.
        """
        at, now = self.settings, next_token_logprobs
        mask = (data["token_mask"][:, 1:] != 0) & (data["sample_mask"] != 0)[:, None]
        seqs, toks = global_valid_seqs + 1e-8, global_valid_toks + 1e-8  # a batch without tokens has loss 0
        common = {"mask": mask, "normalizer": toks if at.token_level_loss else seqs}
        sampled = data["generation_logprobs"][:, 1:]
        old = None if at.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        weights, outside = _importance_weights(at, now.detach() if old is None else old, sampled, mask)
        loss = r1kernels.policy_loss(
            now, data["advantages"][:, 1:], old_logprobs=old, objective=self.objective,
            importance_weights=weights.expand_as(now) if at.use_importance_sampling_correction else None, **common,
        ).loss
        kl = nll = torch.zeros((), device=now.device)
        if self.reference_policy_kl_penalty != 0:
            term = functools.partial(
                _kl, at.reference_policy_kl_type, at.kl_input_clamp_value, at.kl_output_clamp_value)
            kl = r1kernels.policy_loss(
                data.get("curr_logprobs_unfiltered", now), torch.zeros_like(now),
                old_logprobs=sampled if at.use_on_policy_kl_approximation else None,
                ref_logprobs=data["reference_policy_logprobs"][:, 1:],
                objective=r1kernels.Objective.token_local(term, aggregate=self.objective.aggregate), **common,
            ).loss
            loss = loss + self.reference_policy_kl_penalty * kl
        if at.positive_example_nll_weight > 0 and "rewards" in data:
            nll = r1kernels.policy_loss(
                now, torch.ones_like(now), mask=mask & (data["rewards"] > 0)[:, None],
                objective=r1kernels.objectives.reinforce(),
            ).loss
            loss = loss + at.positive_example_nll_weight * nll
        with torch.no_grad():
            values = self._measured(now, now if old is None else old, sampled, mask, toks)
            values.update(loss=loss, kl_penalty=kl, positive_nll_loss=nll, num_valid_samples=data["sample_mask"].sum())
            by_sequence = (data["sample_mask"] != 0)[:, None]
            level = (by_sequence, seqs) if at.sequence_level_importance_ratios else (mask, toks)
            values["sampling_importance_ratio"] = _mean(weights, *level)
            if outside is not None:
                level = (by_sequence, seqs) if at.truncated_importance_sampling_type == "seq-mask-tis" else (mask, toks)
                values["is_oob_ratio"] = _mean(outside, *level)
            numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
        return loss, dict(zip(values, numbers, strict=True))

    def _measured(self, now: Tensor, old: Tensor, sampled: Tensor, mask: Tensor, toks: Tensor) -> dict[str, Tensor]:
        at = self.settings
        now, old, sampled = (torch.where(mask, value, 0) for value in (now, old, sampled))
        ratio = (now - old).exp()
        if at.disable_ppo_ratio and not at.force_on_policy_ratio:
            ratio = now  # NeMo-RL reports log-probs here
        elif at.sequence_level_importance_ratios:
            ratio = ((now - old).sum(-1) / mask.sum(-1).clamp(min=1)).exp()[:, None].expand_as(now)
        unclamped = at.disable_ppo_ratio or at.force_on_policy_ratio
        clamped = ratio if unclamped else ratio.clamp(1 - at.ratio_clip_min, 1 + at.ratio_clip_max)
        mixture = torch.logaddexp(old, sampled) - math.log(2)
        kl = functools.partial(r1kernels.kl_estimate, estimator=at.reference_policy_kl_type)
        values = {
            "probs_ratio": ratio, "probs_ratio_clamped": clamped, "token_mult_prob_error": (sampled - old).abs().exp(),
            "gen_kl_error": kl(sampled, old), "policy_kl_error": kl(old, sampled),
            "js_divergence_error": sum(r1kernels.kl_estimate(mixture, part) for part in (old, sampled)) / 2,
            "approx_entropy": -(now - sampled).exp() * now,
        }
        means = {name: _mean(value, mask, toks) for name, value in values.items()}
        for name in ("probs_ratio", "probs_ratio_clamped"):
            means[f"{name}_min"] = torch.where(mask, values[name], torch.inf).min()
            means[f"{name}_max"] = torch.where(mask, values[name], -torch.inf).max()
        return means


class R1LogitsLoss(R1PolicyLoss):
    """`R1PolicyLoss` of logits (B, S, V), of the whole vocabulary, without top-k and top-p. TypeError: a DTensor."""

    input_name = "LOGIT"

    def __call__(
        self, logits: Tensor, data: Mapping[str, Any], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        if isinstance(logits, DTensor):
            raise TypeError(f"logits are a DTensor with placements {logits.placements}, expected a tensor with the "
                            "whole vocabulary; use R1PolicyLoss with tensor parallelism")
        logprobs = r1kernels.token_logprobs(logits[:, :-1], data["input_ids"][:, 1:])
        return super().__call__(logprobs, data, global_valid_seqs, global_valid_toks)


def _settings(cfg: Any) -> SimpleNamespace:
    given = dict(SETTINGS, **cfg) if isinstance(cfg, Mapping) else vars(cfg)
    if missing := [name for name in SETTINGS if name not in given]:
        raise TypeError(f"cfg has no {missing[0]}, expected ClippedPGLossConfig of NeMo-RL {VERSION}; use that version")
    for name, value in given.items():
        if name not in SETTINGS and value:
            raise ValueError(f"{name} is {value!r}, but NeMo-RL {VERSION} has no such setting; use ClippedPGLossFn")
    at = SimpleNamespace(**{name: given[name] for name in SETTINGS})
    if at.sequence_level_importance_ratios and at.token_level_loss:
        raise ValueError("token_level_loss is True with sequence_level_importance_ratios, expected False")
    if at.use_cispo and (at.disable_ppo_ratio or at.force_on_policy_ratio or not at.token_level_loss
                         or at.ratio_clip_c is not None):
        raise ValueError("use_cispo is True, expected token_level_loss and none of disable_ppo_ratio, "
                         "force_on_policy_ratio and ratio_clip_c")
    kind, high, low = (getattr(at, f"truncated_importance_sampling_{name}") for name in ("type", "ratio", "ratio_min"))
    if kind not in (None, "tis", "icepop", "seq-mask-tis"):
        raise ValueError(f"truncated_importance_sampling_type is {kind!r}, expected 'tis', 'icepop' or 'seq-mask-tis'")
    corrected = at.use_importance_sampling_correction and high is not None and (kind == "tis" or low is not None)
    if kind is not None and not corrected:
        raise ValueError(f"truncated_importance_sampling_type is {kind!r} with ratio {high!r} and ratio_min {low!r}, "
                         "expected use_importance_sampling_correction, a ratio, and a ratio_min except with 'tis'")
    return at


def _objective(at: SimpleNamespace) -> r1kernels.Objective:
    aggregate = "token_mean" if at.token_level_loss else "sequence_mean"
    if at.disable_ppo_ratio and not at.force_on_policy_ratio:
        return r1kernels.objectives.reinforce(aggregate=aggregate)
    if at.ratio_clip_c is not None and at.ratio_clip_c < 1 + at.ratio_clip_max:
        raise ValueError(f"ratio_clip_c is {at.ratio_clip_c}, expected at least 1 + ratio_clip_max")
    return r1kernels.Objective(
        surrogate="cispo" if at.use_cispo else "clip", clip_low=at.ratio_clip_min, clip_high=at.ratio_clip_max,
        ratio="sequence" if at.sequence_level_importance_ratios else "token", ratio_cap=at.ratio_clip_c,
        aggregate=aggregate)


def _importance_weights(
    at: SimpleNamespace, old: Tensor, sampled: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(weights, which are outside of the limits), of tokens (B, T), or of sequences (B, 1)."""
    gap = torch.where(mask, old - sampled, 0)
    weights = (gap.sum(-1, keepdim=True) if at.sequence_level_importance_ratios else gap).exp()
    weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0)
    kind, high = at.truncated_importance_sampling_type, at.truncated_importance_sampling_ratio
    if kind is None:
        return weights, None
    low = at.truncated_importance_sampling_ratio_min or 0.0
    measured = weights
    if kind == "seq-mask-tis":
        measured = (torch.nan_to_num(gap).sum(-1) / mask.sum(-1).clamp(min=1)).exp()[:, None]
    outside = (measured > high) | (measured < low)
    return weights.clamp(low, high) if kind == "tis" else torch.where(outside, 0, weights), outside


def _kl(
    kind: str, most: float | None, largest: float | None, logprobs: Tensor, _: Tensor | None, tokens: Any
) -> Tensor:
    """NeMo-RL's estimate of a token: weighted by its probability, with limits on the log-ratio and on the result."""
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    weight, gap = torch.nan_to_num((logprobs - old).exp(), posinf=0.0), tokens.ref_logprobs - logprobs
    if most is not None:
        inside = gap.clamp(-most, most)
        weight, gap = torch.where(gap == inside, weight, weight.detach()), inside
    value = weight * {"k1": -gap, "k2": gap.square() / 2, "k3": gap.expm1() - gap}[kind]
    return value if largest is None else value.clamp(-largest, largest)


def _mean(values: Tensor, mask: Tensor, number: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / number
