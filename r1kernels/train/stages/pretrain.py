"""Next-token training of a tiny model made on the spot: what a base model is before reinforcement learning."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F

import r1kernels
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from r1kernels.train.config import Recipe
from r1kernels.train.head import head_of, hidden_states
from r1kernels.train.interrupt import Interrupted
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.stage import Stage
from r1kernels.train.steplog import StepLog
from r1kernels.train.tiny import CorpusConfig, TinyConfig, corpus_batch, make_model, make_tokenizer

LOG_EVERY = 50
WARMUP = 50


@dataclass(frozen=True)
class Config:
    """Rows of `window` tokens of generated text, about sums of up to `max_terms` digits."""

    name: str
    kind: Literal["pretrain"]
    tiny: TinyConfig = field(default_factory=TinyConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    max_terms: int = 6
    steps: int = 600
    batch_size: int = 8
    window: int = 128
    learning_rate: float = 3e-3

    def check(self, recipe: Recipe) -> None:
        check_ranges(
            self,
            at_least_1=("steps", "batch_size", "window"),
            positive=("learning_rate",),
            probability=tuple(f"corpus.{item.name}" for item in dataclasses.fields(CorpusConfig)),
        )
        if min(dataclasses.astuple(self.tiny)) < 1 or self.tiny.hidden_size % (2 * self.tiny.heads):
            raise ConfigError(
                f"'tiny' is {self.tiny}, expected sizes of at least 1 and hidden_size a multiple of 2 x heads"
            )
        if recipe.template == "chat":
            raise ConfigError("'template' is 'chat', expected 'r1_zero': a model made here has no chat template")
        if self.max_terms < 2:
            raise ConfigError(f"'max_terms' is {self.max_terms}, expected at least 2")


def run(stage: Stage) -> dict[str, Any]:
    """Makes the model and trains it, from the last checkpoint if there is one."""
    settings, seed = stage.config, stage.seed
    path = latest_checkpoint(stage.directory)
    if path is None:
        tokenizer = make_tokenizer(settings.corpus, settings.max_terms, seed)
        model, step, spent = make_model(settings.tiny, tokenizer, seed), 0, 0.0
    else:
        checkpoint = load_checkpoint(path)
        tokenizer, model = load_tokenizer(checkpoint.model_dir), load_model(checkpoint.model_dir)
        step, spent = checkpoint.state["step"], checkpoint.state["seconds"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    if path is not None:
        optimizer.load_state_dict(checkpoint.state["optimizer"])
    started = time.monotonic() - spent

    def save() -> None:
        log.sync()
        state = {"step": step, "seconds": time.monotonic() - started, "optimizer": optimizer.state_dict()}
        keep = stage.recipe.checkpoint.keep
        save_checkpoint(stage.directory, step, model=model, tokenizer=tokenizer, state=state, keep=keep)

    model.train()
    logged = time.monotonic()
    with StepLog(stage, first_step=step) as log:
        try:
            while step < settings.steps:
                stage.interrupt.check()
                for group in optimizer.param_groups:
                    warmup, decay = min(1.0, (step + 1) / WARMUP), max(0.05, 1 - step / settings.steps)
                    group["lr"] = settings.learning_rate * warmup * decay
                batch = corpus_batch(tokenizer, settings, settings.max_terms, seed, step)
                # Row t scores token t + 1. The targets are shifted and not the hidden states, whose gradient a slice
                # would copy.
                targets = F.pad(batch.pop("targets")[:, 1:], (0, 1), value=-100)
                hidden = hidden_states(model, **batch)
                loss = r1kernels.linear_cross_entropy(hidden, targets=targets, **head_of(model))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                if step % LOG_EVERY == 0 or step == settings.steps:
                    now = time.monotonic()
                    log.write({
                        "step": step - 1, "loss": loss.item(), "seconds_updates": now - logged,
                        "seconds_total": now - started,
                    })
                    logged = now
                    stage.console.training(stage.config.name, step, settings.steps, loss.item())
                if step % stage.recipe.checkpoint.supervised_every == 0 or step == settings.steps:
                    save()
        except Interrupted:
            save()
            raise
    return {"steps": step, "parameters": sum(parameter.numel() for parameter in model.parameters())}
