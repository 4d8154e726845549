"""The losses of TRL's GRPOTrainer, and ours for the same settings, on batches that TRL has sampled and scored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels import Objective, importance_weights, linear_grpo_loss, linear_token_logprobs_and_entropy, objectives

# Settings of TRL, by what they are called in the tests. `weights` are those of its correction for vLLM.
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OPTIONS: dict[str, dict[str, Any]] = {
    "epsilon": {"epsilon": 0.1, "epsilon_high": 0.3},
    "delta": {"delta": 1.25},
    "delta below the bound": {"delta": 1.1, "epsilon_high": 0.3},
    "beta": {"beta": 0.3},
    "beta without the ratio": {"beta": 0.3, "use_bias_correction_kl": False},
    "sequence ratio": {"importance_sampling_level": "sequence", "epsilon": 0.05},
    "sequence ratio, beta": {"importance_sampling_level": "sequence", "beta": 0.3},
    "top entropy": {"top_entropy_quantile": 0.3},
    "top entropy, beta": {"top_entropy_quantile": 0.3, "beta": 0.3},
    "off policy": {"off_policy_mask_threshold": 0.02},
    "entropy": {"entropy_coef": 0.2},
    "entropy of the top": {"entropy_coef": 0.2, "top_entropy_quantile": 0.5},
    "token_truncate": {"weights": "token_truncate", "vllm_importance_sampling_clip_max": 1.2},
    "token_mask": {"weights": "token_mask", "vllm_importance_sampling_clip_max": 1.3,
                   "vllm_importance_sampling_clip_min": 0.7},
    "sequence_truncate": {"weights": "sequence_truncate", "vllm_importance_sampling_clip_max": 1.2},
    "sequence_mask": {"weights": "sequence_mask", "vllm_importance_sampling_clip_max": 1.5},
    "everything": {"weights": "token_truncate", "beta": 0.2, "top_entropy_quantile": 0.5, "delta": 1.3,
                   "off_policy_mask_threshold": 0.05, "entropy_coef": 0.1},
}
OF_LOSS: dict[str, dict[str, Any]] = {  # settings that make a loss do something
    "cispo": {"epsilon_high": 1.1}, "sapo": {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5},
}


def objective_of(trainer: Any) -> Objective:
    """The objective of a trainer's settings. `entropy_coef` is apart: see `our_loss`."""
    args, name = trainer.args, trainer.loss_type
    kl = {"kl_coef": trainer.beta, "kl_ratio": args.use_bias_correction_kl and trainer.beta != 0}
    level = {"ratio": trainer.importance_sampling_level, **kl}
    if name == "cispo":
        return objectives.cispo(clip_high=trainer.epsilon_high - 1, **level)
    if name == "sapo":
        return objectives.sapo(tau_pos=args.sapo_temperature_pos, tau_neg=args.sapo_temperature_neg, **level)
    if name == "vespo":
        return objectives.vespo(power_pos=args.vespo_k_pos, tau_pos=args.vespo_lambda_pos, power_neg=args.vespo_k_neg,
                                tau_neg=args.vespo_lambda_neg)
    fields = {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high, "ratio_cap": args.delta, **level}
    if name == "dr_grpo":
        return objectives.dr_grpo(trainer.max_completion_length, **fields)
    return getattr(objectives, name)(**fields)


def normalizer_of(trainer: Any, inputs: dict[str, Tensor]) -> Tensor | float:
    """The denominator of one micro-batch: gradients of accumulated micro-batches are added."""
    mask, steps = inputs["completion_mask"], trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("cispo", "dapo", "vespo"):
        return inputs["num_items_in_batch"].clamp(min=1.0) * steps / trainer.args.steps_per_generation
    count = {"bnpo": mask.sum(), "dr_grpo": len(mask) * trainer.max_completion_length}.get(trainer.loss_type, len(mask))
    return count * float(steps)


def sampler_weights(trainer: Any, inputs: dict[str, Tensor]) -> Tensor:
    level, mode = trainer.vllm_importance_sampling_mode.split("_")
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    return importance_weights(
        inputs["old_per_token_logps"], inputs["sampling_per_token_logps"], inputs["completion_mask"], level=level,
        mode=mode, floor=low or 0.0, cap=math.inf if high is None else high,
    ).weights


def our_loss(trainer: Any, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The loss from hidden states, with filters from statistics of the same batch."""
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    hidden = model.model(
        input_ids=torch.cat([inputs["prompt_ids"], ids], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], mask], 1),
    ).last_hidden_state[:, -ids.shape[1] - 1 : -1]
    head = {"weight": model.lm_head.weight, "token_ids": ids, "mask": mask, "temperature": trainer.temperature}
    objective, normalizer = objective_of(trainer), normalizer_of(trainer, inputs)
    tokens = {
        "advantages": inputs["advantages"], "mask": mask, "old_logprobs": inputs.get("old_per_token_logps"),
        "ref_logprobs": inputs.get("ref_per_token_logps") if trainer.beta else None,
    }
    weights = torch.ones_like(ids, dtype=torch.float32)
    with torch.no_grad():
        logprobs, entropy = linear_token_logprobs_and_entropy(hidden, **head)
    if trainer.top_entropy_quantile < 1:
        kept = r1kernels.high_entropy_filter(entropy, mask, top=trainer.top_entropy_quantile)
        weights = weights * kept
    if trainer.off_policy_mask_threshold is not None:
        sampled = inputs.get("sampling_per_token_logps", tokens["old_logprobs"])
        weights = weights * r1kernels.off_policy_filter(
            logprobs, logprobs if sampled is None else sampled, inputs["advantages"], mask,
            threshold=trainer.off_policy_mask_threshold)[:, None]
    if trainer.use_vllm:
        of_sampler = sampler_weights(trainer, inputs)
        if trainer.loss_type == "vespo":  # TRL multiplies the ratio instead
            tokens["old_logprobs"] = tokens["old_logprobs"] - of_sampler.clamp(min=1e-8).log()
        else:
            weights = weights * (of_sampler if of_sampler.dim() == 2 else of_sampler[:, None])
    loss = linear_grpo_loss(hidden, **head, **{name: value for name, value in tokens.items() if name != "mask"},
                            importance_weights=weights, normalizer=normalizer, objective=objective).loss
    zero = torch.zeros_like(inputs["advantages"])
    if trainer.loss_type == "vespo" and trainer.beta:  # the ratio of its KL term is that of the token
        alone = objectives.reinforce(kl_coef=trainer.beta, kl_ratio=trainer.args.use_bias_correction_kl)
        given = {"old_logprobs": inputs["old_per_token_logps"], "ref_logprobs": tokens["ref_logprobs"]}
        loss = loss + linear_grpo_loss(hidden, **head, **given, advantages=zero, normalizer=normalizer,
                                       objective=alone).loss
    if trainer.entropy_coef:  # a mean over the tokens that the filter keeps
        counted = mask * kept if trainer.top_entropy_quantile < 1 else mask
        alone = objectives.reinforce(entropy_coef=trainer.entropy_coef)
        loss = loss + linear_grpo_loss(
            hidden, **head | {"mask": counted}, advantages=zero, objective=alone,
            normalizer=counted.sum().clamp(min=1).float() * trainer.current_gradient_accumulation_steps).loss
    return loss


def with_settings(trainer: Any, loss_type: str, options: dict[str, Any]) -> None:
    """Gives a trainer the settings of one case, where its loss looks for them."""
    defaults = {
        "epsilon": 0.2, "epsilon_high": None, "delta": None, "beta": 0.0, "use_bias_correction_kl": True,
        "importance_sampling_level": "sequence" if loss_type == "luspo" else "token", "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "entropy_coef": 0.0, "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": None, "weights": None,
    }
    given = defaults | OF_LOSS.get(loss_type, {}) | options
    weights = given.pop("weights")
    trainer.loss_type, trainer.use_vllm = loss_type, weights is not None
    trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_correction = weights, True
    for name, value in given.items():
        setattr(trainer.args, name, value)
        setattr(trainer, name, value)
    trainer.epsilon_low = given["epsilon"]
    trainer.epsilon_high = given["epsilon"] if given["epsilon_high"] is None else given["epsilon_high"]
    trainer._entropy_bonus_enabled = given["entropy_coef"] != 0


def trl_weights(trainer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """TRL's correction for vLLM, which it computes when it scores a batch."""
    gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
    level, mode = trainer.vllm_importance_sampling_mode.split("_")
    ratio = (gap.sum(-1, keepdim=True) if level == "sequence" else gap).exp()
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    if mode == "truncate":
        return ratio.clamp(min=low, max=high)
    outside = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(outside, 0)
