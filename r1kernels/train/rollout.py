"""Sampling completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import r1kernels


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
        logprobs: (B, T), of each token under the distribution it was sampled from, before top-p.
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


class TransformersSampler:
    """Rollouts by `generate` of transformers: all rows in one batch, with a key-value cache.

    Args:
        check: called before every token; what it raises ends the rollout.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, check: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.tokenizer, self.check = model, tokenizer, check
        eos = model.generation_config.eos_token_id
        self._eos = [tokenizer.eos_token_id] if eos is None else eos if isinstance(eos, list) else [eos]
        # `generate` takes what it is not told from here; a model's own top-k or repetition penalty would make
        # rollouts off-policy.
        model.generation_config = GenerationConfig(eos_token_id=self._eos)

    def sample(self, prompts: Sequence[str], sampling: Sampling, on_batch=None) -> Completions:
        """One completion of each prompt, drawn from torch's global generator."""
        encoded = self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.model.device)
        prompt_ids, prompt_mask = encoded["input_ids"], encoded["attention_mask"]
        size = sampling.batch_size or len(prompts)
        batches = [
            self._generate(ids, mask, sampling)
            for ids, mask in zip(prompt_ids.split(size), prompt_mask.split(size), strict=True)
        ]
        width = max(ids.shape[1] for ids, _ in batches)
        token_ids, logprobs = (
            torch.cat([F.pad(part, (0, width - part.shape[1]), value=value) for part in parts])
            for parts, value in zip(zip(*batches, strict=True), (self.tokenizer.pad_token_id, 0.0), strict=True)
        )
        ended = torch.isin(token_ids, torch.tensor(self._eos, device=token_ids.device))
        mask = (ended.cumsum(-1) - ended.long()) == 0
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        on_batch and on_batch(0, texts, mask.sum(-1).tolist())
        return Completions(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask.bool(),
            token_ids=token_ids,
            mask=mask,
            logprobs=logprobs,
            texts=self.tokenizer.batch_decode(token_ids, skip_special_tokens=True),
            finished=ended.any(-1),
        )

    @torch.no_grad()
    def _generate(self, prompt_ids: Tensor, prompt_mask: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs, each (b, t)."""
        recorder = _Recorder(sampling.temperature, self.check)
        output = self.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            logits_processor=LogitsProcessorList([recorder]),
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self._eos,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
        )
        token_ids = output[:, prompt_ids.shape[1] :]
        return token_ids, recorder.finish(token_ids[:, -1])


class _Recorder(LogitsProcessor):
    """Scores each sampled token when its successor is asked for, so that only one step's logits are kept."""

    def __init__(self, temperature: float, check: Callable[[], None]) -> None:
        self.temperature, self.check = temperature, check
        self._logits: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.check()
        if self._logits is not None:
            self._score(input_ids[:, -1])
        self._logits = scores
        return scores

    def finish(self, last: Tensor) -> Tensor:
        """All log-probs (B, T), given the last column of tokens (B,)."""
        self._score(last)
        return torch.stack(self._columns, dim=1)

    def _score(self, tokens: Tensor) -> None:
        self._columns.append(r1kernels.token_logprobs(self._logits, tokens, temperature=self.temperature))


    def update(self, model): ...
class Sampler: ...
TransformersSampler.update = lambda self, model: None
TransformersSampler.close = lambda self: None
