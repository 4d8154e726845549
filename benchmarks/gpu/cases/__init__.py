"""One file per operation: `cases(setting)` yields its cases, inputs made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpu import ceilings
from gpu.cases import (
    cross_entropy,
    distillation_loss,
    grpo_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_policy_head,
    linear_statistics,
    policy_loss,
    step_tiles,
    token_stats,
)
from gpu.setting import Case, Setting

Cases = Callable[[Setting], Iterator[Case]]

# The groups from "kernels" to "head" are what the first minutes on a device are for: only ours and the ceilings.
LEAN = ("kernels", "step", "head")
GROUPS: dict[str, tuple[Cases, ...]] = {
    "ceilings": (ceilings.cases,),
    "kernels": (token_stats.cases,),
    "step": (step_tiles.cases,),
    "head": (linear_grpo_loss.cases, ceilings.weight_gradient_cases),
    "peers": (linear_policy_head.cases, linear_cross_entropy.cases),
    "losses": (grpo_loss.cases, policy_loss.cases),
    "logits": (token_stats.cases, cross_entropy.cases),
    "scoring": (linear_statistics.cases, linear_grpo_loss.cases),
    "rest": (distillation_loss.cases, linear_distillation_loss.cases),
}


def of_group(group: str, setting: Setting) -> Iterator[Case]:
    for cases in GROUPS[group]:
        yield from cases(setting._replace(lean=group in LEAN))
