"""The arithmetic of a step: log-probs and importance weights of a rollout, gradients, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

import r1kernels
from r1kernels.train.errors import TrainingError
from r1kernels.train.model import checkpointed_layers, head_of, hidden_states
from r1kernels.train.recipe import Importance
from r1kernels.train.rollout import Tokens

TOKEN_MEANS = ("kl", "entropy", "approx_kl", "clip_low_fraction", "clip_high_fraction", "active_fraction")


@dataclass(frozen=True)
class Rollout(Tokens):
    """The inputs of the updates of a step."""
    advantages: Tensor  # (B,) of samples, or (B, T) of tokens
    old_logprobs: Tensor  # (B, T), under the policy before its first update
    ref_logprobs: Tensor | None  # (B, T), under the reference, if there is one
    importance_weights: Tensor | None  # (B,) or (B, T); None for no correction


def completion_hidden_states(model: PreTrainedModel, batch: Tokens) -> Tensor:
    """(B, T, H), whose row t scores token t of the completion; the last token is not fed."""
    ids, width = torch.cat([batch.prompt_ids, batch.token_ids[:, :-1]], dim=1), batch.prompt_ids.shape[1]
    attention = torch.cat([batch.prompt_mask, batch.mask[:, :-1]], dim=1).long()
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(-1) - 1).clamp(min=0)}
    prompts, copies = torch.unique(batch.prompt_ids.where(batch.prompt_mask, -1), dim=0, return_inverse=True)
    # A checkpointed layer fills no cache.
    apart = len(prompts) == len(ids) or bool(checkpointed_layers(model))
    hidden = None if apart else _with_shared_prompts(model, inputs, width, copies)
    return hidden_states(model, **inputs)[:, width - 1 :] if hidden is None else hidden


def _with_shared_prompts(
    model: PreTrainedModel, inputs: dict[str, Tensor], width: int, copies: Tensor
) -> Tensor | None:
    """The same if row i has prompt number copies[i]. Keys and values of a prompt are computed once, and get the
    gradients of all its completions. None for a model with layers that forget or mix tokens."""
    cache = DynamicCache(config=model.base_model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    rows = torch.arange(len(copies), device=copies.device)
    first = torch.full_like(rows, len(rows)).scatter_reduce_(0, copies, rows, "amin")[: int(copies.max()) + 1]
    prompts = {name: value[first, :width] for name, value in inputs.items()}
    last = model.base_model(**prompts, past_key_values=cache, use_cache=True).last_hidden_state[copies, -1:]
    if cache.get_seq_length() != width:  # the model keeps its state elsewhere
        return None
    if inputs["input_ids"].shape[1] == width:
        return last
    cache.reorder_cache(copies)
    rest = {name: value if name == "attention_mask" else value[:, width:] for name, value in inputs.items()}
    hidden = model.base_model(**rest, past_key_values=cache, use_cache=True).last_hidden_state
    return torch.cat([last, hidden], dim=1)


@torch.no_grad()
def completion_logprobs(model: PreTrainedModel, tokens: Tokens, batches: list[Tensor], temperature: float) -> Tensor:
    """Log-probs (B, T) of completions, 0 behind the mask.

    `batches` (rows) should be those of the updates, so that the first ratio is exactly 1: the last bits of a row may
    depend on the other rows of its batch.
    """
    logprobs = torch.zeros(tokens.mask.shape, device=tokens.mask.device)
    for rows in batches:
        batch = tokens.rows(rows)
        logprobs[rows, : batch.token_ids.shape[1]] = r1kernels.linear_token_logprobs(
            completion_hidden_states(model, batch), token_ids=batch.token_ids, mask=batch.mask, temperature=temperature,
            **head_of(model))
    return logprobs


def minibatch_gradient(
    model: PreTrainedModel, rollout: Rollout, batches: Sequence[Tensor], objective: r1kernels.Objective,
    temperature: float,
) -> dict[str, float]:
    """Adds the gradient of one minibatch, which does not depend on its division into micro-batches, and measures it:
    every token, those of advantage 0 too. "ratio_deviation" is the largest |ratio - 1| of a token."""
    mask, table = rollout.mask[torch.cat(list(batches))], []
    whole = mask.sum() if objective.aggregate == "token_mean" else len(mask) * (objective.max_length or 1)
    normalizer = torch.as_tensor(whole, dtype=torch.float32, device=mask.device)
    for rows in batches:
        batch = rollout.rows(rows)
        loss, part = r1kernels.linear_grpo_loss(
            completion_hidden_states(model, batch), token_ids=batch.token_ids, advantages=batch.advantages,
            old_logprobs=batch.old_logprobs, ref_logprobs=batch.ref_logprobs if objective.kl_coef else None,
            mask=batch.mask, importance_weights=batch.importance_weights, normalizer=normalizer,
            temperature=temperature, objective=objective, measure_all=True, **head_of(model))
        loss.backward()
        names = ("loss", *part)
        table.append(torch.stack([loss.detach(), *part.values()]))
    # One transfer from the device for all metrics of all micro-batches.
    micro = [dict(zip(names, row, strict=True)) for row in torch.stack(table).tolist()]
    deviation = max(max(values["ratio_max"] - 1, 1 - values["ratio_min"]) for values in micro)
    metrics, tokens = {"ratio_deviation": deviation}, sum(values["tokens"] for values in micro)
    metrics["loss"] = sum(values["loss"] for values in micro)
    for name in [name for name in TOKEN_MEANS if name in names]:
        metrics[name] = sum(values[name] * (values["tokens"] / tokens) for values in micro)
    return metrics


def optimizer_step(
    optimizer: torch.optim.Optimizer, loss: float, rate: float, grad_clip: float, where: str
) -> dict[str, float]:
    """Clips the gradient and makes the update. Raises TrainingError if the loss or the gradient is not finite."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(f"{where}: loss {loss}, gradient norm {norm}; expected finite numbers; see 'learning_rate'")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return {"grad_norm": norm, "learning_rate": rate}


def importance_weights(
    sampled: Tensor, trained: Tensor, mask: Tensor, settings: Importance
) -> tuple[Tensor | None, dict[str, float]]:
    """Weights pi / mu that correct the gap between mu, which sampled, and the policy pi, which is trained; and metrics.

    Both round differently, or mu is some updates old. Large weights are noise: they are truncated (TIS: Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training") or their tokens are left out (MIS:
    Liu et al. 2025, "When speed kills stability").

    `sampled` and `trained` are the log-probs (B, T) by mu and pi; nothing behind the mask matters. Weights are (B, T),
    or (B,) for sequences, and exactly 1 where the log-probs are equal; None for mode `none`.
    """
    gap = (trained.double() - sampled.double()).masked_fill(~mask, 0.0)
    sequences = settings.level == "sequence"
    weights = (gap.sum(-1) if sequences else gap).exp()
    kept = (weights >= settings.floor) & (weights <= settings.cap) | (settings.mode == "none")
    if settings.mode == "truncate":
        weights = weights.clamp(settings.floor, settings.cap)
    elif settings.mode == "mask":
        weights = weights.where(kept, 0.0)
    gaps, used, kept = gap[mask], *((weights, kept) if sequences else (weights[mask], kept[mask]))
    metrics = {
        "logprob_gap_mean": gaps.abs().mean(),
        "logprob_gap_max": gaps.abs().max(),
        "rollout_kl_k1": -gaps.mean(),  # estimates of KL(mu || pi)
        "rollout_kl_k3": (gaps.expm1() - gaps).mean(),
        "importance_mean": used.mean(),
        "importance_cut": (~kept).double().mean(),
        # The effective sample size as a share.
        "importance_ess": used.sum() ** 2 / (len(used) * used.square().sum()),
    }
    weights = None if settings.mode == "none" else weights.float()
    return weights, {name: value.item() for name, value in metrics.items()}
