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

_LOSS = "slime.backends.megatron_utils.loss"
_replaced: list[Any] = []  # slime's own function, while `install` holds
Reducer = Callable[[Tensor], Tensor]
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
        sum_of_sample_mean: a linear function of a value for each response token (sum of response_lengths,).

    Returns:
        The loss, 0-d, and slime's metrics under their names, without gradients.

    Raises:
        TypeError: args has not the names that this commit has. ValueError: context parallelism, or another option
        that this loss has not; top-p replay together with tensor parallelism.
    """
    objective = _objective(args)
    group = _tensor_parallel_group(args)
    lengths = batch["response_lengths"]
    logprobs, entropy = _statistics(args, batch, logits, group)
    rollout = torch.cat(batch["rollout_log_probs"]) if batch.get("rollout_log_probs") else None
    current = torch.cat(batch["log_probs"]) if batch.get("log_probs") else logprobs.detach()
    old = rollout if args.use_rollout_logprobs else current
    if old is None:
        raise ValueError("batch has no rollout_log_probs, expected them: --use-rollout-logprobs is set")
    advantages, mask = torch.cat(batch["advantages"]), torch.cat(batch["loss_masks"]).bool()
    ends = torch.tensor([0, *lengths], device=logits.device).cumsum(0)

    weights, metrics = _weights(_reducer(args, batch) or sum_of_sample_mean, logprobs), {}
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
        reported["kl_loss"] = sum_of_sample_mean(_kl(args, logprobs, old, torch.cat(batch["ref_log_probs"])))
        loss = loss + args.kl_loss_coef * reported["kl_loss"]

    with torch.no_grad():
        gap = _gap(objective, old - logprobs, mask, lengths)
        metrics["ppo_kl"] = gap
        metrics["pg_clipfrac"] = _clipped(objective, (-gap).exp(), advantages).float()
        if args.get_mismatch_metrics or args.use_tis:
            metrics["ois"] = (-gap).exp()
        if batch.get("opd_reverse_kl"):
            metrics["opd_reverse_kl"] = torch.cat(batch["opd_reverse_kl"])
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

    ImportError: slime has no such function.
    """
    module = importlib.import_module(_LOSS)
    if not hasattr(module, "policy_loss_function"):
        raise ImportError(f"{_LOSS} has no policy_loss_function, expected slime at commit 624b824; use --loss-type "
                          "custom_loss")
    if module.policy_loss_function is not policy_loss:
        _replaced.append(module.policy_loss_function)
        module.policy_loss_function = policy_loss


def uninstall() -> None:
    """Undoes `install`."""
    if _replaced:
        importlib.import_module(_LOSS).policy_loss_function = _replaced.pop()


def _objective(args: Any) -> r1kernels.Objective:
    for name in _ARGUMENTS:
        if not hasattr(args, name):
            raise TypeError(f"args has no {name}, expected the arguments of slime at commit 624b824; use that version, "
                            "or --loss-type policy_loss")
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


def _tensor_parallel_group(args: Any) -> Any:
    mpu = importlib.import_module("megatron.core.mpu")
    if mpu.get_context_parallel_world_size() > 1:
        raise ValueError(f"context_parallel_size is {mpu.get_context_parallel_world_size()}, expected 1: the tokens of "
                         "a sample must be on one rank; use --loss-type policy_loss with context parallelism")
    if mpu.get_tensor_model_parallel_world_size() == 1:
        return None
    if args.rollout_top_p != 1.0:
        raise ValueError(f"rollout_top_p is {args.rollout_top_p} with tensor parallelism, expected 1.0 or a tensor "
                         "parallel size of 1; use --loss-type policy_loss")
    return mpu.get_tensor_model_parallel_group()


def _statistics(args: Any, batch: dict[str, Any], logits: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the response tokens of all samples, in a row."""
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (1, T, V)")
    logits = logits[0]
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows, end = [], 0
    for tokens, total, response in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        targets[end : end + total - 1] = tokens[1:total]
        end += total
        rows.append(torch.arange(end - 1 - response, end - 1, device=logits.device))
    rows = torch.cat(rows)
    options = {"temperature": float(args.rollout_temperature), "process_group": group}
    # All rows at once: a slice for each sample would fill as many gradients of all logits with zeros.
    with torch.set_grad_enabled(torch.is_grad_enabled() and (args.rollout_top_p == 1.0 or args.entropy_coef != 0)):
        logprobs, entropy = r1kernels.token_logprobs_and_entropy(logits, targets, **options)
    if args.rollout_top_p != 1.0:  # slime's entropy is that of the whole vocabulary
        logprobs = r1kernels.token_logprobs(logits, targets, support=_kept(batch, targets, rows), **options)
    return logprobs[rows], entropy[rows] if args.entropy_coef != 0 else entropy[rows].detach()


def _kept(batch: dict[str, Any], targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sets of ids of all rows: what sampling kept and the token itself; of rows of prompts, the token."""
    names = ("rollout_top_p_token_ids", "rollout_top_p_token_offsets")
    if any(batch.get(name) is None for name in names):
        raise ValueError(f"batch has no {' and '.join(names)}, expected them: --rollout-top-p is not 1")
    sets: list[list[int]] = [[token] for token in targets.tolist()]
    places = iter(rows.tolist())
    for ids, offsets, response in zip(*(batch[name] for name in names), batch["response_lengths"], strict=True):
        ids, offsets = torch.as_tensor(ids).tolist(), torch.as_tensor(offsets).tolist()
        for token in range(response):
            # A token without a record is scored over the whole vocabulary, which an empty set means.
            chosen = ids[offsets[token] : offsets[token + 1]] if token + 1 < len(offsets) else None
            place = next(places)
            sets[place] = [] if chosen is None else [*chosen, *sets[place]]
    sizes = torch.tensor([0, *map(len, sets)], device=targets.device)
    return torch.tensor([i for kept in sets for i in kept], dtype=torch.int64, device=targets.device), sizes.cumsum(0)


def _reducer(args: Any, batch: dict[str, Any]) -> Reducer | None:
    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    make = getattr(importlib.import_module(module), name)
    return make(batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], args.calculate_per_token_loss)


def _weights(reducer: Reducer, like: Tensor) -> Tensor:
    """By what the reducer, a linear function, multiplies each token."""
    with torch.enable_grad():
        zeros = torch.zeros_like(like).requires_grad_()
        return torch.autograd.grad(reducer(zeros), zeros)[0]


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
