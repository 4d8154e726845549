"""Sampling completions: what a sampler is, and the one that runs the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.train.schema import ConfigError

# Rows, their texts without special tokens, and their lengths in tokens.
OnBatch = Callable[[list[int], list[str], list[int]], None]

# Rows that have ended leave the batch once they are this share of it: copying the cache costs less than a token.
_LEAVING = 0.25


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `batch_size` rows at a time, or all at once."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    batch_size: int | None = None


@dataclass(frozen=True)
class Completions:
    """Sampled completions of B prompts, by row.

    Args:
        prompt_ids: (B, P), padded on the left.
        prompt_mask: (B, P) bool.
        token_ids: (B, T), padded on the right.
        mask: (B, T) bool, true up to and with the end-of-text token.
        logprobs: (B, T), of each token under the distribution it was sampled from, before top-p; 0 behind the mask.
        texts: B strings, without special tokens.
        finished: (B,) bool, false where `max_new_tokens` cut a completion off.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    token_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    texts: list[str]
    finished: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)


class Sampler(Protocol):
    """Where completions come from. Random numbers are those of torch's global generator."""

    def sample(self, prompts: Sequence[str], sampling: Sampling, on_batch: OnBatch | None = None) -> Completions:
        """One completion of each prompt.

        Args:
            on_batch: called from this thread as soon as some rows are complete, each row once, so that they can be
                scored elsewhere while others are still being sampled.
        """
        ...

    def update(self, model: PreTrainedModel) -> None:
        """From now on, samples come from these weights."""
        ...

    def close(self) -> None: ...


class TransformersSampler:
    """Rollouts by the model that is being trained, with the key-value cache of transformers.

    Args:
        check: called before every token; what it raises ends the rollout.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, check: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.tokenizer, self.check = model, tokenizer, check
        self._stops = torch.tensor(end_tokens(model, tokenizer), device=model.device)
        # Of a prompt's logits, the last row alone is used, and all others would be most of the memory.
        takes_less = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": True, **({"logits_to_keep": 1} if takes_less else {})}

    def sample(self, prompts: Sequence[str], sampling: Sampling, on_batch: OnBatch | None = None) -> Completions:
        """One completion of each prompt; a row's random numbers depend on its place alone."""
        prompt_ids, prompt_mask = encode(self.tokenizer, prompts, self.model.device)
        shape = (len(prompts), sampling.max_new_tokens)
        token_ids = prompt_ids.new_full(shape, self.tokenizer.pad_token_id)
        logprobs = torch.zeros(shape, device=token_ids.device)
        lengths = torch.zeros_like(token_ids[:, 0])
        texts = [""] * len(prompts)

        def finish(rows: Tensor) -> None:
            ids = [token_ids[row, : lengths[row]].tolist() for row in rows]
            decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for row, text in zip(rows.tolist(), decoded, strict=True):
                texts[row] = text
            if on_batch is not None:
                on_batch(rows.tolist(), decoded, [len(row) for row in ids])

        for rows in torch.arange(len(prompts), device=token_ids.device).split(sampling.batch_size or len(prompts)):
            self._generate(prompt_ids[rows], prompt_mask[rows], rows, (token_ids, logprobs, lengths), sampling, finish)
        if not logprobs.isfinite().all():
            raise FloatingPointError(f"{type(self.model).__name__} gives log-probs that are not finite")
        return completions(prompt_ids, prompt_mask, token_ids, logprobs, lengths, texts, self._stops)

    def update(self, model: PreTrainedModel) -> None:
        """The model is the one given, or another of its kind."""
        self.model = model

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        rows: Tensor,
        into: tuple[Tensor, Tensor, Tensor],
        sampling: Sampling,
        finish: Callable[[Tensor], None],
    ) -> None:
        """Writes the tokens, log-probs and lengths of one batch, whose places in them are `rows`.

        `generate` of transformers would compute a row that has ended until the last one has: where lengths differ,
        most of its work.
        """
        token_ids, logprobs, lengths = into
        inputs, mask = prompt_ids, F.pad(prompt_mask, (0, sampling.max_new_tokens), value=1)
        positions, cache = (prompt_mask.cumsum(-1) - 1).clamp(min=0), None
        size, place = len(rows), torch.arange(len(rows), device=rows.device)
        going = torch.ones_like(rows, dtype=torch.bool)
        for step in range(sampling.max_new_tokens):
            self.check()
            output = self.model(
                input_ids=inputs,
                attention_mask=mask[:, : prompt_ids.shape[1] + step],
                position_ids=positions,
                past_key_values=cache,
                **self._options,
            )
            cache = _cache_of(output, self.model)
            scores = (output.logits[:, -1].float() / sampling.temperature).log_softmax(-1)
            uniform = torch.rand(size, dtype=torch.float64, device=rows.device)[place]
            tokens = draw(scores, uniform, sampling.top_p)
            token_ids[rows[going], step] = tokens[going]
            logprobs[rows[going], step] = scores.gather(-1, tokens[:, None])[going, 0]
            lengths[rows[going]] += 1
            going &= torch.isin(tokens, self._stops, invert=True)
            inputs, positions = tokens[:, None], positions[:, -1:] + 1
            left = int(going.sum())
            if left == 0:
                break
            if left <= (1 - _LEAVING) * len(rows):
                finish(rows[~going])
                stay = going.nonzero()[:, 0]
                cache.reorder_cache(stay)
                rows, place, mask, inputs, positions, going = (
                    part[stay] for part in (rows, place, mask, inputs, positions, going)
                )
        finish(rows)


def draw(logprobs: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Tokens (B,) of log-probs (B, V): the inverse of the cumulative distribution at uniform (B,), in [0, 1).

    Among the likeliest tokens alone whose probabilities first reach `top_p` together, where that is below 1.
    """
    probs, order = logprobs.double().exp(), None
    if top_p < 1:
        probs, order = probs.sort(descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    mass = cumulative[:, -1:]
    if order is not None:
        last = torch.searchsorted(cumulative, top_p * mass).clamp(max=probs.shape[-1] - 1)
        mass = cumulative.gather(-1, last)
    found = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True)
    found = found.clamp(max=probs.shape[-1] - 1)  # NaN compares with nothing
    return (found if order is None else order.gather(-1, found))[:, 0]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion."""
    ids = model.generation_config.eos_token_id
    return [tokenizer.eos_token_id] if ids is None else ids if isinstance(ids, list) else [ids]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, P), padded on the left."""
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(device)
    return encoded["input_ids"], encoded["attention_mask"]


def completions(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    lengths: Tensor,
    texts: list[str],
    stops: Tensor,
) -> Completions:
    """What a sampler returns, without the columns that no row fills."""
    width = max(1, int(lengths.max()))
    token_ids, logprobs = token_ids[:, :width].clone(), logprobs[:, :width].clone()
    last = token_ids.gather(-1, (lengths[:, None] - 1).clamp(min=0))[:, 0]
    return Completions(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask.bool(),
        token_ids=token_ids,
        mask=torch.arange(width, device=lengths.device) < lengths[:, None],
        logprobs=logprobs,
        texts=texts,
        finished=torch.isin(last, stops) & (lengths > 0),
    )


def _cache_of(output: object, model: PreTrainedModel) -> Cache:
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ConfigError(f"{type(model).__name__} keeps no key-value cache, expected one: sampling needs it")
    return cache
