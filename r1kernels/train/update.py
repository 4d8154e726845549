"""The arithmetic of a step: log-probs and importance weights of a rollout, gradients, the optimizer's step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

import r1kernels
from r1kernels.train.errors import TrainingError
from r1kernels.train.model import checkpointed_layers, head_of, hidden_states
from r1kernels.train.packing import IGNORED, Sample, collate, pack
from r1kernels.train.parallel import add_up
from r1kernels.train.policy import Policy, clip_gradient
from r1kernels.train.recipe import Importance
from r1kernels.train.rollout import Tokens

TOKEN_MEANS = ("kl", "entropy", "approx_kl", "clip_low_fraction", "clip_high_fraction", "active_fraction")
Batches = list[Tensor]  # rows of micro-batches; every rank has as many, so some may be empty
Route = Literal["packed", "padded", "shared"]


@dataclass(frozen=True)
class Rollout(Tokens):
    """The inputs of the updates of a step."""
    advantages: Tensor  # (B,) of samples, or (B, T) of tokens
    old_logprobs: Tensor  # (B, T), under the policy before its first update
    ref_logprobs: Tensor | None  # (B, T), under the reference, if there is one
    importance_weights: Tensor | None  # (B,) or (B, T); None for no correction


def choose_route(policy: Policy, tokens: Tokens, apart: bool) -> Route:
    """How the model reads the rows of a rollout: with as few tokens as it can. All ranks must choose alike.

    `shared` reads equal prompts once, and needs all layers' weights at once; `packed` puts several samples into a row,
    and needs a model that keeps them `apart`; `padded` always works.
    """
    prompts, lengths = tokens.prompt_mask.sum(-1), tokens.mask.sum(-1)
    sizes: dict[Route, float] = {"padded": len(lengths) * float((prompts + lengths).max())}
    if apart:
        sizes["packed"] = float((prompts + lengths).sum())
    if policy.data.size() == 1 and not checkpointed_layers(policy.model):  # a checkpointed layer fills no cache
        distinct = torch.unique(tokens.prompt_ids.where(tokens.prompt_mask, -1), dim=0)
        sizes["shared"] = float(len(distinct) * prompts.max() + len(lengths) * lengths.max())
    return min(sizes, key=sizes.__getitem__)


def completion_hidden_states(model: PreTrainedModel, batch: Tokens, route: Route = "padded") -> Tensor:
    """(N, H), whose rows score the N tokens of the completions, in their order."""
    if route == "shared" and (hidden := _with_shared_prompts(model, batch)) is not None:
        return hidden[batch.mask]
    # On the CPU, where reading a number does not wait for the device.
    columns = [part.cpu() for part in (batch.prompt_ids, batch.prompt_mask, batch.token_ids, batch.mask)]
    samples = [Sample(torch.cat([prompt[asked], answer[given]]).int(), int(asked.sum()))
               for prompt, asked, answer, given in zip(*columns, strict=True)]
    one_row = model.config._attn_implementation.startswith("flash")  # it reads lengths
    window = (sum if one_row else max)(len(sample.ids) for sample in samples)
    rows = pack(samples, window if route == "packed" else 0)
    inputs, targets = collate(rows, batch.mask.device)
    packed, places = [sample for row in rows for sample in row], (targets != IGNORED).flatten().nonzero()[:, 0]
    parts = places.split([len(sample.ids) - sample.first for sample in packed])
    found = {id(sample): part for sample, part in zip(packed, parts, strict=True)}
    return hidden_states(model, **inputs).flatten(0, 1)[torch.cat([found[id(sample)] for sample in samples])]


def _with_shared_prompts(model: PreTrainedModel, batch: Tokens) -> Tensor | None:
    """Hidden states (B, T, H), where equal prompts are read once: their keys and values get the gradients of all their
    completions. None for a model with layers that forget or mix tokens."""
    prompts, copies = torch.unique(batch.prompt_ids.where(batch.prompt_mask, -1), dim=0, return_inverse=True)
    cache, body = DynamicCache(config=model.base_model.config), model.base_model
    if len(prompts) == len(copies) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None

    def read(ids: Tensor, attention: Tensor) -> Tensor:
        positions = (attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return body(input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache,
                    use_cache=True).last_hidden_state

    last = read(prompts.clamp(min=0), (prompts >= 0).long())[copies, -1:]
    if cache.get_seq_length() != prompts.shape[1]:  # the model keeps its state elsewhere
        return None
    if batch.token_ids.shape[1] == 1:
        return last
    cache.reorder_cache(copies)
    attention = torch.cat([batch.prompt_mask, batch.mask[:, :-1]], dim=1).long()
    return torch.cat([last, read(batch.token_ids[:, :-1], attention)], dim=1)


def batch_logprobs(model: PreTrainedModel, batch: Tokens, temperature: float, route: Route) -> Tensor:
    """Log-probs (N,) of the tokens of the completions, over what sampling kept."""
    return r1kernels.linear_token_logprobs(
        completion_hidden_states(model, batch, route), token_ids=batch.token_ids[batch.mask], temperature=temperature,
        support=batch.support, **head_of(model))


@torch.no_grad()
def completion_logprobs(policy: Policy, tokens: Tokens, batches: Batches, temperature: float, route: Route) -> Tensor:
    """Log-probs (B, T) of completions, 0 behind the mask, on all ranks.

    `batches` should be those of the updates, so that the first ratio is exactly 1: the last bits of a row may depend on
    the other rows of its batch.
    """
    logprobs = torch.zeros(tokens.mask.shape)
    for rows in batches:
        batch = tokens.rows(rows if len(rows) else torch.tensor([0])).to(policy.device)
        found = policy(batch_logprobs, batch, temperature, route)
        if len(rows):
            ordered = torch.zeros(batch.mask.shape).masked_scatter(batch.mask.cpu(), found.cpu())
            logprobs[rows, : ordered.shape[1]] = ordered
    return add_up(logprobs.to(policy.device), policy.data.get_group()).cpu()


def batch_loss(
    model: PreTrainedModel, batch: Rollout, objective: r1kernels.Objective, temperature: float, normalizer: Tensor,
    route: Route,
) -> r1kernels.PolicyLoss:
    """What some samples add to the loss, and metrics of every token, those of advantage 0 too."""

    def tokens_of(value: Tensor | None) -> Tensor | None:
        return value[batch.mask] if value is not None and value.ndim == 2 else value

    return r1kernels.linear_grpo_loss(
        completion_hidden_states(model, batch, route), token_ids=batch.token_ids[batch.mask],
        advantages=tokens_of(batch.advantages), old_logprobs=tokens_of(batch.old_logprobs),
        ref_logprobs=tokens_of(batch.ref_logprobs) if objective.kl_coef else None,
        importance_weights=tokens_of(batch.importance_weights), normalizer=normalizer, temperature=temperature,
        cu_seqlens=F.pad(batch.mask.sum(-1).cumsum(-1), (1, 0)), objective=objective, measure_all=True,
        support=batch.support, **head_of(model))


def minibatch_gradient(
    policy: Policy, rollout: Rollout, rows: Tensor, batches: Batches, objective: r1kernels.Objective,
    temperature: float, route: Route,
) -> dict[str, float]:
    """Adds the gradient of one minibatch, which does not depend on its division into micro-batches and ranks, and
    measures it. "ratio_deviation" is the largest |ratio - 1| of a token.

    `rows` are those of the minibatch, `batches` are this rank's micro-batches of them.
    """
    mask, names = rollout.mask[rows], []
    whole = mask.sum() if objective.aggregate == "token_mean" else len(mask) * (objective.max_length or 1)
    normalizer = torch.as_tensor(whole, dtype=torch.float32, device=policy.device)

    def loss(some: Tensor) -> tuple[Tensor, Tensor]:
        batch = rollout.rows(some).to(policy.device)
        value, part = policy(batch_loss, batch, objective, temperature, normalizer, route)
        names[:] = "loss", *part
        return value, torch.stack([value, *part.values()])

    table = torch.stack(policy.add_gradients(batches, rows[:1], loss)).tolist()
    micro = [dict(zip(names, values, strict=True)) for values in table]
    deviation = max(max(values["ratio_max"] - 1, 1 - values["ratio_min"]) for values in micro)
    metrics, tokens = {"ratio_deviation": deviation}, sum(values["tokens"] for values in micro)
    metrics["loss"] = math.fsum(values["loss"] for values in micro)
    for name in [name for name in TOKEN_MEANS if name in names]:
        metrics[name] = math.fsum(values[name] * (values["tokens"] / tokens) for values in micro)
    return metrics


def optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, loss: float, rate: float, grad_clip: float, where: str
) -> dict[str, float]:
    """Clips the gradient, makes the update and frees the gradient. Raises TrainingError if loss or gradient are not
    finite."""
    norm = clip_gradient(policy, grad_clip)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(f"{where}: loss {loss}, gradient norm {norm}; expected finite numbers; see 'learning_rate'")
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()  # samplers can use its memory
    return {"grad_norm": norm, "learning_rate": rate}


def importance_weights(
    sampled: Tensor, trained: Tensor, mask: Tensor, settings: Importance
) -> tuple[Tensor | None, dict[str, float]]:
    """`r1kernels.importance_weights` by the settings, and its metrics; the weights are None for mode `none`.

    `sampled` and `trained` are the log-probs (B, T) by the policies that sampled and that is trained.
    """
    options = settings.model_dump()
    if settings.mode == "none":  # it measures weights as they are
        options |= {"mode": "truncate", "floor": 0.0, "cap": math.inf, "normalize": False}
    weights, metrics = r1kernels.importance_weights(trained, sampled, mask, **options)
    return None if settings.mode == "none" else weights, {name: value.item() for name, value in metrics.items()}
