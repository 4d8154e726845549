"""slime's log-probs and entropies of responses, from its logits: what `r1kernels.integrations.slime` computes first."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import r1kernels


def tensor_parallel_group(args: Any) -> Any:
    """Megatron's group over which the vocabulary is sharded, or None. ValueError: as in `policy_loss` of slime."""
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


def statistics(args: Any, batch: dict[str, Any], logits: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the response tokens of all samples, in a row."""
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (1, T, V)")
    logits = logits[0]
    if len(logits) < sum(batch["total_lengths"]):
        raise ValueError(f"logits have {len(logits)} rows, expected at least the sum of total_lengths = "
                         f"{sum(batch['total_lengths'])}")
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
