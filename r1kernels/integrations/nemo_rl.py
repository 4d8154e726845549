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
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import r1kernels
from r1kernels.integrations import check_version, hook, require_keys, require_tensor
from r1kernels.integrations.nemo_rl_settings import SETTINGS, VERSION, checked_settings, objective_of

__all__ = ["SETTINGS", "R1LogitsLoss", "R1PolicyLoss"]
_ROWS = ("token_mask", "advantages", "prev_logprobs", "generation_logprobs")  # (B, S)
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
        ImportError: another version of NeMo-RL.
        ValueError, TypeError: a setting that is out of range, missing, or that this loss does not know.
    """

    settings: SimpleNamespace

    input_name = "LOGPROB"

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False, any_version: bool = False) -> None:
        check_version("nemo-rl", VERSION, any_version)
        loss_type, input_type, by = (
            hook("nemo_rl.algorithms.loss.interfaces", name, f"install NeMo-RL {VERSION}, or use ClippedPGLossFn")
            for name in ("LossType", "LossInputType", "MetricNormalizer"))
        self.settings = at = checked_settings(cfg)
        self.objective: r1kernels.Objective = objective_of(at)
        self.loss_type: Any = loss_type.TOKEN_LEVEL if at.token_level_loss else loss_type.SEQUENCE_LEVEL
        self.input_type: Any = input_type[self.input_name]
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        # NeMo-RL reads this to know whether it must compute log-probs without top-k and top-p.
        self.reference_policy_kl_penalty = 0 if at.use_kl_in_reward else at.reference_policy_kl_penalty
        own = by.TOKENS if at.token_level_loss else by.SEQUENCES
        self.metric_normalizations: dict[str, Any] = {
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

        Raises:
            TypeError, ValueError: a tensor is missing or has another type or shape; a mask has a value other than 0 and
                1; data has `curr_logprobs_keep_mask`, which other commits of NeMo-RL 0.6 give.
        """
        at, now = self.settings, next_token_logprobs
        self._check(now, data)
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
            term.__qualname__ = "KL to reference_policy_logprobs"  # how errors name it
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
            # The check of the masks goes to the host with the metrics: it does not wait once more.
            whole = [_is_0_or_1(data["token_mask"][:, 1:]), _is_0_or_1(data["sample_mask"])]
            *numbers, tokens, samples = torch.stack([x.detach().float() for x in (*values.values(), *whole)]).tolist()
        if not (tokens and samples):
            raise ValueError(f"{'sample_mask' if tokens else 'token_mask'} has a value other than 0 and 1, which would "
                             "weigh the loss; use ClippedPGLossFn")
        return loss, dict(zip(values, numbers, strict=True))

    def _check(self, now: Tensor, data: Mapping[str, Any]) -> None:
        at, reference = self.settings, ()
        if self.reference_policy_kl_penalty != 0:
            reference = ("reference_policy_logprobs",)
        rows = tuple(name for name in _ROWS if name != "prev_logprobs" or not at.force_on_policy_ratio) + reference
        require_keys("data", data, (*rows, "sample_mask"), f"expected the batch of NeMo-RL {VERSION}; use that version")
        if data.get("curr_logprobs_keep_mask") is not None:
            raise ValueError("data has curr_logprobs_keep_mask, which this loss does not know; use ClippedPGLossFn, "
                             f"or NeMo-RL {VERSION} at commit 7ea279a")
        if not isinstance(now, Tensor) or now.dim() != 2:
            raise ValueError(f"next_token_logprobs is {getattr(now, 'shape', now)}, expected shape (B, S - 1)")
        for name in rows:
            require_tensor(name, data[name], (now.shape[0], now.shape[1] + 1))
        require_tensor("sample_mask", data["sample_mask"], (now.shape[0],))

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
        require_keys("data", data, ("input_ids",), f"expected the batch of NeMo-RL {VERSION}; use that version")
        logprobs = r1kernels.token_logprobs(logits[:, :-1], data["input_ids"][:, 1:])
        return super().__call__(logprobs, data, global_valid_seqs, global_valid_toks)


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


def _is_0_or_1(mask: Tensor) -> Tensor:
    return ((mask == 0) | (mask == 1)).all()


def _mean(values: Tensor, mask: Tensor, number: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / number
