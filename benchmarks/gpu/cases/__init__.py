"""One file per operation: `cases(setting)` yields its cases, inputs made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from gpu.cases import (
    cross_entropy,
    distillation_loss,
    grpo_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_statistics,
    policy_loss,
    step_tiles,
    token_stats,
)
from gpu.setting import Case, Setting

GROUPS = {
    "logits": (token_stats, policy_loss),
    "step": (grpo_loss,),
    "linear": (linear_statistics, linear_grpo_loss),
    "step-tiles": (step_tiles,),
    "rest": (distillation_loss, cross_entropy, linear_cross_entropy, linear_distillation_loss),
}


def of_group(group: str, setting: Setting) -> Iterator[Case]:
    for module in GROUPS[group]:
        yield from module.cases(setting)
