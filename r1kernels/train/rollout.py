"""Sampling: completions, the sampler that runs the model itself, and texts to tokens and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from typing_extensions import Self

import r1kernels
from r1kernels.train.errors import ConfigError, TrainingError
from r1kernels.train.model import head_of
from r1kernels.train.parallel import everywhere, share
from r1kernels.train.policy import Policy

# Finished rows leave the batch once they are this share of it: copying the cache then costs less than a token.
LEAVING_SHARE = 0.25
BLOCK = 128  # tokens whose probabilities are summed together
SEARCHED = 8 * BLOCK  # tokens in which top-p looks first; sorting the whole vocabulary takes longer than the model
Support = tuple[Tensor, Tensor]  # int32: the ids that sampling kept, token after token, and how many each token has


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `batch_size` completions at a time, or all at once. Servers ignore the seed.

    Of the distribution at this temperature, tokens below `min_p` of the highest probability are left out, then all but
    the `top_k` likeliest, then all but the likeliest that first reach `top_p` together. This is the order of vLLM.
    """
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    batch_size: int | None = None
    seed: int = 0
    top_k: int | None = None
    min_p: float = 0.0
    replay: bool = False  # the completions have the sets that were kept


@dataclass(frozen=True)
class Tokens:
    """Prompts (B, P), padded on the left, and completions (B, T), padded on the right. The masks are bool; that of the
    completions is true up to and including the end token. `supports` are the sets of the policy's log-probs, one for
    each row; None is the whole vocabulary."""
    prompt_ids: Tensor
    prompt_mask: Tensor
    token_ids: Tensor
    mask: Tensor
    supports: list[Support] | None = field(default=None, kw_only=True)

    def rows(self, index: Tensor) -> Self:
        """Some of the rows (n,), without columns that are padding in all of these rows."""
        start = int(self.prompt_mask[index].any(0).long().argmax())
        end = int(self.mask[index].sum(-1).max())

        def part(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value and [value[row] for row in index]
            columns = slice(start, None) if name.startswith("prompt_") else slice(end)
            return value[index] if value.ndim == 1 else value[index][:, columns]

        return type(self)(**{name: part(name, value) for name, value in vars(self).items()})

    @property
    def support(self) -> tuple[Tensor, Tensor] | None:
        """The sets of the N tokens of the completions as `support=` of the losses: token ids and offsets (N + 1,)."""
        if self.supports is None:
            return None
        ids, counts = map(torch.cat, zip(*self.supports, strict=True))
        return ids.to(self.mask.device), F.pad(counts.long().cumsum(-1), (1, 0)).to(self.mask.device)

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on a device."""
        return type(self)(**{name: value.to(device) if isinstance(value, Tensor) else value
                             for name, value in vars(self).items()})


@dataclass(frozen=True)
class Completions(Tokens):
    """Sampled completions of B prompts."""
    logprobs: Tensor  # (B, T), in the distribution that a token was drawn from: over what was kept; 0 behind the mask
    texts: list[str]  # without the end token
    finished: Tensor  # (B,) bool, false where `max_new_tokens` cut the completion off

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)


Row = tuple[list[int], list[float], Support | None]  # token ids, their log-probs, and what sampling kept


class Collector:
    """Unfinished completions. A sampler fills `token_ids`, `logprobs` and, for each token, `kept` (int32 ids), of this
    rank's share of the rows."""

    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    prompts: list[list[int]]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], stops: Sequence[int]) -> None:
        self.tokenizer, self.stops, self.prompts = tokenizer, stops, prompt_tokens(tokenizer, prompts)
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.kept: list[list[Tensor]] = [[] for _ in prompts]  # stays empty where nothing is recorded
        self.rows: list[int] = list(share(range(len(prompts))))

    def row(self, number: int) -> Row:
        """A row of this rank's share, for other ranks."""
        kept = self.kept[number]
        support = (torch.cat(kept), torch.tensor([*map(len, kept)], dtype=torch.int32)) if kept else None
        return self.token_ids[number], self.logprobs[number], support

    def completions(self, rows: Iterable[Row]) -> Completions:
        """The completions, from the rows of all ranks. Texts contain special tokens such as tags, but no end or padding
        tokens."""
        self.token_ids, self.logprobs, supports = map(list, zip(*rows, strict=True))
        pad, finished = self.tokenizer.pad_token_id, torch.tensor([ids[-1] in self.stops for ids in self.token_ids])
        dropped = {*self.stops, self.tokenizer.eos_token_id, pad}
        texts = [self.tokenizer.decode([token for token in ids if token not in dropped]) for ids in self.token_ids]
        tensors = *padded(self.prompts, pad, "left"), *padded(self.token_ids, pad), padded(self.logprobs, 0.0)[0]
        return Completions(*tensors, texts, finished, supports=None if None in supports else supports)


def collect(draw: Callable[[], Collector]) -> Completions:
    """The completions that all ranks drew, on every rank. All ranks must call it."""
    drawn: list[Collector] = []

    def own() -> list[Row]:
        drawn.append(draw())
        return [*map(drawn[0].row, drawn[0].rows)]

    rows = [row for part in everywhere(own) for row in part]
    return drawn[0].completions(rows)


class Sampler:
    """Draws completions: `draw` gives this rank's share, and `update` takes new weights."""

    draw: Callable[[Sequence[str], Sampling], Collector]

    def sample(self, prompts: Sequence[str], sampling: Sampling) -> Completions:
        """One completion of each prompt, on every rank."""
        return collect(partial(self.draw, prompts, sampling))

    def sleep(self) -> None: ...

    def close(self) -> None: ...


class TransformersSampler(Sampler):
    """Samples from a model in this process. `check` is called before every token; its exceptions end the rollout.

    It serves small models and tests, and is the fallback for large ones, whose engine is vLLM.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    check: Callable[[], None]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                 check: Callable[[], None] = lambda: None) -> None:
        self.model, self.tokenizer, self.check = model, tokenizer, check
        self.stops: list[int] = end_tokens(model, tokenizer)

    def draw(self, prompts: Sequence[str], sampling: Sampling) -> Collector:
        """One completion of each prompt of this rank's share. What a row draws depends on its place and the seed."""
        found = Collector(self.tokenizer, prompts, self.stops)
        seeds = torch.randint(2**62, (len(prompts),), generator=torch.Generator().manual_seed(sampling.seed))
        rows = torch.tensor(found.rows, dtype=torch.long, device=self.model.device)
        for some in rows.split(sampling.batch_size or len(prompts)) if len(rows) else ():
            self._generate(found, some, sampling, seeds.to(rows.device))
        if not all(math.isfinite(value) for row in found.rows for value in found.logprobs[row]):
            raise TrainingError(f"{type(self.model).__name__} gives log-probs that are not finite")
        return found

    @torch.no_grad()
    def update(self, policy: Policy) -> None:
        """From now on, samples come from these weights."""
        for name, weight in policy.weights(self.model.dtype):
            self.model.get_parameter(name).copy_(weight)

    @torch.no_grad()
    def _generate(self, found: Collector, rows: Tensor, sampling: Sampling, seeds: Tensor) -> None:
        """Completes some rows. Those that have ended leave the batch; `generate` of transformers would keep them."""
        count, head = len(rows), head_of(self.model)
        # A prompt is read once, however many completions it gets.
        prompts = [tuple(found.prompts[row]) for row in rows.tolist()]
        distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        copies = rows.new_tensor([distinct[prompt] for prompt in prompts])
        inputs, mask = (part.to(rows.device) for part in padded(list(distinct), self.tokenizer.pad_token_id, "left"))
        width, positions, cache = inputs.shape[1], (mask.cumsum(-1) - 1).clamp(min=0), None
        mask = F.pad(mask.long(), (0, sampling.max_new_tokens), value=1)
        active, stops = torch.ones_like(rows, dtype=torch.bool), rows.new_tensor(found.stops)
        for step in range(sampling.max_new_tokens):
            self.check()
            output = self.model.base_model(input_ids=inputs, attention_mask=mask[:, : width + step],
                                           position_ids=positions, past_key_values=cache, use_cache=True)
            hidden = output.last_hidden_state[:, -1]
            if cache is None:
                cache = growing(getattr(output, "past_key_values", None))
                if cache is None:
                    raise ConfigError(f"{type(self.model).__name__} keeps no key-value cache; sampling needs one")
                if len(distinct) < count:
                    cache.reorder_cache(copies)
                    hidden, mask, positions = hidden[copies], mask[copies], positions[copies]
            scores = r1kernels.linear_logits(hidden, temperature=sampling.temperature, **head)
            kept = kept_weights(scores, sampling)
            tokens, logprobs = draw(*kept, uniform_at(seeds[rows], step))
            tokens.clamp_(max=scores.shape[-1] - 1)  # where weights are NaN, so that the run ends with its own error
            sets = kept_ids(*kept) if sampling.replay else [None] * len(rows)
            drawn = zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), sets, strict=True)
            for row, token, logprob, ids in compress(drawn, active.tolist()):
                found.token_ids[row].append(token)
                found.logprobs[row].append(logprob)
                if ids is not None:
                    found.kept[row].append(ids)
            active &= torch.isin(tokens, stops, invert=True)
            inputs, positions = tokens[:, None], positions[:, -1:] + 1
            left = int(active.sum())
            if left == 0:
                break
            if left <= (1 - LEAVING_SHARE) * len(rows):
                stay = active.nonzero()[:, 0]
                cache.reorder_cache(stay)
                rows, mask, inputs, positions, active = (
                    part[stay] for part in (rows, mask, inputs, positions, active))


class GrowingLayer(DynamicLayer):
    """Keys and values in memory with room for more tokens. `DynamicLayer` copies all of them at every token."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        vars(self).update(vars(layer))
        self.room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        if not self.room or end > self.room[0].shape[-2]:
            old, size = (self.keys, self.values), end + max(64, end // 4)
            self.room = [part.new_empty(*part.shape[:-2], size, part.shape[-1]) for part in old]
            for room, part in zip(self.room, old, strict=True):
                room[..., :begin, :] = part
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., begin:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.room = []


def growing(cache: Any) -> Any:
    """The cache with a `GrowingLayer` for every layer that keeps all tokens."""
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer:
            cache.layers[number] = GrowingLayer(layer)
    return cache


def uniform_at(seeds: Tensor, step: int) -> Tensor:
    """Random numbers (B,) in [0, 1) that depend only on the seeds (B,) and the step (SplitMix64)."""
    bits = seeds + seeds.new_tensor(step + 1) * (0x9E3779B97F4A7C15 - 2**64)  # int64 wraps around
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53


def kept_weights(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Weights (B, W) in proportion to the probabilities of scores (B, V), where the highest is 1 and a token that is
    left out has 0, and the tokens (B, W) that they belong to; None if these are the tokens 0 to W - 1."""
    (count, size), order = scores.shape, None
    weights = scores.new_zeros(count, -(-size // BLOCK) * BLOCK)
    torch.sub(scores, scores.amax(-1, keepdim=True), out=weights[:, :size]).exp_()
    if sampling.min_p > 0:
        weights.masked_fill_(weights < sampling.min_p, 0)
    if sampling.top_k is not None or sampling.top_p < 1:
        weights, order = likeliest(weights, sampling.top_p, sampling.top_k)
    return weights, order


def likeliest(weights: Tensor, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The `top_k` largest weights (B, a multiple of `BLOCK`) in their order, 0 after those that first reach `top_p` of
    their sum, and their places."""
    whole = weights.sum(-1, keepdim=True, dtype=torch.float64)
    for most in (SEARCHED, weights.shape[-1]) if top_k is None else (-(-top_k // BLOCK) * BLOCK,):
        largest, order = weights.topk(min(most, weights.shape[-1]))
        if top_k is not None:
            largest[:, top_k:] = 0
        cumulative = largest.double().cumsum(-1)
        needed = top_p * (whole if top_k is None else cumulative[:, -1:])
        if bool((cumulative[:, -1:] >= needed).all()):
            break
    return largest.masked_fill(F.pad(cumulative[:, :-1], (1, 0)) >= needed, 0) if top_p < 1 else largest, order


def kept_ids(weights: Tensor, order: Tensor | None) -> list[Tensor]:
    """The tokens of each row, int32 on the CPU, that `kept_weights` kept."""
    rows, places = weights.nonzero(as_tuple=True)
    ids = (places if order is None else order[rows, places]).int().cpu()
    return list(ids.split(rows.bincount(minlength=len(weights)).tolist()))


def draw(weights: Tensor, order: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their log-probs, where the cumulative distribution of `kept_weights` reaches uniform (B,)."""
    count = len(weights)
    # A token is found by its block: a cumulative sum of the whole vocabulary would take longer than a layer.
    blocks = weights.view(count, -1, BLOCK)
    cumulative = blocks.sum(-1).double().cumsum(-1)
    mass = cumulative[:, -1:]
    block = first_above(cumulative, uniform[:, None] * mass)
    before = F.pad(cumulative, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(count, device=block.device), block[:, 0]].double().cumsum(-1) + before
    places = block * BLOCK + first_above(inside, uniform[:, None] * mass)
    logprobs = weights.gather(-1, places).log() - mass.log()
    return (places if order is None else order.gather(-1, places))[:, 0], logprobs.clamp(max=0).float()[:, 0]


def first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first places (B, 1) where cumulative sums (B, N) exceed a target (B, 1), which may be rounded up to all."""
    last = cumulative[:, -1:]
    target = target.minimum(last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)  # they may be NaN


def end_tokens(model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion of a model, or of one in a directory."""
    try:
        config = GenerationConfig.from_pretrained(model) if isinstance(model, str | Path) else model.generation_config
    except OSError:  # it has none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    ids = config.eos_token_id
    return [tokenizer.eos_token_id] if ids is None else ids if isinstance(ids, list) else [ids]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts, with the tokens that the tokenizer puts in front, without those that it appends."""
    longest = max(texts, key=len, default="")
    whole, inner = tokenizer(longest)["input_ids"], tokenizer(longest, add_special_tokens=False)["input_ids"]
    added = len(whole) - len(inner)
    front = next((i for i in range(added) if whole[i : i + len(inner)] == inner), added)
    return [ids[: len(ids) - (added - front)] for ids in tokenizer(list(texts))["input_ids"]] if texts else []


def padded(rows: Sequence[Sequence[float]], value: float, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor, filled up with `value` on one side, and a mask that is false there."""
    values = [torch.tensor(row, dtype=torch.tensor(value).dtype) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return pad_sequence(values, True, value, side), pad_sequence(masks, True, False, side)
