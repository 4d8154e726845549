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

from r1kernels.train.loading import load_tokenizer
from r1kernels.train.prompt import render
from r1kernels.train.rewards.tags import THINK, after_thinking
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


def judged_part(target: Target, completion: str, *, open_think: bool = False) -> str:
    """The text that a reward model sees of a completion.

    Args:
        target: "summary", what follows the thought (empty when that never ends), or "response", all of it.
        completion: what a model wrote.
        open_think: its prompt had opened the thought.
    """
    whole = f"{THINK}{completion}" if open_think else completion
    return whole if target == "response" else (after_thinking("", whole) or "")


def new_reward_model(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, target: Target, *, device: str = "cpu"
) -> PreTrainedModel:
    """The body of the causal LM in a directory, under a head of zeros: before training, no text beats another."""
    model = _load(path, num_labels=1)
    with torch.no_grad():
        head_of_scores(model).weight.zero_()
    model.config.pad_token_id = tokenizer.pad_token_id
    setattr(model.config, TARGET, target)
    return model.to(device).eval()


def head_of_scores(model: PreTrainedModel) -> torch.nn.Linear:
    head = getattr(model, "score", None)
    if type(head) is not torch.nn.Linear or head.out_features != 1:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer 'score' with one output, expected one, as causal LMs have it "
            "in transformers: this architecture cannot be a reward model here"
        )
    return head


def _load(path: str | Path, **options: int) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{str(path)!r} holds no model for sequence classification: {reason:.300}") from error


@dataclass(frozen=True)
class Encoder:
    """Turns questions and texts into rows of tokens."""

    tokenizer: PreTrainedTokenizerBase
    render: Callable[[str], str] = render

    def tokens(self, questions: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt and text. Those of a text never stand for anything but text."""
        tokenizer = self.tokenizer
        if not len(texts):
            return []
        prompts = tokenizer([self.render(question) for question in questions])["input_ids"]
        written = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        end = [] if eos == pad else [eos]
        return [
            [token for token in (*prompt, *text) if token != pad] + end
            for prompt, text in zip(prompts, written, strict=True)
        ]

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
        render: the prompt of a question, as in training.
        batch_size: rows scored at a time. A row's score may depend in its last bits on the rows beside it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        render: Callable[[str], str] = render,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        self.model = _load(path).to(device).eval().requires_grad_(False)
        head_of_scores(self.model)
        self.encoder = Encoder(load_tokenizer(path), render)
        self.batch_size = batch_size
        self.target: Target = getattr(self.model.config, TARGET, "response")

    def score(
        self,
        questions: Sequence[str],
        completions: Sequence[str],
        *,
        open_think: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """The reward of each completion; NaN where the model gives no finite number.

        Args:
            questions: one a completion.
            completions: whole responses, of which the reward model sees the part that it was trained on.
            open_think: their prompts had opened the thought.
            check: called before every batch.
        """
        if len(questions) != len(completions):
            raise ValueError(f"{len(questions)} questions and {len(completions)} completions, expected as many")
        texts = [judged_part(self.target, completion, open_think=open_think) for completion in completions]
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
