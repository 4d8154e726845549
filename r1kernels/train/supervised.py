"""Training on given responses, as SFT and both ways of distillation do it.

A step takes `batch_size` samples, packs them into rows and makes one update. Its samples follow from its number alone,
so between two steps the state is the model and the optimiser, and a resumed run equals one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from r1kernels.train.config import Recipe
from r1kernels.train.data import DataError
from r1kernels.train.head import head_of, hidden_states
from r1kernels.train.interrupt import Interrupted, TrainingError
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.metrics import read_metrics
from r1kernels.train.packing import Tokens, collate, encode, fitting, keeps_apart, pack
from r1kernels.train.rng import permutation
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.stage import Stage
from r1kernels.train.steplog import StepLog

# From a model, the rows of a micro-batch and the learned tokens of the whole step, to the micro-batch's share of the
# step's mean loss a token.
Loss = Callable[[PreTrainedModel, dict[str, Tensor], float], Tensor]


@dataclass(frozen=True)
class SupervisedConfig:
    """Training on responses; the numbers are the paper's for its cold start.

    Args:
        model: the stage whose model this starts from, with a new optimiser.
        samples: stages of kind reject and data sets with responses.
        batch_size: samples a step; they are packed into rows of at most `window` tokens, of which `micro_batch_size`
            at a time are in memory (all, if null), which changes no gradient. A longer sample is left out, and counted.
        learning_rate: after `warmup_steps` of linear warm-up; it falls in a cosine to `final_learning_rate`, a tenth
            if null.
    """

    name: str
    kind: str
    model: str
    samples: list[str] = field(default_factory=list)
    epochs: int = 2
    batch_size: int = 128
    window: int = 32768
    micro_batch_size: int | None = None
    learning_rate: float = 5e-5
    final_learning_rate: float | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0

    def check(self, recipe: Recipe) -> None:
        check_ranges(
            self,
            at_least_1=("epochs", "batch_size", "window", "micro_batch_size"),
            at_least_0=("warmup_steps", "final_learning_rate", "weight_decay"),
            positive=("learning_rate", "grad_clip"),
        )

    def steps(self, samples: int) -> int:
        return math.ceil(self.epochs * samples / self.batch_size)


@dataclass(frozen=True)
class Start:
    """Where a stage goes on: its own last checkpoint, or the model it starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: dict[str, Any] | None

    @classmethod
    def of(cls, stage: Stage) -> Start:
        path = latest_checkpoint(stage.directory)
        if path is not None:
            checkpoint = load_checkpoint(path)
            model = load_model(checkpoint.model_dir, device=stage.recipe.device)
            return cls(model, load_tokenizer(checkpoint.model_dir), checkpoint.state)
        model, tokenizer = stage.load_model(stage.config.model)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if tokenizer.eos_token_id not in ends:  # what training puts at the end of responses must end generation too
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
        return cls(model, tokenizer, None)


def check_window(model: PreTrainedModel, window: int, key: str = "window") -> None:
    """Refuses positions that the model does not have."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and window > most:
        raise ConfigError(f"'{key}' is {window}, expected at most {most}: the model has no more positions")


def responses(stage: Stage, start: Start) -> tuple[list[Tokens], dict[str, int]]:
    """The samples that the stage's `samples` name, as tokens, and how many there are and were too long.

    Raises:
        ConfigError: the model's positions end within the window.
        DataError: there is no sample, or none fits.
    """
    config = stage.config
    check_window(start.model, config.window)
    found = stage.samples(config.samples, stage.template(start.tokenizer))
    if not found:
        raise DataError(f"'samples' {', '.join(config.samples)} hold no sample, expected at least one")
    encoded = encode(start.tokenizer, [(sample.prompt, sample.completion) for sample in found])
    kept = fitting(encoded, config.window)
    too_long = len(encoded) - len(kept)
    if too_long:
        stage.console.say(
            f"{too_long} of {len(encoded)} samples are longer than the window of {config.window} tokens: left out",
            warning=True,
        )
    return kept, {"samples": len(kept), "too_long": too_long}


def check_samples(samples: list[str]) -> None:
    if not samples:
        raise ConfigError("'samples' is empty, expected stages of kind reject or data sets with responses")


def train_on_samples(stage: Stage, start: Start, loss: Loss, *others: PreTrainedModel) -> dict[str, Any]:
    """Trains on the samples that the stage names; returns a summary. `others` as in `by_tokens`."""
    config = stage.config
    samples, counts = responses(stage, start)

    def draw(step: int) -> tuple[list[Tokens], dict[str, float]]:
        return [samples[index] for index in chosen(len(samples), config, stage.seed, step)], {}

    return counts | train(stage, start, config.steps(len(samples)), draw, by_tokens(stage, start, loss, *others))


def by_tokens(
    stage: Stage, start: Start, loss: Loss, *others: PreTrainedModel
) -> Callable[[Sequence[Tokens]], dict[str, float]]:
    """What `train` does with the samples of a step: `gradient` of a loss a token.

    Args:
        others: models beside the one trained that see the rows.
    """
    window = stage.config.window
    mixing = [type(model).__name__ for model in (start.model, *others) if not keeps_apart(model)]
    if mixing:
        window = 0
        stage.console.say(
            f"{stage.config.name}: {mixing[0]} lets samples in one row see each other, so each has a row of its own, "
            "with padding: slower", warning=True,
        )
    return lambda samples: gradient(start.model, samples, stage.config, loss, stage.interrupt.check, window=window)


def cross_entropy(model: PreTrainedModel, batch: dict[str, Tensor], tokens: float) -> Tensor:
    """The loss of SFT."""
    targets = batch.pop("targets")
    hidden = hidden_states(model, **batch)
    return r1kernels.linear_cross_entropy(hidden, targets=targets, normalizer=tokens, **head_of(model))


def chosen(count: int, config: SupervisedConfig, seed: int, step: int) -> list[int]:
    """Which of `count` samples step `step` takes: every epoch visits all of them in an order of its own."""
    last = min((step + 1) * config.batch_size, config.epochs * count)
    places = range(step * config.batch_size, last)
    orders = {epoch: permutation(count, seed, config.name, "samples", epoch) for epoch in {p // count for p in places}}
    return [orders[place // count][place % count] for place in places]


def learning_rate(config: SupervisedConfig, step: int, steps: int) -> float:
    """Of step `step` of `steps`: the last one has the final rate."""
    highest, lowest = config.learning_rate, config.final_learning_rate
    if lowest is None:
        lowest = highest / 10
    if step < config.warmup_steps:
        return highest * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    height = (1 + math.cos(math.pi * share)) / 2
    return height * highest + (1 - height) * lowest


def train(
    stage: Stage,
    start: Start,
    steps: int,
    draw: Callable[[int], tuple[list[Any], dict[str, float]]],
    learn: Callable[[Sequence[Any]], dict[str, float]],
) -> dict[str, Any]:
    """Trains from `start` to step `steps`, with a checkpoint at its end.

    Args:
        draw: from the number of a step to its samples, and what was measured of them.
        learn: adds the gradient of some samples, and returns what was measured: "loss", "tokens" and more.

    Returns:
        A summary of the run.

    Raises:
        Interrupted: after a checkpoint has been written.
        TrainingError: a loss or gradient is not finite.
    """
    config, model = stage.config, start.model.eval()  # dropout would draw random numbers
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    step = 0
    if start.state is not None:
        step = start.state["step"]
        optimizer.load_state_dict(start.state["optimizer"])

    def save() -> None:
        log.sync()
        save_checkpoint(
            stage.directory,
            step,
            model=model,
            tokenizer=start.tokenizer,
            state={"step": step, "optimizer": optimizer.state_dict()},
            keep=stage.recipe.checkpoint.keep,
        )

    with StepLog(stage, first_step=step) as log:
        try:
            while step < steps:
                stage.interrupt.check()
                started = time.monotonic()
                samples, measured = draw(step)
                drawn = time.monotonic()
                optimizer.zero_grad()
                measured |= learn(samples)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
                if not (math.isfinite(measured["loss"]) and math.isfinite(norm)):
                    raise TrainingError(
                        f"step {step}: loss {measured['loss']}, gradient norm {norm}, expected finite numbers"
                    )
                rate = learning_rate(config, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                now = time.monotonic()
                log.write({
                    "step": step,
                    **measured,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "seconds_sampling": drawn - started,
                    "seconds_updates": now - drawn,
                    "tokens_per_second": sum(map(len, samples)) / (now - started),
                })
                step += 1
                stage.console.training(config.name, step, steps, measured["loss"])
                if step % stage.recipe.checkpoint.supervised_every == 0 or step == steps:
                    save()
        except Interrupted:
            save()
            raise
    lines = read_metrics(stage.directory / "metrics.jsonl")
    return {
        "steps": steps,
        "loss_first": lines[0]["loss"],
        "loss": lines[-1]["loss"],
        "tokens": sum(line["tokens"] for line in lines),
    }


def gradient(
    model: PreTrainedModel,
    samples: Sequence[Tokens],
    config: SupervisedConfig,
    loss: Loss,
    check: Callable[[], None],
    *,
    window: int | None = None,
) -> dict[str, float]:
    """Adds the gradient of the mean loss a token over some samples, whatever the number of their micro-batches.

    Args:
        check: called before every micro-batch.
        window: tokens of a row, if not those of `config`; with 0 each sample has its own.

    Returns:
        loss; tokens, the learned ones; packed, the share of the rows' places that hold samples.
    """
    room = config.window if window is None else window
    rows = [[samples[index] for index in row] for row in pack([len(sample) for sample in samples], room)]
    size = config.micro_batch_size or len(rows)
    tokens = sum(sample.learned for sample in samples)
    total, places = 0.0, 0
    for start in range(0, len(rows), size):
        check()
        batch = {name: value.to(model.device) for name, value in collate(rows[start : start + size]).items()}
        share = loss(model, batch, float(tokens))
        share.backward()
        total += share.item()
        places += batch["input_ids"].numel()
    return {"loss": total, "tokens": tokens, "packed": sum(map(len, samples)) / places}
