"""prime-rl: losses for `[trainer.loss] type = "custom"`, and the fused head.

    [trainer.loss]
    type = "custom"
    import_path = "r1kernels.integrations.prime_rl.dppo"    # or ipo, grpo, cispo, gspo, policy_loss

A loss is called once for each sequence, with a `LossInputs` and the `kwargs` of the recipe. It returns the sum over
the sequence's tokens, which prime-rl divides by the number of tokens of all ranks. Written for prime-rl 0.8.0 at commit
559b447 (2026-08-21): trainer/rl/loss.py, trainer/models/layers/lm_head.py and docs/algorithms.md. prime-rl is not on
PyPI, so the tests call this file as prime-rl's code does; see docs/migrate/prime_rl.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import r1kernels
from r1kernels.integrations import check_version, hook, require_number, require_tensor

VERSION = "0.8"
_WAY_ON = f"expected that of prime-rl {VERSION}; install it, or call use_fused_head(model) after the model is made"
# What prime-rl logs is the mean over sequences, which has no meaning for counts and extremes.
_METRICS = ("ratio_mean", "approx_kl", "kl", "clip_fraction", "clip_low_fraction", "clip_high_fraction",
            "ratio_cap_fraction")


def dppo(
    inputs: Any, dppo_mask_low: float = 0.2, dppo_mask_high: float = 0.2, adv_tau: float = 1.0, kl_tau: float = 1e-3
) -> r1kernels.PolicyLoss:
    """The loss of `type = "default"`, with its four settings and its metrics.

        loss = sum_t w_t (-keep_t adv_tau A_t r_t + kl_tau (log r_t)^2);  keep is 0 if A > 0 and p - p_old >
        dppo_mask_high, or A <= 0 and p_old - p > dppo_mask_low

    Args:
        inputs: prime-rl's `LossInputs` of one sequence of T tokens: `trainer_logprobs`, `inference_logprobs`,
            `advantages` (T,) float32; `loss_mask` (T,) bool; `loss_weights` (T,) or None for w = 1.
        dppo_mask_low, dppo_mask_high, adv_tau, kl_tau: those of prime-rl's `DefaultLossConfig`, all >= 0.

    Returns:
        `PolicyLoss(loss, metrics)`: 0-d, and tensors without a gradient.

    Raises:
        TypeError: a field is missing or of another type.
        ValueError: a setting is out of range, a shape is not (T,).
    """
    for name, setting in (("dppo_mask_low", dppo_mask_low), ("dppo_mask_high", dppo_mask_high), ("adv_tau", adv_tau),
                          ("kl_tau", kl_tau)):
        require_number(name, setting)
    new, old, advantages, mask = _constants(inputs)
    moved = new.exp() - old.exp()
    high, low = moved > dppo_mask_high, moved < -dppo_mask_low
    outside = torch.where(advantages > 0, high, low)
    # Of IPO, only (log r)^2 is left for a token whose advantage is 0. A bound of 2 masks no token: the difference of
    # two probabilities is at most 1.
    loss = _ipo(inputs, 2.0, kl_tau, adv_tau * torch.where(outside, 0, advantages))
    metrics = {
        **_mismatch(new, old, mask, outside),
        "is_masked_low": _mean((advantages < 0) & low, mask),
        "is_masked_high": _mean((advantages > 0) & high, mask),
        "masked_advantage_positive": _mean(advantages > 0, mask & outside),
        "masked_advantage_negative": _mean(advantages < 0, mask & outside),
    }
    return r1kernels.PolicyLoss(loss, metrics)


def ipo(inputs: Any, ipo_threshold: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3) -> r1kernels.PolicyLoss:
    """The loss of `type = "ipo"`, with its three settings and its metrics.

        loss = sum_t w_t (-keep_t adv_tau A_t r_t + kl_tau (log r_t)^2);  keep is 0 if |p - p_old| > ipo_threshold

    Arguments, result and errors are those of `dppo`.
    """
    for name, setting in (("ipo_threshold", ipo_threshold), ("adv_tau", adv_tau), ("kl_tau", kl_tau)):
        require_number(name, setting)
    new, old, advantages, mask = _constants(inputs)
    outside = (new.exp() - old.exp()).abs() > ipo_threshold
    loss = _ipo(inputs, ipo_threshold, kl_tau, adv_tau * advantages)
    return r1kernels.PolicyLoss(loss, _mismatch(new, old, mask, outside))


def policy_loss(inputs: Any, objective: str = "grpo", **fields: Any) -> r1kernels.PolicyLoss:
    """Any objective of r1kernels: the sum of its losses over the tokens.

    Args:
        inputs: as in `dppo`. `kl_coef` needs `ref_logprobs`.
        objective: the name of a preset of `r1kernels.objectives`: "grpo", "cispo", "gspo", "gmpo", "sapo", "vespo" ...
        fields: of `r1kernels.Objective`, such as `clip_low`, `clip_high`, `ratio_cap`.

    ValueError: an unknown objective; `aggregate`, `max_length` or `entropy_coef`, which prime-rl decides; `kl_coef`
    together with weights of tokens.
    """
    for field in ("aggregate", "max_length", "entropy_coef"):
        if field in fields:
            raise ValueError(f"{field} is {fields[field]!r}, expected no such setting: prime-rl divides the sum of all "
                             "tokens by their number, and gives a loss no entropy")
    _, _, advantages, _ = _constants(inputs)
    chosen = _preset(objective, fields)
    if chosen.kl_coef != 0 and inputs.loss_weights is not None:
        raise ValueError(f"kl_coef is {chosen.kl_coef} with weights of tokens, which would not weigh the KL term; "
                         "use kl_coef = 0, or a recipe whose algorithms give no weights")
    result = _summed(inputs, chosen, advantages)
    return result._replace(metrics={name: result.metrics[name] for name in _METRICS if name in result.metrics})


def grpo(inputs: Any, **fields: Any) -> r1kernels.PolicyLoss:
    """`policy_loss` with "grpo": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), bounds of 0.2."""
    return policy_loss(inputs, "grpo", **fields)


def cispo(inputs: Any, **fields: Any) -> r1kernels.PolicyLoss:
    """`policy_loss` with "cispo": -sg[clip(r, 1 - clip_low, 1 + clip_high)] A l, bounds of 0 and 5."""
    return policy_loss(inputs, "cispo", **fields)


def gspo(inputs: Any, **fields: Any) -> r1kernels.PolicyLoss:
    """`policy_loss` with "gspo": one ratio for the sequence, bounds of 3e-4 and 4e-4."""
    return policy_loss(inputs, "gspo", **fields)


def use_fused_head(model: nn.Module) -> None:
    """Makes `model.lm_head(hidden, labels, temperature)` return log-probs and entropy without a tensor of logits.

    Only the `forward` of this one module changes, so weights, hooks and names of parameters stay, and it works before
    and after FSDP2 wraps the head. `restore_head(model)` undoes it. The head then takes hidden states (B, T, H), labels
    (B, T), already shifted, and temperature (B, T), and returns {"logprobs", "entropy"}: (B, T), float32, nats.
    The entropy has no gradient, as in prime-rl. Without labels or temperature, the forward of the head's class runs,
    with the arguments that were given. The head also takes `kept_tokens` (B, T, K), ids that sampling kept, padded with
    -1, as on prime-rl's branch feat/sampling-replay (d09488d, 2026-08-11). A token that is not in its set is scored
    over the whole vocabulary.

    Raises:
        TypeError: the head is not a linear layer.
    """
    head = getattr(model, "lm_head", None)
    # Heads of other packages, such as float8, may do more than a product with their weight.
    if not isinstance(head, nn.Linear) or type(head).forward.__module__.split(".")[0] not in ("torch", "prime_rl"):
        raise TypeError(f"model.lm_head is a {type(head).__name__}, expected a torch.nn.Linear or a head of prime-rl: "
                        "the fused head needs one weight (V, H); keep prime-rl's own head for this model")
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)  # of a model of images and text
    head.forward = functools.partial(_fused_forward, head, getattr(config, "final_logit_softcapping", None))


def restore_head(model: nn.Module) -> None:
    """Undoes `use_fused_head`."""
    vars(model.lm_head).pop("forward", None)


def inject_lm_head(model: nn.Module, chunk_size: int | None = None, any_version: bool = False) -> None:
    """prime-rl's `inject_prime_lm_head`, and then `use_fused_head`. ImportError: another version of prime-rl."""
    check_version("prime-rl", VERSION, any_version)
    hook("prime_rl.trainer.models.layers.lm_head", "inject_prime_lm_head", _WAY_ON)(model, chunk_size=chunk_size)
    use_fused_head(model)


@contextlib.contextmanager
def fused_lm_head(any_version: bool = False) -> Iterator[None]:
    """Models that prime-rl sets up inside this context have the fused head. ImportError: another version of it."""
    check_version("prime-rl", VERSION, any_version)
    original = hook("prime_rl.trainer.model", "inject_prime_lm_head", _WAY_ON)
    user = importlib.import_module("prime_rl.trainer.model")
    user.inject_prime_lm_head = functools.partial(inject_lm_head, any_version=any_version)
    try:
        yield
    finally:
        user.inject_prime_lm_head = original


def _fused_forward(
    head: nn.Linear, softcap: float | None, hidden_states: Tensor, labels: Tensor | None = None,
    temperature: Tensor | None = None, kept_tokens: Tensor | None = None,
) -> Any:
    if labels is None or temperature is None:
        options = {"labels": labels, "temperature": temperature, "kept_tokens": kept_tokens}
        given = {name: value for name, value in options.items() if value is not None}  # torch's own head takes none
        return type(head).forward(head, hidden_states, **given)
    support = None
    if kept_tokens is not None:
        usable = (kept_tokens == labels[..., None]).any(-1, keepdim=True) & (kept_tokens >= 0)
        lengths = usable.sum(-1).flatten()
        support = kept_tokens[usable], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    logprobs, entropy = r1kernels.linear_token_logprobs_and_entropy(
        hidden_states, head.weight, labels, bias=head.bias, temperature=temperature, softcap=softcap, support=support
    )
    return {"logprobs": logprobs.clone(), "entropy": entropy.detach()}  # FSDP2 warns of outputs that are views


def _constants(inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(trainer_logprobs, inference_logprobs, advantages, mask), 0 behind the mask and without a gradient."""
    for name in ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask", "loss_weights"):
        if not hasattr(inputs, name):
            raise TypeError(f"inputs has no {name}, expected the LossInputs of prime-rl {VERSION}; use that version, "
                            "or one of its own losses")
    shape = tuple(getattr(inputs.trainer_logprobs, "shape", ()))[:1]
    for name in ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask"):
        require_tensor(name, getattr(inputs, name), shape, boolean=name == "loss_mask")
    mask = inputs.loss_mask
    values = (inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages)
    return *(torch.where(mask, value.detach(), 0) for value in values), mask


def _preset(name: str, fields: dict[str, Any]) -> r1kernels.Objective:
    preset = getattr(r1kernels.objectives, str(name), None) if str(name).islower() else None
    known = getattr(preset, "__module__", "") == r1kernels.objectives.__name__ and name not in ("dr_grpo", "luspo")
    if not known:
        raise ValueError(f"objective is {name!r}, expected a preset of r1kernels.objectives, such as 'grpo', but not "
                         "'dr_grpo' or 'luspo', because prime-rl divides by the number of tokens")
    return preset(**fields, aggregate="token_mean")


def _ipo(inputs: Any, bound: float, kl_tau: float, advantages: Tensor) -> Tensor:
    """sum_t w_t (-r_t A_t + kl_tau (log r_t)^2), without the first term where |p - p_old| > bound."""
    objective = r1kernels.objectives.ipo(clip_low=bound, clip_high=bound, tau_pos=kl_tau, tau_neg=kl_tau)
    return _summed(inputs, objective, advantages).loss


def _summed(inputs: Any, objective: r1kernels.Objective, advantages: Tensor) -> r1kernels.PolicyLoss:
    """The sum over tokens, of one sequence (1, T)."""
    optional = (inputs.ref_logprobs, inputs.loss_weights)
    reference, weights = (None if value is None else value[None] for value in optional)
    return r1kernels.policy_loss(
        inputs.trainer_logprobs[None], advantages[None], old_logprobs=inputs.inference_logprobs[None],
        ref_logprobs=reference, mask=inputs.loss_mask[None], importance_weights=weights, normalizer=1.0,
        objective=objective,
    )


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(dtype=torch.float32) / mask.sum().clamp(min=1)


def _mismatch(new: Tensor, old: Tensor, mask: Tensor, outside: Tensor) -> dict[str, Tensor]:
    """The metrics that prime-rl has for "default" and for "ipo"."""
    kl = (new - old).expm1() - (new - old)
    return {
        "masked_mismatch_kl": _mean(kl, mask & outside),
        "unmasked_mismatch_kl": _mean(kl, mask & ~outside),
        "is_masked": _mean(outside, mask),
    }
