"""What verl's actor config says to a policy loss: bounds, caps and the mean, checked under the names of verl's keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

AGGREGATES = {
    "token-mean": "token_mean", "token-sum": "token_mean", "seq-mean-token-sum": "constant",
    "seq-mean-token-sum-norm": "constant", "seq-mean-token-mean": "sequence_mean",
}


def check_arguments(config: Any, log_prob: Tensor, **others: Tensor | None) -> None:
    """Refuses something else than verl's actor config, and a tensor whose shape is not that of log_prob."""
    if not hasattr(config, "global_batch_info") or not hasattr(config, "clip_ratio"):
        found = "None" if config is None else f"of type {type(config).__name__}"
        raise ValueError(f"config is {found}, expected verl's ActorConfig")
    for name, value in others.items():
        if value is not None and value.shape != log_prob.shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {tuple(log_prob.shape)}: that of "
                             "log_prob")


def number(name: str, value: Any, above: float | None = None, least: float | None = None) -> float:
    """`value`, which must be a finite number."""
    expected = "a finite number" + ("" if above is None else f" > {above}") + ("" if least is None else f" >= {least}")
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or (above is not None and value <= above) or (least is not None and value < least):
        way_on = "; 1e9 means no bound" if value == math.inf and name.startswith("clip") else ""
        raise ValueError(f"{name} is {value!r}, expected {expected}{way_on}")
    return value


def bounds(config: Any, negative_high: bool = False) -> dict[str, float]:
    """`clip_low` and `clip_high` of an objective. `negative_high` allows an upper bound below 1."""
    found = []
    for name in ("clip_ratio_low", "clip_ratio_high"):
        name = "clip_ratio" if getattr(config, name) is None else name
        least = -min(1.0, found[0]) if found and negative_high else 0
        found.append(number(name, getattr(config, name), least=least))
    return {"clip_low": found[0], "clip_high": found[1]}


def aggregation(
    mode: str, mask: Tensor, dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: float | None = None,
) -> tuple[dict[str, Any], Tensor | float]:
    """(fields of the objective, its normalizer) for `loss_agg_mode` and the rest of `config.global_batch_info`."""
    if mode not in AGGREGATES:
        raise ValueError(f"loss_agg_mode is {mode!r}, expected one of {', '.join(AGGREGATES)}")
    fields: dict[str, Any] = {"aggregate": AGGREGATES[mode]}
    if fields["aggregate"] == "constant":
        fields["max_length"] = 1  # the normalizer has the length
    if mode == "token-sum":
        return fields, 1 / dp_size
    of_tokens = mode == "token-mean"
    total: Any = batch_num_tokens if of_tokens else global_batch_size
    name = "batch_num_tokens" if of_tokens else "global_batch_size"
    if total is None and dp_size > 1:
        raise ValueError(f"{name} is None with dp_size {dp_size} and loss_agg_mode {mode!r}, expected a number: that "
                         "of all ranks")
    if total is None:  # without sequences that have no token
        total = (mask if of_tokens else mask.any(-1)).sum().clamp(min=1)
    elif isinstance(total, Tensor):
        total = torch.where(mask.any(), total, total.clamp(min=1))
    elif total <= 0:  # no rank has a token: the loss is 0, and the run goes on
        if mask.any():
            raise ValueError(f"{name} is {total}, expected a number > 0: response_mask has tokens")
        total = 1
    if mode == "seq-mean-token-sum-norm":
        scale = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
        total = total * number("loss_scale_factor", scale, above=0)
    return fields, total / dp_size
