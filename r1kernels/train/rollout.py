"""Sampling: what a sampler is, the one that runs the model itself, and how texts become tokens and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.train.errors import ConfigError, TrainingError

# Called with rows, their texts, and their lengths in tokens.
OnBatch = Callable[[list[int], list[str], list[int]], None]
# Rows that have ended leave the batch once they are this share of it: copying the cache then costs less than a token.
LEAVING_SHARE = 0.25
AnyTokens = TypeVar("AnyTokens", bound="Tokens")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `batch_size` completions at a time, or all at once."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    batch_size: int | None = None


@dataclass(frozen=True)
class Tokens:
    """Prompts (B, P), padded on the left, and completions (B, T), padded on the right. The masks are bool; that of the
    completions is true up to and including the end token."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    token_ids: Tensor
    mask: Tensor

    def rows(self: AnyTokens, index: Tensor) -> AnyTokens:
        """Some of the rows (n,), without the columns that are padding in all of them; one column of T always stays."""
        start = int(self.prompt_mask[index].any(0).long().argmax())
        end = max(1, int(self.mask[index].sum(-1).max()))

        def part(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return [value[row] for row in index.tolist()] if value else value
            if value.ndim == 1:
                return value[index]
            return value[index][:, start:] if name.startswith("prompt_") else value[index][:, :end]

        return type(self)(**{name: part(name, value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Completions(Tokens):
    """Sampled completions of B prompts.

    Args:
        logprobs: (B, T), of each token in the distribution that it was drawn from, before top-p; 0 behind the mask.
        texts: B strings, without the end token.
        finished: (B,) bool, false where `max_new_tokens` cut the completion off.
    """

    logprobs: Tensor
    texts: list[str]
    finished: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)


class Sampler(Protocol):
    """A source of completions. Its random numbers come from torch's global generator."""

    def sample(self, prompts: Sequence[str], sampling: Sampling, on_batch: OnBatch | None = None) -> Completions:
        """One completion of each prompt. `on_batch` gets each row once, as soon as it is complete."""

    def update(self, model: PreTrainedModel) -> None:
        """From now on, samples come from these weights."""

    def close(self) -> None: ...


class TransformersSampler:
    """Samples from a model in this process. `check` is called before every token; what it raises ends the rollout."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, check: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.tokenizer, self.check = model, tokenizer, check
        self.stops = end_tokens(model, tokenizer)
        # Only the last row of a prompt's logits is used; all of them would take most of the memory.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def sample(self, prompts: Sequence[str], sampling: Sampling, on_batch: OnBatch | None = None) -> Completions:
        """One completion of each prompt; the random numbers of a row depend only on its place."""
        prompt_ids, prompt_mask = encode(self.tokenizer, prompts, self.model.device)
        shape = (len(prompts), sampling.max_new_tokens)
        token_ids = prompt_ids.new_full(shape, self.tokenizer.pad_token_id)
        logprobs = torch.zeros(shape, device=token_ids.device)
        lengths = torch.zeros_like(token_ids[:, 0])
        texts = [""] * len(prompts)

        def finish(rows: Tensor) -> None:
            ids = [token_ids[row, : lengths[row]].tolist() for row in rows]
            decoded = decode(self.tokenizer, ids, self.stops)
            for row, text in zip(rows.tolist(), decoded, strict=True):
                texts[row] = text
            if on_batch is not None:
                on_batch(rows.tolist(), decoded, [len(row) for row in ids])

        for rows in torch.arange(len(prompts), device=token_ids.device).split(sampling.batch_size or len(prompts)):
            self._generate(prompt_ids[rows], prompt_mask[rows], rows, (token_ids, logprobs, lengths), sampling, finish)
        if not logprobs.isfinite().all():
            raise TrainingError(f"{type(self.model).__name__} gives log-probs that are not finite")
        return completions(prompt_ids, prompt_mask, token_ids, logprobs, lengths, texts, self.stops)

    def update(self, model: PreTrainedModel) -> None:
        self.model = model

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _generate(
        self, prompt_ids: Tensor, prompt_mask: Tensor, rows: Tensor, into: tuple[Tensor, Tensor, Tensor],
        sampling: Sampling, finish: Callable[[Tensor], None],
    ) -> None:
        """Writes tokens, log-probs and lengths of one batch, whose places in `into` are `rows`.

        Rows that have ended leave the batch early; `generate` of transformers would compute them to the end.
        """
        token_ids, logprobs, lengths = into
        inputs, mask = prompt_ids, F.pad(prompt_mask, (0, sampling.max_new_tokens), value=1)
        positions, cache = (prompt_mask.cumsum(-1) - 1).clamp(min=0), None
        size, place, stops = len(rows), torch.arange(len(rows), device=rows.device), rows.new_tensor(self.stops)
        active = torch.ones_like(rows, dtype=torch.bool)
        for step in range(sampling.max_new_tokens):
            self.check()
            output = self.model(
                input_ids=inputs, attention_mask=mask[:, : prompt_ids.shape[1] + step], position_ids=positions,
                past_key_values=cache, use_cache=True, **self._options,
            )
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise ConfigError(f"{type(self.model).__name__} keeps no key-value cache; sampling needs one")
            scores = (output.logits[:, -1].float() / sampling.temperature).log_softmax(-1)
            uniform = torch.rand(size, dtype=torch.float64, device=rows.device)[place]
            tokens = draw(scores, uniform, sampling.top_p)
            token_ids[rows[active], step] = tokens[active]
            logprobs[rows[active], step] = scores.gather(-1, tokens[:, None])[active, 0]
            lengths[rows[active]] += 1
            active &= torch.isin(tokens, stops, invert=True)
            inputs, positions = tokens[:, None], positions[:, -1:] + 1
            left = int(active.sum())
            if left == 0:
                break
            if left <= (1 - LEAVING_SHARE) * len(rows):
                finish(rows[~active])
                stay = active.nonzero()[:, 0]
                cache.reorder_cache(stay)
                rows, place, mask, inputs, positions, active = (
                    part[stay] for part in (rows, place, mask, inputs, positions, active)
                )
        finish(rows)


def draw(logprobs: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Tokens (B,) of log-probs (B, V): the inverse of the cumulative distribution at uniform (B,), in [0, 1).

    Below 1, `top_p` leaves the likeliest tokens whose probabilities first reach it together.
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
    found = found.clamp(max=probs.shape[-1] - 1)  # where the log-probs are NaN
    return (found if order is None else order.gather(-1, found))[:, 0]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion."""
    ids = model.generation_config.eos_token_id
    return [tokenizer.eos_token_id] if ids is None else ids if isinstance(ids, list) else [ids]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts: what the tokenizer puts in front stays, what it appends (`add_eos_token`) is left out."""
    if not texts:
        return []
    longest = max(texts, key=len)
    whole, inner = tokenizer(longest)["input_ids"], tokenizer(longest, add_special_tokens=False)["input_ids"]
    added = len(whole) - len(inner)
    front = next((i for i in range(added) if whole[i : i + len(inner)] == inner), added)
    return [ids[: len(ids) - (added - front)] for ids in tokenizer(list(texts))["input_ids"]]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, P) of prompts, padded on the left, whatever the tokenizer's own padding side is."""
    rows = prompt_tokens(tokenizer, prompts)
    width = max(map(len, rows))
    ids = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], stops: Sequence[int]) -> list[str]:
    """The texts of completions, without end and padding tokens. Other special tokens, such as tags, stay."""
    dropped = {*stops, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return tokenizer.batch_decode([[token for token in row if token not in dropped] for row in rows])


def completions(
    prompt_ids: Tensor, prompt_mask: Tensor, token_ids: Tensor, logprobs: Tensor, lengths: Tensor, texts: list[str],
    stops: Sequence[int],
) -> Completions:
    """What a sampler returns, without the columns that no row fills."""
    width = max(1, int(lengths.max()))
    token_ids, logprobs = token_ids[:, :width].clone(), logprobs[:, :width].clone()
    last = token_ids.gather(-1, (lengths[:, None] - 1).clamp(min=0))[:, 0]
    return Completions(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask.bool(), token_ids=token_ids,
        mask=torch.arange(width, device=lengths.device) < lengths[:, None], logprobs=logprobs, texts=texts,
        finished=torch.isin(last, last.new_tensor(stops)) & (lengths > 0),
    )
