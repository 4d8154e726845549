"""slime: its policy loss with log-probs and entropies from one read of the logits.

    --loss-type custom_loss --custom-loss-function-path r1kernels.integrations.slime.policy_loss
    --custom-megatron-init-path r1kernels.integrations.slime.install     # or this one, with --loss-type policy_loss

With the first, slime computes the log-probs of each batch before the update, in one more forward pass. With the second,
it does so only where it needs them. All other arguments of slime keep their names and meanings.

Written for commit 624b824 (2026-08-21), from slime/backends/megatron_utils/loss.py, slime/utils/ppo_utils.py and
slime/utils/arguments.py. slime is not on PyPI and needs Megatron, so the tests call this file as `loss_function` of
slime does; see docs/migrate/slime.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.integrations import hook, require_keys, require_tensor
from r1kernels.integrations.slime_logits import statistics, tensor_parallel_group

_LOSS = "slime.backends.megatron_utils.loss"
_COMMIT = "slime at commit 624b824"
_ESTIMATORS = ("grpo", "gspo", "cispo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
_replaced: list[Any] = []  # slime's own function, while `install` holds
Reducer = Callable[[Tensor], Tensor]
_KEYS = ("unconcat_tokens", "total_lengths", "response_lengths", "advantages", "loss_masks")
_ARGUMENTS = (
    "advantage_estimator", "calculate_per_token_loss", "entropy_coef", "eps_clip", "eps_clip_c", "eps_clip_high",
    "get_mismatch_metrics", "kl_loss_coef", "kl_loss_type", "opsm_delta", "rollout_temperature", "rollout_top_p",
    "tis_clip", "tis_clip_low", "use_kl_loss", "use_opsm", "use_rollout_logprobs", "use_tis", "use_unbiased_kl",
)


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's `policy_loss_function`: PPO, GSPO or CISPO, with its KL and entropy terms, TIS and OPSM.

    loss = reduce(w_t surrogate_t) - entropy_coef reduce(H_t) + kl_loss_coef reduce(kl_t), where reduce is
    `sum_of_sample_mean`, and w_t is 1, or the truncated weight of the rollout's log-probs (`--use-tis`)

    Args:
        args: slime's arguments.
        batch: of S samples, lists of one tensor for each: `unconcat_tokens` (prompt and response), `advantages`,
            `loss_masks`, `log_probs` or `rollout_log_probs`, `ref_log_probs`, of response tokens; `total_lengths` and
            `response_lengths`, lists of int.
        logits: (1, T, V), float32, of the samples one after the other; row t scores token t + 1. With tensor
            parallelism, this rank's part of the vocabulary.
        sum_of_sample_mean: a linear function of a value for each response token (sum of response_lengths,). Tokens
            behind the mask have the value 0 there, whatever the batch or the logits hold.

    Returns:
        The loss, 0-d, and slime's metrics under their names, without gradients.

    Raises:
        TypeError: args has not the names that this commit has.
        ValueError: context parallelism, or another option that this loss has not; top-p replay together with tensor
            parallelism; a custom reducer that is not linear; a tensor that is missing or has another length.
    """
    objective = _objective(args)
    group = tensor_parallel_group(args)
    require_keys("batch", batch, _KEYS, f"expected that of {_COMMIT}; use that version")
    lengths = batch["response_lengths"]
    number = (sum(lengths),)
    mask = _column(batch, "loss_masks", number) != 0

    def column(name: str) -> Tensor:
        """0 behind the mask: NaN times a weight of 0 is NaN."""
        return torch.where(mask, _column(batch, name, number), 0)

    logprobs, entropy = (torch.where(mask, x, 0) for x in statistics(args, batch, logits, group))
    advantages = column("advantages")
    rollout = column("rollout_log_probs") if batch.get("rollout_log_probs") else None
    current = column("log_probs") if batch.get("log_probs") else logprobs.detach()
    old = rollout if args.use_rollout_logprobs else current
    if old is None:
        raise ValueError("batch has no rollout_log_probs, expected them: --use-rollout-logprobs is set")
    ends = torch.tensor([0, *lengths], device=logits.device).cumsum(0)

    weights, metrics = _weights(args, batch, sum_of_sample_mean, logprobs), {}
    if args.get_mismatch_metrics or args.use_tis:
        if rollout is None:
            raise ValueError("batch has no rollout_log_probs, expected them for --use-tis or --get-mismatch-metrics")
        tis = r1kernels.importance_weights(current, rollout, mask, floor=args.tis_clip_low, cap=args.tis_clip).weights
        weights = weights * tis
        raw = (current - rollout).exp()
        metrics.update(tis=raw, tis_clipfrac=(raw.clamp(args.tis_clip_low, args.tis_clip) != raw).float(),
                       tis_abs=(raw - 1).abs())
    if args.use_opsm:
        kept = r1kernels.off_policy_filter(logprobs, old, advantages, mask, threshold=args.opsm_delta, cu_seqlens=ends)
        weights = weights * kept
    pg_loss = r1kernels.policy_loss(
        logprobs, advantages, old_logprobs=old, mask=mask, cu_seqlens=ends, importance_weights=weights, normalizer=1.0,
        objective=objective,
    ).loss
    entropy_loss = sum_of_sample_mean(entropy)
    loss = pg_loss - args.entropy_coef * entropy_loss
    reported = {"pg_loss": pg_loss, "entropy_loss": entropy_loss}
    if args.use_kl_loss:
        require_keys("batch", batch, ("ref_log_probs",), "expected it, because --use-kl-loss is set")
        reported["kl_loss"] = sum_of_sample_mean(_kl(args, logprobs, old, column("ref_log_probs")))
        loss = loss + args.kl_loss_coef * reported["kl_loss"]

    with torch.no_grad():
        gap = _gap(objective, old - logprobs, mask, lengths)
        metrics["ppo_kl"] = gap
        metrics["pg_clipfrac"] = _clipped(objective, (-gap).exp(), advantages).float()
        if args.get_mismatch_metrics or args.use_tis:
            metrics["ois"] = (-gap).exp()
        if batch.get("opd_reverse_kl"):
            metrics["opd_reverse_kl"] = column("opd_reverse_kl")
        if rollout is not None:
            compared = logprobs if args.use_rollout_logprobs else old
            metrics["train_rollout_logprob_abs_diff"] = (compared - rollout).abs()
        reported.update({name: sum_of_sample_mean(value) for name, value in metrics.items()}, loss=loss)
        if args.use_opsm:
            counts = torch.cat([part.sum().clamp(min=1).expand(len(part)) for part in mask.split(lengths)])
            reported["opsm_clipfrac"] = ((1 - kept) / counts).sum()
    return loss, {name: value.detach().clone() for name, value in reported.items()}


def install(args: Any = None) -> None:
    """slime's `policy_loss_function` is `policy_loss` of this file from now on, in this process. `uninstall` undoes it.

    ImportError: slime has no such function, or it is not installed.
    """
    found = hook(_LOSS, "policy_loss_function", f"expected {_COMMIT}; install it, or use --loss-type custom_loss")
    if found is not policy_loss:
        _replaced.append(found)
        importlib.import_module(_LOSS).policy_loss_function = policy_loss


def uninstall() -> None:
    """Undoes `install`, but not what somebody else put in its place since then."""
    module = importlib.import_module(_LOSS) if _replaced else None
    if module is not None and module.policy_loss_function is policy_loss:
        module.policy_loss_function = _replaced.pop()


def _objective(args: Any) -> r1kernels.Objective:
    for name in _ARGUMENTS:
        if not hasattr(args, name):
            raise TypeError(f"args has no {name}, expected the arguments of {_COMMIT}; use that version, or "
                            "--loss-type policy_loss")
    if args.advantage_estimator not in _ESTIMATORS:
        raise ValueError(f"advantage_estimator is {args.advantage_estimator!r}, expected one of "
                         f"{', '.join(_ESTIMATORS)}; use --loss-type policy_loss with another one")
    if getattr(args, "custom_tis_function_path", None) is not None:
        raise ValueError(f"custom_tis_function_path is {args.custom_tis_function_path!r}, expected None: this loss has "
                         "the truncated weights of --use-tis; use --loss-type policy_loss for another function")
    if args.kl_loss_type not in ("k1", "k2", "k3", "low_var_kl"):
        raise ValueError(f"kl_loss_type is {args.kl_loss_type!r}, expected k1, k2, k3 or low_var_kl")
    cispo = args.advantage_estimator == "cispo"
    cap, high = None if cispo else args.eps_clip_c, args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    if cap is not None and cap < 1 + high:
        raise ValueError(f"eps_clip_c is {cap}, expected at least 1 + eps_clip_high = {1 + high}")
    return r1kernels.Objective(
        surrogate="cispo" if cispo else "clip", ratio="sequence" if args.advantage_estimator == "gspo" else "token",
        clip_low=args.eps_clip, clip_high=high, ratio_cap=cap, aggregate="token_mean",
    )


def _column(batch: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of all response tokens, in a row."""
    column = torch.cat(batch[name])
    require_tensor(name, column, shape)
    return column


def _weights(args: Any, batch: dict[str, Any], sum_of_sample_mean: Reducer, like: Tensor) -> Tensor:
    """By what the reducer of the surrogate, a linear function, multiplies each token."""
    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    reducer = sum_of_sample_mean
    if path is not None:
        module, _, name = path.rpartition(".")
        make = hook(module, name, f"expected the function of custom_pg_loss_reducer_function_path = {path!r}")
        reducer = make(
            batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], args.calculate_per_token_loss)
    with torch.enable_grad():
        zeros = torch.zeros_like(like).requires_grad_()
        weights = torch.autograd.grad(reducer(zeros), zeros)[0]
    if path is not None:  # slime's own is linear
        probe = torch.linspace(-1, 2, len(like), dtype=like.dtype, device=like.device)
        products = weights * probe
        if (reducer(probe) - products.sum()).abs() > 1e-4 * products.abs().sum():
            raise ValueError(f"custom_pg_loss_reducer_function_path is {path!r}, expected a function that is linear in "
                             "the losses of the tokens; use --loss-type policy_loss with this one")
    return weights


def _kl(args: Any, logprobs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    clamped = args.kl_loss_type == "low_var_kl"
    kl = r1kernels.kl_estimate(logprobs, reference, "k3" if clamped else args.kl_loss_type)
    if args.use_unbiased_kl:
        kl = (logprobs - old).exp() * kl
    return kl.clamp(-10, 10) if clamped else kl


def _gap(objective: r1kernels.Objective, gap: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """log of 1 / ratio of each token; of GSPO, the mean of its sample."""
    if objective.ratio == "token":
        return gap
    parts = zip(gap.split(lengths), mask.split(lengths), strict=True)
    return torch.cat([(torch.where(m, g, 0).sum() / m.sum().clamp(min=1)).expand(len(g)) for g, m in parts])


def _clipped(objective: r1kernels.Objective, ratio: Tensor, advantages: Tensor) -> Tensor:
    high, low = ratio > 1 + objective.clip_high, ratio < 1 - objective.clip_low
    return high | low if objective.surrogate == "cispo" else (advantages > 0) & high | (advantages < 0) & low
