"""verl 0.9: policy losses and advantage estimators that verl's config chooses by name, such as `loss_mode: r1_gspo`.

It is enough to install r1kernels, because verl loads `verl_plugin.py` on import. Every loss and estimator computes what
verl's own computes from the same config: docs/migrate/verl.md has the tables. The estimators are in
`verl_advantages.py`, the fused head is in `verl_head.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels import Objective, integrations, objectives
from r1kernels.integrations import check_version
from r1kernels.integrations.verl_advantages import ESTIMATORS
from r1kernels.integrations.verl_config import aggregation, bounds, check_arguments, number

SUPPORTED = "0.9"
PARAMETERS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)


def hook(module: str, name: str, parameters: tuple[str, ...] | None = None) -> Any:
    """What verl calls `module.name`; its parameters must begin with these.

    Raises:
        ImportError: verl has no such name, or it has other parameters.
    """
    way_on = f"this adapter is tested with verl {SUPPORTED}: install verl=={SUPPORTED}.*, or a newer r1kernels"
    value = integrations.hook(module, name, way_on)
    found = tuple(inspect.signature(value).parameters) if parameters else ()
    if parameters and found[: len(parameters)] != parameters:
        raise ImportError(f"{module}.{name} has the parameters {found}, expected {parameters}; {way_on}")
    return value


# ---- policy losses ------------------------------------------------------------------------------------------------


def _vanilla(config: Any, fields: dict[str, Any]) -> Objective:
    limits, cap = bounds(config), number("clip_ratio_c", config.get("clip_ratio_c", 3.0), above=1)
    if cap >= 1 + limits["clip_high"]:
        return objectives.grpo(**limits, ratio_cap=cap, **fields)
    low, high = 1 - limits["clip_low"], 1 + limits["clip_high"]

    def clipped(logprobs: Tensor, _: Tensor | None, tokens: Any) -> Tensor:
        """In verl, this cap is for A < 0 only. That of `objectives.grpo` would bound the ratio for A > 0, too."""
        ratio = (logprobs - tokens.old_logprobs).clamp(-20, 20).exp()
        return -tokens.advantages * torch.where(tokens.advantages < 0, ratio.clamp(low, cap), ratio.clamp(max=high))

    return Objective.token_local(clipped, **fields)


def _dro(config: Any, fields: dict[str, Any]) -> Objective:
    beta = number("policy_loss.dro_beta", config.policy_loss.dro_beta, above=0)

    def loss(logprobs: Tensor, _: Tensor | None, tokens: Any) -> Tensor:
        return 0.5 * beta * (logprobs - tokens.old_logprobs).square() - tokens.advantages * logprobs

    return Objective.token_local(loss, **fields)


def _dppo(divergence: str) -> Callable[..., Objective]:
    return lambda config, fields: objectives.dppo(
        divergence, **bounds(config), ratio_cap=number("clip_ratio_c", config.get("clip_ratio_c", 20.0), above=0),
        **fields,
    )


def _sapo(config: Any, fields: dict[str, Any]) -> Objective:
    return objectives.sapo(**{key: number(key, config.get(key), above=0) for key in ("tau_pos", "tau_neg")}, **fields)


OBJECTIVES: dict[str, Callable[[Any, dict[str, Any]], Objective]] = {
    # A cap of e^10: verl clamps log s to 10.
    "gspo": lambda config, fields: objectives.gspo_token(**bounds(config), ratio_cap=math.exp(10), **fields),
    "cispo": lambda config, fields: objectives.cispo(**bounds(config, negative_high=True), **fields),
    "sapo": _sapo,
    "gpg": lambda config, fields: objectives.reinforce(**fields),
    "geo_mean": lambda config, fields: objectives.gmpo(**bounds(config), **fields),
    "dppo_tv": _dppo("tv"), "dppo_kl": _dppo("kl"), "dro": _dro,
    "vanilla": _vanilla, "grpo": _vanilla, "dapo": _vanilla,  # three names: verl's config has their bounds and mean
}


def _held(kind: str, log_ratio: Tensor, logprobs: Tensor, old: Tensor, A: Tensor, mask: Tensor, config: Any) -> Any:
    """(tokens on which a bound holds, tokens on which the cap holds), as verl counts them."""
    low, high = bounds(config, negative_high=kind == "cispo").values()
    ratio, never = log_ratio.clamp(-20, 20).exp(), torch.zeros_like(mask)
    if kind == "sapo":
        return never, never
    if kind == "geo_mean":
        outside = (log_ratio > high) | (log_ratio < -low)
        return outside & (A > 0), outside & (A < 0)
    if kind == "cispo":
        return (ratio > 1 + high) | (ratio < 1 - low), never
    if kind.startswith("dppo"):
        p, q = logprobs.exp(), old.exp()
        up, moved = p - q, p - q
        if kind == "dppo_kl":
            rest = (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
            moved = (q * (old - logprobs) + rest) * up.sign()
        # As in verl, a bound holds a token whose divergence is NaN: rounding can make p larger than 1.
        held = torch.where(A > 0, (up > 0) & ~(moved <= high), (up < 0) & ~(moved >= -low))
        return held, (ratio > config.get("clip_ratio_c", 20.0)) & ~held
    if kind == "gspo":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        ratio = (torch.where(mask, log_ratio, 0).sum(-1, keepdim=True) / lengths).clamp(max=10).exp()
        return ((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low)), never
    cap = config.get("clip_ratio_c", 3.0)
    return ((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low)), (A < 0) & (ratio > cap)


@torch.no_grad()
def _metrics(kind: str, old: Tensor, logprobs: Tensor, A: Tensor, mask: Tensor, config: Any) -> dict[str, float]:
    """verl's metrics of its own loss, with one synchronisation in place of three."""
    if kind == "gpg":
        return {}
    log_ratio = logprobs - old
    unbounded = kind in ("gspo", "geo_mean", "dro", "objective")
    values = {"actor/ppo_kl": -(log_ratio if unbounded else log_ratio.clamp(-20, 20))}
    if kind not in ("dro", "objective"):
        clipped, capped = _held(kind, log_ratio, logprobs, old, A, mask, config)
        values |= {"actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": capped}
    means = torch.stack([torch.where(mask, value, 0).sum().float() for value in values.values()])
    return dict(zip(values, (means / mask.sum().clamp(min=1)).tolist(), strict=True))


def _of_sequences(advantages: Tensor, mask: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """GMPO in verl: a sequence has the mean of its advantages, and the geometric mean of its weights."""
    count = mask.sum(-1).clamp(min=1)
    mean = torch.where(mask, advantages, 0).sum(-1) / count
    if weights is None:
        return mean, None
    return mean, (torch.where(mask, (weights + 1e-10).log(), 0).sum(-1) / count).exp()


def _policy_loss(kind: str, objective_of: Callable[[Any, dict[str, Any]], Objective]) -> Callable[..., Any]:
    def loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        check_arguments(config, log_prob, old_log_prob=old_log_prob, advantages=advantages,
                        response_mask=response_mask, rollout_is_weights=rollout_is_weights)
        mask, info = response_mask != 0, config.global_batch_info
        per_token, weights = advantages, rollout_is_weights
        if kind == "geo_mean":  # verl ignores loss_agg_mode and the other ranks here
            fields, normalizer = {"aggregate": "sequence_mean"}, float(max(len(mask), 1))
            advantages, weights = _of_sequences(advantages, mask, weights)
        else:
            mode = "seq-mean-token-mean" if kind == "sapo" else loss_agg_mode  # SAPO has one mean in verl
            fields, normalizer = aggregation(mode, mask, **info)
        result = r1kernels.policy_loss(
            log_prob, advantages, old_logprobs=old_log_prob, mask=mask, importance_weights=weights,
            normalizer=normalizer, objective=objective_of(config, fields),
        )
        return result.loss, _metrics(kind, old_log_prob, log_prob, per_token, mask, config)

    return loss


def policy_loss_of(objective: Objective) -> Callable[..., Any]:
    """A policy loss for verl from an objective that verl does not have: `register_policy_loss("my_loss")(this)`.

    All numbers are those of the objective; only its mean is replaced by verl's `loss_agg_mode`. The metric is
    `actor/ppo_kl`. The objective must not need ref_logprobs or entropy, which verl keeps to itself: set `kl_loss_coef`
    and `entropy_coeff` of verl.

    Raises:
        ValueError: the objective has a KL term or an entropy term, or its sum is divided by a constant, as in
            `dr_grpo` and `luspo`.
    """
    if objective.aggregate == "constant":
        raise ValueError("objective.aggregate is 'constant', expected 'token_mean' or 'sequence_mean': verl's "
                         "loss_agg_mode would replace the constant. For dr_grpo, take grpo and seq-mean-token-sum-norm "
                         "with loss_scale_factor; for luspo, take gspo and seq-mean-token-sum")
    for field in ("kl_coef", "entropy_coef"):
        if getattr(objective, field) != 0:
            raise ValueError(f"objective.{field} is {getattr(objective, field)}, expected 0: verl adds these terms by "
                             "kl_loss_coef and entropy_coeff of its actor config")
    return _policy_loss(
        "objective", lambda config, fields: dataclasses.replace(objective, **{"max_length": None, **fields})
    )


# ---- registration ---------------------------------------------------------------------------------------------------


def register(any_version: bool = False) -> list[str]:
    """Registers the losses and advantage estimators in verl, and returns their names. To call it again does nothing.

    Raises:
        ImportError: verl is not installed, it is another version, or it has no such registry.
    """
    check_version("verl", SUPPORTED, any_version)
    core = "verl.trainer.ppo.core_algos"
    register_policy_loss, register_adv_est = hook(core, "register_policy_loss"), hook(core, "register_adv_est")
    hook(core, "compute_policy_loss_vanilla", PARAMETERS)  # what verl gives to a policy loss
    known = hook(core, "POLICY_LOSS_REGISTRY")
    for name, loss in LOSSES.items():
        if name not in known:
            register_policy_loss(name)(loss)
    for name, estimator in ESTIMATORS.items():
        register_adv_est(name)(estimator)
    return [*LOSSES, *ESTIMATORS]


LOSSES = {f"r1_{kind}": _policy_loss(kind, objective_of) for kind, objective_of in OBJECTIVES.items()}
