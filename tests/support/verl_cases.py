"""Batches, configs and gradients for the comparison of verl's policy losses with ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels import testing

# verl's name of each loss, and settings of its actor config that make all of its branches happen on `batch`.
SETTINGS: dict[str, dict[str, Any]] = {
    "vanilla": {"clip_ratio_low": 0.15, "clip_ratio_high": 0.3, "clip_ratio_c": 1.6},
    "gspo": {"clip_ratio_low": 0.03, "clip_ratio_high": 0.05},
    "cispo": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
    "sapo": {"tau_pos": 0.8, "tau_neg": 1.3},
    "dppo_tv": {"clip_ratio_low": 0.03, "clip_ratio_high": 0.02, "clip_ratio_c": 1.3},
    "dppo_kl": {"clip_ratio_low": 0.004, "clip_ratio_high": 0.003, "clip_ratio_c": 1.3},
    "gpg": {},
    "geo_mean": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3},
    "dro": {"dro_beta": 0.3},
}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
# What an engine of verl writes into `global_batch_info` of the actor config.
INFOS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "two ranks": {"dp_size": 2, "batch_num_tokens": 41, "global_batch_size": 11, "loss_scale_factor": 7},
}


def config_of(loss: str, mode: str = "token-mean", info: str = "one rank", **overrides: Any) -> Any:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    settings = {**SETTINGS.get(loss, {}), **overrides}
    beta = settings.pop("dro_beta", None)
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode,
        policy_loss=PolicyLossConfig(loss_mode=loss, dro_beta=beta), global_batch_info=dict(INFOS[info]), **settings,
    )


def batch(seed: int, rows: int = 6, steps: int = 9, weights: bool = False, of_tokens: bool = False) -> dict[str, Any]:
    """The arguments of a policy loss, without log_prob: ratios far from 1, an empty sequence, one without padding."""
    rng = testing.generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    lengths = torch.randint(1, steps + 1, (rows,), generator=rng)
    lengths[0], lengths[-1] = steps, 0
    advantages = normal(rows, steps) if of_tokens else normal(rows, 1).expand(rows, steps).clone()
    advantages[1] = 0
    return {
        "old_log_prob": -normal(rows, steps).abs() - 0.05, "advantages": advantages,
        "response_mask": torch.arange(steps) < lengths[:, None],
        "rollout_is_weights": torch.rand(rows, steps, generator=rng) * 1.5 + 0.1 if weights else None,
    }


def logprobs_near(old: Tensor, seed: int, size: float = 0.4) -> Tensor:
    moved = old + size * torch.randn(old.shape, generator=testing.generator(seed))
    return moved.clamp(max=-1e-3)


def value_and_gradient(
    function: Any, logprobs: Tensor, arguments: dict[str, Any], config: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = function(log_prob=leaf, loss_agg_mode=config.loss_agg_mode, config=config, **arguments)
    loss.backward()
    return loss.detach(), leaf.grad, metrics
