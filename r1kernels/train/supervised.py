"""Training on given texts: pretraining, supervised fine-tuning and distillation, in one loop.

The samples of a step follow from its number alone. So between two steps the state is the model and the optimizer, and a
resumed run equals an uninterrupted one bit for bit. The reward model is trained by the same loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from r1kernels.train.errors import ConfigError, DataError, Interrupted, TrainingError
from r1kernels.train.log import StepLog, read_lines
from r1kernels.train.model import head_of, hidden_states, load_model, load_tokenizer
from r1kernels.train.packing import IGNORED, Tokens, collate, encode, fill, keeps_apart, pack
from r1kernels.train.rng import permutation, torch_seeded
from r1kernels.train.rollout import Sampling, TransformersSampler, end_tokens, prompt_tokens
from r1kernels.train.stage import Stage

WARMUP = 50  # steps of pretraining

Measures = dict[str, float]
# (model, packed rows, learned tokens of the whole step) -> what these rows add to the mean loss per token of the step
Loss = Callable[[PreTrainedModel, dict[str, Tensor], float], Tensor]


class Start(NamedTuple):
    """Where a stage starts or continues: `state` is None, or that of its last checkpoint."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: dict[str, Any] | None = None


def run_pretrain(stage: Stage) -> dict[str, Any]:
    """Next-token training of a new model on generated documents."""
    settings, start = stage.settings, resumed(stage)
    architecture, corpus = settings.architecture.load(), partial(settings.corpus.load(), **settings.corpus.options)
    try:
        start = start or Start(*architecture(stage.seed, **settings.architecture.options))
        next(corpus(stage.seed, 0))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"stage '{settings.name}': 'architecture' or 'corpus' failed: {error}") from error
    stage.template(start.tokenizer)  # raises ConfigError if it is 'chat' and the tokenizer has none
    model = start.model.to(stage.recipe.device)
    check_positions(model, settings.window)

    def draw(step: int) -> tuple[list[list[Tokens]], Measures]:
        return fill(corpus(stage.seed, step), start.tokenizer, settings.batch_size, settings.window), {}

    def rate(step: int) -> float:
        warmup, decay = min(1.0, (step + 1) / WARMUP), max(0.05, 1 - step / settings.steps)
        return settings.learning_rate * warmup * decay

    learn = partial(gradient, model, cross_entropy, stage.interrupt.check, None)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    summary = train(stage, start, optimizer, settings.steps, draw, learn, rate, grad_clip=1.0)
    return summary | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def run_sft(stage: Stage) -> dict[str, Any]:
    """Next-token training on the responses of samples, never on their prompts."""
    start = resumed(stage) or start_from(stage)
    return _train_on_samples(stage, start, packed_gradient(stage, cross_entropy, start.model))


def run_distill(stage: Stage) -> dict[str, Any]:
    """Distillation into a smaller model.

    Method `samples` is the paper's: SFT on what the teacher wrote. Method `logits` is an extension: the student matches
    the teacher's distribution of every token, in given samples or in what the student itself writes (2306.13649).
    """
    settings, start = stage.settings, resumed(stage) or start_from(stage)
    if settings.method == "samples":
        return _train_on_samples(stage, start, packed_gradient(stage, cross_entropy, start.model))
    teacher, tokenizer = stage.load_model(settings.teacher)
    check_tokenizers(start.tokenizer, tokenizer)
    loss = partial(divergence_loss, settings, teacher.requires_grad_(False), len(tokenizer))
    learn = packed_gradient(stage, loss, start.model, teacher)
    return (_train_on_policy if settings.on_policy else _train_on_samples)(stage, start, learn)


def _train_on_samples(stage: Stage, start: Start, learn: Callable[[list[Tokens]], Measures]) -> dict[str, Any]:
    """Trains on the samples that the stage names."""
    settings, tokenizer = stage.settings, start.tokenizer
    found = stage.demonstrations(settings.samples, stage.template(tokenizer))
    encoded = encode(tokenizer, [(sample.prompt, sample.completion) for sample in found])
    samples = [sample for sample in encoded if len(sample) <= settings.window]
    too_long = len(encoded) - len(samples)
    if not samples:
        raise DataError(f"'samples' {', '.join(settings.samples)}: {len(encoded)} samples, none of at most "
                        f"{settings.window} tokens ('window'); expected at least one")
    if too_long:  # cut off, a sample would teach to stop in the middle
        stage.console.say(f"{settings.name}: {too_long} of {len(encoded)} samples are longer than the window of "
                          f"{settings.window} tokens and are left out", warning=True)
    summary = fit(stage, start, samples, learn)
    return {"samples": len(samples), "too_long": too_long} | summary


def _train_on_policy(stage: Stage, start: Start, learn: Callable[[list[Tokens]], Measures]) -> dict[str, Any]:
    """Trains on what the student writes in each step."""
    settings, (model, tokenizer, _) = stage.settings, start
    template = stage.template(tokenizer)
    rendered = [template.render(problem.question) for problem in stage.problems(settings.problems)]
    most = settings.window - settings.max_new_tokens
    prompts = [text for text, ids in zip(rendered, prompt_tokens(tokenizer, rendered), strict=True) if len(ids) <= most]
    if not prompts:
        raise DataError(
            f"'problems' {', '.join(settings.problems)}: {len(rendered)} questions, none of at most {most} tokens "
            f"('window' {settings.window} less 'max_new_tokens' {settings.max_new_tokens}); expected at least one")
    sampler = TransformersSampler(model, tokenizer, stage.interrupt.check)
    sampling = Sampling(settings.sampling_temperature, settings.max_new_tokens)

    def write(step: int, chosen: list[str]) -> tuple[list[Tokens], Measures]:
        with torch_seeded(stage.seed, settings.name, "rollout", step):
            written = sampler.sample(chosen, sampling)
        samples = [
            Tokens(torch.cat([prompt[asked], answer[given]]).to("cpu", torch.int32).numpy(), int(asked.sum()))
            for prompt, asked, answer, given in zip(
                written.prompt_ids, written.prompt_mask, written.token_ids, written.mask, strict=True)
        ]
        return samples, {"length": written.lengths.float().mean().item(),
                         "truncated": 1 - written.finished.float().mean().item()}

    summary = fit(stage, start, prompts, learn, write)
    return {"questions": len(prompts), "too_long": len(rendered) - len(prompts)} | summary


def cross_entropy(model: PreTrainedModel, batch: dict[str, Tensor], tokens: float) -> Tensor:
    """The loss of pretraining and SFT."""
    targets = batch.pop("targets")
    hidden = hidden_states(model, **batch)
    return r1kernels.linear_cross_entropy(hidden, targets=targets, normalizer=tokens, **head_of(model))


def divergence_loss(
    settings: Any, teacher: PreTrainedModel, vocabulary: int, model: PreTrainedModel, batch: dict[str, Tensor],
    tokens: float,
) -> Tensor:
    """The divergence of the student from the teacher. Rows of a head behind the `vocabulary` are padding."""
    mask = batch.pop("targets") != IGNORED
    with torch.no_grad():
        theirs = hidden_states(teacher, **batch)
    student, other = head_of(model), head_of(teacher)
    if len(student["weight"]) != len(other["weight"]):
        for head in (student, other):
            head["weight"] = head["weight"][:vocabulary]
            head["bias"] = None if head["bias"] is None else head["bias"][:vocabulary]
    return r1kernels.linear_distillation_loss(
        hidden_states(model, **batch), student.pop("weight"), theirs, other.pop("weight"), mask=mask,
        divergence=settings.divergence, beta=settings.beta, temperature=settings.temperature, normalizer=tokens,
        teacher_options=other, **student,
    ).loss


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuses different vocabularies: the teacher's probability of a token says nothing about another token."""
    ours, theirs = ({**one.get_vocab(), "(end of text)": one.eos_token_id} for one in (student, teacher))
    different = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if different:
        token = min(different)
        raise ConfigError(
            f"the tokenizers of 'model' and 'teacher' differ in {len(different)} tokens, such as {token!r} (id "
            f"{ours.get(token)} and {theirs.get(token)}); method 'logits' compares distributions token by token and "
            "needs equal tokenizers, method 'samples' does not")


def resumed(stage: Stage) -> Start | None:
    """The last checkpoint of the stage, if there is one."""
    path = latest_checkpoint(stage.directory)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint.model_dir, device=stage.recipe.device)
    return Start(model, load_tokenizer(checkpoint.model_dir), checkpoint.state)


def start_from(stage: Stage) -> Start:
    """The model that the settings name."""
    model, tokenizer = stage.load_model(stage.settings.model)
    ends = dict.fromkeys([tokenizer.eos_token_id, *end_tokens(model, tokenizer)])
    model.generation_config.eos_token_id = list(ends)  # the token after every response must end generation too
    return Start(model, tokenizer)


def check_positions(model: PreTrainedModel, window: int) -> None:
    """Refuses rows that are longer than the model supports."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and window > most:
        raise ConfigError(f"'window' is {window}, but the model supports at most {most} positions")


def chosen(count: int, settings: Any, seed: int, step: int) -> list[int]:
    """Which of `count` samples a step takes: every epoch visits all of them, in another order."""
    last = min((step + 1) * settings.batch_size, settings.epochs * count)
    places = range(step * settings.batch_size, last)
    return [permutation(count, seed, settings.name, "samples", place // count)[place % count] for place in places]


def cosine(settings: Any, steps: int, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to the final rate in the last step."""
    highest = settings.learning_rate
    lowest = highest / 10 if settings.final_learning_rate is None else settings.final_learning_rate
    if step < settings.warmup_steps:
        return highest * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, steps - 1 - settings.warmup_steps)
    height = (1 + math.cos(math.pi * share)) / 2
    return height * highest + (1 - height) * lowest


def fit(
    stage: Stage, start: Start, items: Sequence[Any], learn: Callable[[list[Any]], Measures],
    prepare: Callable[[int, list[Any]], tuple[list[Any], Measures]] = lambda step, items: (items, {}),
) -> dict[str, Any]:
    """Trains on some items in epochs. `prepare` turns a step's items into what `learn` takes, and measures of it."""
    settings = stage.settings
    steps = math.ceil(settings.epochs * len(items) / settings.batch_size)

    def draw(step: int) -> tuple[list[Any], Measures]:
        return prepare(step, [items[index] for index in chosen(len(items), settings, stage.seed, step)])

    optimizer = torch.optim.AdamW(start.model.parameters(), weight_decay=settings.weight_decay)
    return train(stage, start, optimizer, steps, draw, learn, partial(cosine, settings, steps), settings.grad_clip)


def train(
    stage: Stage, start: Start, optimizer: torch.optim.Optimizer, steps: int,
    draw: Callable[[int], tuple[list[Any], Measures]], learn: Callable[[list[Any]], Measures],
    rate: Callable[[int], float], grad_clip: float,
) -> dict[str, Any]:
    """Makes the updates up to `steps`, with checkpoints between them and one at the end. Returns a summary.

    Args:
        draw: gives the samples of a step, and measures of them.
        learn: adds the gradient of some samples, and measures "loss", "tokens" and more.
        rate: gives the learning rate of a step.
    """
    model, done = start.model.eval(), 0  # dropout would draw random numbers
    if start.state is not None:
        done = start.state["step"]
        optimizer.load_state_dict(start.state["optimizer"])

    def save() -> None:
        state = {"step": done, "optimizer": optimizer.state_dict()}
        keep = stage.recipe.checkpoint.keep
        save_checkpoint(stage.directory, done, model=model, tokenizer=start.tokenizer, state=state, keep=keep)

    with StepLog(stage, first_step=done) as log:
        while done < steps:
            started = time.monotonic()
            try:
                stage.interrupt.check()
                samples, measures = draw(done)
                drawn = time.monotonic()
                optimizer.zero_grad()
                measures |= learn(samples)
            except Interrupted:
                save()
                raise
            measures["learning_rate"] = rate(done)
            measures["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
            if not all(map(math.isfinite, measures.values())):
                raise TrainingError(f"step {done} measured {measures}; expected finite numbers; see 'learning_rate'")
            for group in optimizer.param_groups:
                group["lr"] = measures["learning_rate"]
            optimizer.step()
            now = time.monotonic()
            timing = {"sampling": drawn - started, "updates": now - drawn, "total": now - started,
                      "tokens_per_second": measures["tokens"] / (now - started)}
            line = {"step": done, **measures, "timing": timing}
            log.write(line)
            done += 1
            if done % math.ceil(steps / 20) == 0 or done == steps:
                stage.console.step(stage.settings.name, line, steps)
            if done % stage.recipe.checkpoint.supervised_every == 0 or done == steps:
                save()
    lines = read_lines(stage.directory / "metrics.jsonl")
    return {"steps": steps, "loss_first": lines[0]["loss"], "loss": lines[-1]["loss"],
            "tokens": sum(line["tokens"] for line in lines)}


def packed_gradient(
    stage: Stage, loss: Loss, model: PreTrainedModel, *others: PreTrainedModel
) -> Callable[[list[Tokens]], Measures]:
    """`gradient` of samples, which are packed if all models keep them apart. `others` also see the rows."""
    settings, check = stage.settings, stage.interrupt.check
    check_positions(model, settings.window)
    mixing = [type(one).__name__ for one in (model, *others) if not keeps_apart(one)]
    if mixing:
        stage.console.say(f"{settings.name}: {mixing[0]} lets samples in one row see each other, so each has its own "
                          "row with padding, which is slower", warning=True)
    window = 0 if mixing else settings.window
    return lambda samples: gradient(model, loss, check, settings.micro_batch_size, pack(samples, window))


def gradient(
    model: PreTrainedModel, loss: Loss, check: Callable[[], None], size: int | None, rows: Sequence[Sequence[Tokens]]
) -> Measures:
    """Adds the gradient of the mean loss per token, which is independent of the micro-batches of `size` rows.

    Returns:
        loss; tokens, the learned ones; packed, the share of the rows' places that hold samples.
    """
    samples = [sample for row in rows for sample in row]
    tokens = sum(sample.learned for sample in samples)
    size = size or len(rows)
    total, places = 0.0, 0
    for first in range(0, len(rows), size):
        check()
        batch = {name: value.to(model.device) for name, value in collate(rows[first : first + size]).items()}
        places += batch["input_ids"].numel()
        share = loss(model, batch, float(tokens))
        share.backward()
        total += share.item()
    return {"loss": total, "tokens": tokens, "packed": sum(map(len, samples)) / places}
