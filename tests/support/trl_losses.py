"""Settings of TRL's GRPOTrainer, for comparisons of its losses with ours on batches that TRL has sampled and scored."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

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
