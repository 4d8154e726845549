"""Distillation into a smaller model.

`method: samples` is the paper's: SFT on what the teacher wrote, which a stage of kind reject selected. `method: logits`
is an extension that the paper does not have: the student follows the teacher's whole distribution at every token, of
given samples, or with `on_policy` of what the student itself writes (generalised knowledge distillation, 2306.13649).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.train.config import Recipe
from r1kernels.train.data import DataError
from r1kernels.train.head import Head, head_of, hidden_states
from r1kernels.train.packing import IGNORED, Tokens
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rollout import Sampling, TransformersSampler
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.stage import Stage
from r1kernels.train.supervised import (
    Loss,
    Start,
    SupervisedConfig,
    by_tokens,
    check_samples,
    check_window,
    chosen,
    cross_entropy,
    train,
    train_on_samples,
)


@dataclass(frozen=True)
class Config(SupervisedConfig):
    """Those of `SupervisedConfig`, with the paper's numbers for distillation into 1.5B, and those of `method: logits`.

    Args:
        teacher: the stage whose model is followed; its tokenizer must be the student's.
        divergence, beta: see `r1kernels.distillation_loss`; temperature: of both distributions in it.
        on_policy: the student answers `problems`, with at most `max_new_tokens` drawn at `sampling_temperature`, and
            `samples` is not used.
    """

    kind: Literal["distill"]
    batch_size: int = 64
    learning_rate: float = 1e-4
    method: Literal["samples", "logits"] = "samples"
    teacher: str | None = None
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    on_policy: bool = False
    problems: list[str] = field(default_factory=list)
    sampling_temperature: float = 1.0
    max_new_tokens: int = 64

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        check_ranges(self, at_least_1=("max_new_tokens",), positive=("temperature", "sampling_temperature"))
        if not 0 < self.beta < 1:
            raise ConfigError(f"'beta' is {self.beta}, expected a number between 0 and 1")
        logits = self.method == "logits"
        if (self.teacher is not None) != logits:
            raise ConfigError(
                f"'teacher' is {self.teacher!r} with method '{self.method}', expected a stage with 'logits', whose "
                "distribution is followed, and none with 'samples', which a stage of kind reject draws from it"
            )
        if self.on_policy and not logits:
            raise ConfigError("'on_policy' is true with method 'samples', expected it with 'logits' alone")
        if self.on_policy:
            if not self.problems or self.samples:
                raise ConfigError(
                    f"'problems' is {self.problems} and 'samples' {self.samples}, expected problems alone with "
                    "'on_policy': the student writes the samples"
                )
        elif self.problems:
            raise ConfigError(f"'problems' is {self.problems}, expected none without 'on_policy'")
        else:
            check_samples(self.samples)


def run(stage: Stage) -> dict[str, Any]:
    start, config = Start.of(stage), stage.config
    if config.method == "samples":
        return train_on_samples(stage, start, cross_entropy)
    teacher, tokenizer = stage.load_model(config.teacher)
    check_tokenizers(start.tokenizer, tokenizer)
    loss = follow(config, teacher.requires_grad_(False), len(tokenizer))
    learn = _train_on_policy if config.on_policy else train_on_samples
    return learn(stage, start, loss, teacher)


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuses two vocabularies: a token's probability under the teacher says nothing of another token."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if different:
        token = min(different)
        raise ConfigError(
            f"the tokenizers of 'model' and 'teacher' differ, in {len(different)} tokens, such as {token!r} (id "
            f"{ours.get(token)} and {theirs.get(token)}), expected the same one: method 'logits' compares "
            "distributions token by token; 'samples' works across tokenizers"
        )
    if student.eos_token_id != teacher.eos_token_id:
        raise ConfigError(
            f"the tokenizers of 'model' and 'teacher' end texts with {student.eos_token!r} and {teacher.eos_token!r}, "
            "expected the same token"
        )


def follow(config: Config, teacher: PreTrainedModel, vocabulary: int) -> Loss:
    """The divergence of the student from the teacher, a token.

    Args:
        vocabulary: how many tokens there are. A model may have more rows in its head, which stand for none; models of
            one family differ in them.
    """

    def loss(model: PreTrainedModel, batch: dict[str, Tensor], tokens: float) -> Tensor:
        mask = batch.pop("targets") != IGNORED
        with torch.no_grad():
            theirs = hidden_states(teacher, **batch)
        student, other = head_of(model), head_of(teacher)
        if len(student["weight"]) != len(other["weight"]):
            student, other = _first_rows(student, vocabulary), _first_rows(other, vocabulary)
        return r1kernels.linear_distillation_loss(
            hidden_states(model, **batch),
            student.pop("weight"),
            theirs,
            other.pop("weight"),
            mask=mask,
            divergence=config.divergence,
            beta=config.beta,
            normalizer=tokens,
            temperature=config.temperature,
            teacher_options=other,
            **student,
        ).loss

    return loss


def _first_rows(head: Head, count: int) -> Head:
    bias = head["bias"]
    return Head(**head | {"weight": head["weight"][:count], "bias": None if bias is None else bias[:count]})


def _train_on_policy(stage: Stage, start: Start, loss: Loss, teacher: PreTrainedModel) -> dict[str, Any]:
    """Trains on what the student writes at each step."""
    config, template = stage.config, stage.template(start.tokenizer)
    check_window(start.model, config.window)
    rendered = [template.render(problem.question) for problem in stage.problems(config.problems)]
    lengths = [len(ids) for ids in start.tokenizer(rendered)["input_ids"]] if rendered else []
    most = config.window - config.max_new_tokens
    prompts = [prompt for prompt, length in zip(rendered, lengths, strict=True) if length <= most]
    if not prompts:
        raise DataError(
            f"'problems' {', '.join(config.problems)} hold {len(rendered)} questions, none of at most {most} tokens "
            f"('window' {config.window} less 'max_new_tokens' {config.max_new_tokens})"
        )
    sampler = TransformersSampler(start.model, start.tokenizer, stage.interrupt.check)
    sampling = Sampling(config.sampling_temperature, config.max_new_tokens)

    def draw(step: int) -> tuple[list[Tokens], dict[str, float]]:
        some = [prompts[index] for index in chosen(len(prompts), config, stage.seed, step)]
        with torch_seeded(stage.seed, config.name, "rollout", step):
            completions = sampler.sample(some, sampling)
        samples = []
        for row in range(len(some)):
            prompt = completions.prompt_ids[row][completions.prompt_mask[row]]
            written = completions.token_ids[row][completions.mask[row]]
            ids = torch.cat([prompt, written]).cpu().numpy().astype(np.int32)
            samples.append(Tokens(ids, len(prompt)))
        measured = {
            "length": completions.lengths.float().mean().item(),
            "truncated": 1 - completions.finished.float().mean().item(),
        }
        return samples, measured

    counts = {"questions": len(prompts), "too_long": len(rendered) - len(prompts)}
    return counts | train(stage, start, config.steps(len(prompts)), draw, by_tokens(stage, start, loss, teacher))
