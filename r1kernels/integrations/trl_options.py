"""The options of TRL's GRPOTrainer: the objective that they mean, and what the one pass refuses."""

from __future__ import annotations

import inspect
import math
from typing import Any

from r1kernels import Objective, objectives
from r1kernels.integrations.trl import SUPPORTED

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# Our fields, and TRL's options that set them.
OPTIONS = {
    "ratio": "importance_sampling_level", "kl_coef": "beta", "ratio_cap": "delta", "clip_low": "epsilon",
    "clip_high": "epsilon_high", "tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg",
}
# What the one pass reads of a GRPOTrainer.
ATTRIBUTES = (
    "loss_type", "beta", "epsilon_low", "epsilon_high", "importance_sampling_level", "top_entropy_quantile", "use_vllm",
    "off_policy_mask_threshold", "vllm_importance_sampling_correction", "max_completion_length", "entropy_coef",
    "use_adaptive_entropy", "_entropy_bonus_enabled", "_last_world_entropy", "get_gamma_weights", "get_off_policy_mask",
    "get_high_entropy_mask",
)
METHODS = ("_compute_loss", "_get_per_token_logps_and_entropies")


def objective_of(trainer: Any) -> Objective:
    """The objective of a GRPOTrainer's settings. For VESPO, it is that of advantages times TRL's weights phi."""
    args, name = trainer.args, trainer.loss_type
    kl = {"kl_coef": trainer.beta, "kl_ratio": bool(args.use_bias_correction_kl) and trainer.beta != 0}
    if name == "vespo":
        return objectives.reinforce(**kl)
    level = {"ratio": trainer.importance_sampling_level, **kl}
    if name == "cispo":
        return objectives.cispo(clip_high=trainer.epsilon_high - 1, **level)
    if name == "sapo":
        return objectives.sapo(tau_pos=args.sapo_temperature_pos, tau_neg=args.sapo_temperature_neg, **level)
    fields = {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high, "ratio_cap": args.delta, **level}
    if name == "dr_grpo":
        return objectives.dr_grpo(trainer.max_completion_length, **fields)
    return getattr(objectives, name)(**fields)


def check_trainer(trainer: Any) -> None:
    """Raises what `R1GRPOMixin` documents."""
    import trl

    if not isinstance(trainer, trl.GRPOTrainer):
        raise TypeError(f"{type(trainer).__name__} is not a trl.GRPOTrainer, whose loss R1GRPOMixin computes; use "
                        "patch_trl() with other trainers")
    missing = [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    if f"self.{METHODS[1]}(" not in inspect.getsource(trl.GRPOTrainer._compute_loss):
        missing.append(METHODS[1])
    if missing:
        raise ImportError(f"GRPOTrainer does not use {missing[0]!r}, as in TRL {SUPPORTED}; install "
                          f"trl=={SUPPORTED}.*, or use patch_trl() alone")
    kinds = type(trainer).__mro__
    for kind in kinds[: kinds.index(trl.GRPOTrainer)]:
        if kind.__module__.startswith(__package__):
            continue
        # A _compute_loss before the mixin wraps the one pass; everything else would go unseen by its gradient.
        own = [name for name in METHODS if name in vars(kind)]
        if METHODS[1] in own or (own and not hasattr(kind, "_r1_inputs")):
            raise ValueError(f"{kind.__name__} has its own {own[-1]}, and the one pass replaces that of GRPOTrainer; "
                             "use patch_trl() with it")
    _check_options(trainer)


def _check_options(trainer: Any) -> None:
    if trainer.args.torch_compile:
        raise ValueError("torch_compile is True, expected False: the one pass runs in the forward of the model; use "
                         "patch_trl() alone")
    if trainer.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {trainer.loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
    if trainer.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level is {trainer.importance_sampling_level!r}, expected 'token' or "
                         "'sequence'")
    if not math.isfinite(trainer.entropy_coef):
        raise ValueError(f"entropy_coef is {trainer.entropy_coef!r}, expected a finite number")
    try:
        objective_of(trainer)
    except (TypeError, ValueError) as error:
        option = OPTIONS.get(str(error).partition(" ")[0])
        if option is None:
            raise
        raise ValueError(f"{option} is {getattr(trainer.args, option)!r}, which the one pass refuses: {error}; use "
                         "patch_trl() alone") from error
    if trainer.loss_type == "vespo" and trainer.importance_sampling_level != "token" and trainer.beta:
        raise ValueError(f"importance_sampling_level is {trainer.importance_sampling_level!r} with loss_type 'vespo' "
                         "and beta, expected 'token'")
