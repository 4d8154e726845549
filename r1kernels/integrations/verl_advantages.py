"""Advantage estimators for verl: `algorithm.adv_estimator: r1_grpo`. `verl.register` makes them known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import r1kernels

PASS_AT = (2, 4, 8, 16)


def _groups(index: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the number of the group of each answer, whether it is alone there). verl's index has a name for each prompt."""
    names: dict[Any, int] = {}  # np.unique would have to sort names, which may be of several types
    groups = torch.tensor([names.setdefault(name, len(names)) for name in np.asarray(index).reshape(-1).tolist()],
                          dtype=torch.int64)
    return groups.to(device), (groups.bincount()[groups] == 1).to(device)


def _check_finite(name: str, rewards: Tensor) -> None:
    bad = (~rewards.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"{name} of answer {bad[0]} is {rewards[bad[0]].item()}, expected finite numbers ({len(bad)} "
                         f"of {len(rewards)} answers are wrong); look at the reward function")


def _scores(token_level_rewards: Tensor, index: Any) -> tuple[Tensor, Tensor, Tensor]:
    scores = token_level_rewards.sum(-1)
    _check_finite("token_level_rewards", scores)
    if index is None:
        raise ValueError("index is None, expected the prompt of each answer: the batch has no 'uid'")
    return scores, *_groups(index, scores.device)


def _per_token(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """verl's (advantages, returns)."""
    per_token = advantages.to(torch.float32)[:, None] * response_mask
    return per_token, per_token


@torch.no_grad()
def grpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None, config: Any = None, **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl's "grpo". verl gives `norm_adv_by_std_in_grpo` to its own estimator only, so that of the config counts."""
    if norm_adv_by_std_in_grpo is None:
        norm_adv_by_std_in_grpo = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    scores, groups, alone = _scores(token_level_rewards, index)
    scale = "group_std" if norm_adv_by_std_in_grpo else "none"
    advantages = r1kernels.group_advantages(scores, group_ids=groups, scale=scale, eps=epsilon)
    # As in verl, an answer without others keeps its score, and its standard deviation is 1.
    kept = scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores
    return _per_token(torch.where(alone, kept, advantages), response_mask)


@torch.no_grad()
def rloo(token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
    """verl's "rloo"."""
    scores, groups, alone = _scores(token_level_rewards, index)
    advantages = r1kernels.group_advantages(scores, group_ids=groups, baseline="leave_one_out", scale="none")
    return _per_token(torch.where(alone, scores, advantages), response_mask)


@torch.no_grad()
def opo(token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
    """verl's "opo"."""
    scores, groups, alone = _scores(token_level_rewards, index)
    lengths = (response_mask != 0).sum(-1)
    advantages = r1kernels.group_advantages(
        scores, group_ids=groups, baseline="length_weighted", lengths=lengths, scale="none"
    )
    return _per_token(torch.where(alone, scores, advantages), response_mask)


@torch.no_grad()
def gdpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, epsilon: float = 1e-6, config: Any = None,
    non_tensor_batch: Any = None, **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl's "gdpo": each reward is normalised in its group, then the sum is normalised over the tokens of the batch.

    verl 0.9 gives the single rewards to the estimator named "gdpo" only, so `r1_gdpo` gets none in a run. Put this
    function into `core_algos.ADV_ESTIMATOR_REGISTRY["gdpo"]`.
    """
    keys = None if config is None else config.get("gdpo_reward_keys", None)
    if not keys or non_tensor_batch is None:
        raise ValueError(
            f"gdpo_reward_keys is {keys} and non_tensor_batch is {'None' if non_tensor_batch is None else 'given'}, "
            "expected both. verl 0.9 gives single rewards to the estimator 'gdpo' only: set adv_estimator to gdpo, and "
            "ADV_ESTIMATOR_REGISTRY['gdpo'] to r1kernels.integrations.verl_advantages.gdpo"
        )
    for key in keys:
        if key not in non_tensor_batch:
            raise ValueError(f"gdpo_reward_keys has {key!r}, expected one of {', '.join(non_tensor_batch)}")
    given = config.get("gdpo_reward_weights", None)
    weights = [1.0] * len(keys) if given is None else list(given)
    if len(weights) != len(keys):
        raise ValueError(f"gdpo_reward_weights has {len(weights)} numbers, expected {len(keys)}: one per key")
    total = torch.zeros_like(response_mask, dtype=torch.float32)
    for key, weight in zip(keys, weights, strict=True):
        reward = torch.as_tensor(np.asarray(non_tensor_batch[key], dtype=np.float32), device=total.device)
        _check_finite(key, reward)
        total += weight * grpo(reward[:, None], response_mask, index, epsilon, True)[0]
    mask = response_mask != 0
    counted = total[mask]
    whitened = (total - counted.mean()) * (counted.var() + 1e-8).rsqrt()
    advantages = torch.where(mask, whitened, 0)
    return advantages, advantages


@torch.no_grad()
def pass_at(
    k: int, token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, epsilon: float = 1e-6, **_: Any
) -> tuple[Tensor, Tensor]:
    """Advantages for the best of k answers (arXiv 2508.10751), which verl does not have."""
    scores, groups, _alone = _scores(token_level_rewards, index)
    advantages = r1kernels.pass_at_k_advantages(scores, k, group_ids=groups, eps=epsilon)
    return _per_token(advantages, response_mask)


ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "r1_grpo": grpo, "r1_rloo": rloo, "r1_opo": opo, "r1_gdpo": gdpo,
    **{f"r1_pass_at_{k}": partial(pass_at, k) for k in PASS_AT},
}
