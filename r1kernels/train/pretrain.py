"""Next-token training of the tiny model: what a base model is before reinforcement learning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from r1kernels.train.config import Config
from r1kernels.train.console import Console
from r1kernels.train.head import head_of, hidden_states
from r1kernels.train.interrupt import Interrupt, Interrupted
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.metrics import MetricsLog
from r1kernels.train.tiny import corpus_batch, make_model, make_tokenizer

LOG_EVERY = 50
WARMUP = 50


def pretrain(
    config: Config, base_dir: Path, console: Console, interrupt: Interrupt
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Makes the tiny model and trains it, from the last checkpoint in `base_dir` if there is one.

    Raises:
        Interrupted: after a checkpoint has been written.
    """
    settings, data = config.pretrain, config.data
    path = latest_checkpoint(base_dir)
    if path is None:
        tokenizer = make_tokenizer(settings.corpus, data.max_terms, config.seed)
        model, step, spent = make_model(config.model.tiny, tokenizer, config.seed), 0, 0.0
    else:
        checkpoint = load_checkpoint(path)
        tokenizer = load_tokenizer(checkpoint.model_dir)
        model = load_model(checkpoint.model_dir)
        step, spent = checkpoint.state["step"], checkpoint.state["seconds"]
    if step == settings.steps:
        return model, tokenizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    if path is not None:
        optimizer.load_state_dict(checkpoint.state["optimizer"])

    started = time.monotonic() - spent

    def save() -> None:
        seconds = time.monotonic() - started
        state: dict[str, Any] = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict()}
        save_checkpoint(base_dir, step, model=model, tokenizer=tokenizer, state=state, keep=1)

    model.train()
    with MetricsLog(base_dir / "metrics.jsonl", first_step=step) as log:
        try:
            while step < settings.steps:
                interrupt.check()
                for group in optimizer.param_groups:
                    warmup, decay = min(1.0, (step + 1) / WARMUP), max(0.05, 1 - step / settings.steps)
                    group["lr"] = settings.learning_rate * warmup * decay
                batch = corpus_batch(tokenizer, settings, data.max_terms, config.seed, step)
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
                    seconds = time.monotonic() - started
                    log.write({"step": step - 1, "loss": loss.item(), "seconds_total": seconds})
                    console.pretraining(step, settings.steps, loss.item())
                if step % config.checkpoint.pretrain_every == 0 or step == settings.steps:
                    save()
        except Interrupted:
            save()
            raise
    return model, tokenizer
