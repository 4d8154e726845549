"""Bradley-Terry reward models: the body of a language model, and a number read from the last token of a text.

    p(chosen beats rejected) = sigmoid(r(chosen) - r(rejected))

They are `transformers` models for sequence classification with one label, so plain `transformers` loads and runs
them. It finds the end of a text as its last token that is not the padding token; here texts hold none of those, end
in the end-of-text token where that is another one, and are padded on the right, where positions stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.train.loading import load_tokenizer, settle
from r1kernels.train.prompt import Template
from r1kernels.train.rewards.tags import THINK, after_thinking, prompt_opens_think
from r1kernels.train.schema import ConfigError

Target = Literal["summary", "response"]
TARGET = "reward_target"  # in the saved configuration


@dataclass(frozen=True)
class PreferenceReward:
    """Adds `weight` times the score by the reward model of stage `model`, in the last `last_steps` steps, or in all.

    What is scored, the summary or the whole response, is what the reward model was trained on.
    """

    model: str
    weight: float = 1.0
    last_steps: int | None = None

    def applies(self, step: int, steps: int) -> bool:
        """Whether it counts in `step`, from 0, of a run of `steps`."""
        return self.last_steps is None or step >= steps - self.last_steps


def judged_part(target: Target, response: str) -> str:
    """The text that a reward model sees of a whole response: all of it, or its summary, what follows the thought (empty
    when that never ends)."""
    return response if target == "response" else (after_thinking("", response) or "")


def new_reward_model(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, target: Target, *, device: str = "cpu"
) -> PreTrainedModel:
    """The body of the causal LM in a directory, under a head of zeros: before training, no text beats another."""
    model = _load(path, num_labels=1)
    with torch.no_grad():
        head_of_scores(model).weight.zero_()
    model.config.pad_token_id = tokenizer.pad_token_id
    setattr(model.config, TARGET, target)
    return settle(model.to(device)).eval()


def head_of_scores(model: PreTrainedModel) -> torch.nn.Linear:
    head = getattr(model, "score", None)
    if type(head) is not torch.nn.Linear or head.out_features != 1:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer 'score' with one output, expected one, as causal LMs have it "
            "in transformers: this architecture cannot be a reward model here"
        )
    return head


def load_reward_model(path: str | Path, *, device: str = "cpu") -> PreTrainedModel:
    """The model for sequence classification in a directory, which must have one label."""
    model = _load(path)
    head_of_scores(model)
    return settle(model.to(device)).eval()


def _load(path: str | Path, **options: int) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{str(path)!r} holds no model for sequence classification: {reason:.300}") from error


class Encoder:
    """Turns questions and texts into rows of tokens.

    Args:
        template: of the recipe, `r1_zero` or `chat`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Literal["r1_zero", "chat"] = "r1_zero") -> None:
        self.tokenizer, self._template = tokenizer, Template(template, tokenizer)

    def tokens(self, questions: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt and text. Those of a text never stand for anything but text."""
        tokenizer = self.tokenizer
        if not len(texts):
            return []
        prompts = tokenizer([self._prompt(question) for question in questions])["input_ids"]
        written = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        end = [] if eos == pad else [eos]
        return [
            [token for token in (*prompt, *text) if token != pad] + end
            for prompt, text in zip(prompts, written, strict=True)
        ]

    def _prompt(self, question: str) -> str:
        """Without the thought that some chat templates open: a text has all of it, or nothing."""
        prompt = self._template.render(question)
        return prompt.rstrip().removesuffix(THINK) if prompt_opens_think(prompt) else prompt

    def batch(self, rows: Sequence[list[int]], device: torch.device | str) -> dict[str, Tensor]:
        """Inputs (B, T) of the model, padded on the right."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(width) < lengths[:, None]
        return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


class RewardModel:
    """A trained reward model, for scoring.

    Args:
        path: a directory with a model for sequence classification with one label, and its tokenizer.
        template: of the recipe, as in training.
        batch_size: rows scored at a time. A row's score may depend in its last bits on the rows beside it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        template: Literal["r1_zero", "chat"] = "r1_zero",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        self.model = load_reward_model(path, device=device).requires_grad_(False)
        self.encoder = Encoder(load_tokenizer(path), template)
        self.batch_size = batch_size
        self.target: Target = getattr(self.model.config, TARGET, "response")

    def score(
        self, questions: Sequence[str], responses: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> list[float]:
        """The reward of each response; NaN where the model gives no finite number.

        Args:
            questions: one a response.
            responses: whole ones (see `whole_response`), of which the model sees the part that it was trained on.
            check: called before every batch.
        """
        if len(questions) != len(responses):
            raise ValueError(f"{len(questions)} questions and {len(responses)} responses, expected as many")
        texts = [judged_part(self.target, response) for response in responses]
        return score_rows(self.model, self.encoder, self.encoder.tokens(questions, texts), self.batch_size, check)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[list[int]],
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> list[float]:
    """The score of each row of tokens; those of about the same length are scored together."""
    scores = [math.nan] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(order), batch_size):
        check()
        chosen = order[first : first + batch_size]
        logits = model(**encoder.batch([rows[index] for index in chosen], model.device), use_cache=False).logits
        for index, score in zip(chosen, logits[:, 0].tolist(), strict=True):
            scores[index] = score if math.isfinite(score) else math.nan
    return scores
