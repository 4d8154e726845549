"""Training on given texts: pretraining, supervised fine-tuning and distillation, in one loop.

The samples of a step depend only on its number. So the state between two steps is the model and the optimizer, and a
resumed run equals an uninterrupted one bit for bit. The same loop trains the reward model.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.train.checkpoint import latest_checkpoint, load_state, save_checkpoint, shards_of
from r1kernels.train.errors import ConfigError, DataError, Interrupted, naming
from r1kernels.train.log import METRICS, StepLog, read_lines
from r1kernels.train.model import head_of, hidden_states, load_tokenizer
from r1kernels.train.packing import IGNORED, Rows, Sample, collate, keeps_apart, pack, row_length
from r1kernels.train.parallel import check, first
from r1kernels.train.policy import Policy, make_optimizer
from r1kernels.train.rng import permutation
from r1kernels.train.rollout import end_tokens, prompt_tokens
from r1kernels.train.stage import Stage, Start
from r1kernels.train.update import optimizer_step

Summary = dict[str, Any]
Measures = dict[str, float]
# (model, inputs, targets, learned tokens of the whole step) -> what these rows add to the mean loss per token
Loss = Callable[[PreTrainedModel, dict[str, Tensor], Tensor, float], Tensor]


def run_pretrain(stage: Stage) -> Summary:
    """Next-token training of a new model on generated documents."""
    settings, seed = stage.settings, stage.recipe.seed
    policy, tokenizer, _ = start = start_of(stage, lambda: settings.architecture.call(seed))
    with naming("'corpus'", (TypeError, ValueError)):
        next(settings.corpus.call(seed, 0))
    stage.template(tokenizer)  # raises ConfigError if it is 'chat' and the tokenizer has none

    def learn(step: int) -> Measures:
        rows = fill(settings.corpus.call(seed, step), tokenizer, settings.batch_size, settings.window)
        return gradient(policy, cross_entropy, rows, None)

    def rate(step: int) -> float:
        warmup, decay = min(1.0, (step + 1) / 50), max(0.05, 1 - step / settings.steps)
        return settings.learning_rate * warmup * decay

    optimizer = make_optimizer(policy, stage.recipe.optimizer_state, betas=(0.9, 0.98), weight_decay=0.01)
    summary = train(stage, start, optimizer, settings.steps, learn, rate, grad_clip=1.0)
    return summary | {"parameters": sum(map(torch.numel, policy.trained().values()))}


def run_sft(stage: Stage) -> Summary:
    """Next-token training on the responses of samples, never on their prompts."""
    return fit_samples(stage, start_of(stage), cross_entropy)


def run_distill(stage: Stage) -> Summary:
    """Distillation into a smaller model. The paper's method `samples` is SFT on texts of the teacher. `logits` matches
    the teacher's distribution of every token."""
    settings, start = stage.settings, start_of(stage)
    if settings.method == "samples":
        return fit_samples(stage, start, cross_entropy)
    tokenizer, own = load_tokenizer(stage.model_path(settings.teacher)), start[1]
    ours, theirs = ({**one.get_vocab(), "(end of text)": one.eos_token_id}.items() for one in (own, tokenizer))
    if different := ours ^ theirs:
        raise ConfigError(f"the tokenizers of 'model' and 'teacher' differ, for example in {min(different)}; method "
                          "'logits' needs equal tokenizers, because it compares probabilities of tokens; use 'samples'")
    teacher = stage.frozen(settings.teacher)
    return fit_samples(stage, start, partial(divergence_loss, teacher, len(tokenizer)), teacher)


def fit_samples(stage: Stage, start: Start, loss: Loss, *others: Policy) -> Summary:
    """Trains on the samples that the settings name. `others` see the packed rows too."""
    settings, (policy, tokenizer, _) = stage.settings, start
    items = list(encode(tokenizer, stage.demonstrations(settings.samples, stage.template(tokenizer))))
    kept = [sample for sample in items if len(sample.ids) <= settings.window]
    too_long = f"{len(items) - len(kept)} of {len(items)} texts have more than {settings.window} tokens (see 'window')"
    if not kept:
        raise DataError(f"'samples' {', '.join(settings.samples)}: {too_long}; at least one must have fewer")
    if len(kept) < len(items):  # cut off, a sample would teach to stop in the middle
        stage.console.say(f"{settings.name}: {too_long} and are left out", warning=True)
    mixing = [type(one.model).__name__ for one in (policy, *others) if not one(keeps_apart)]
    if mixing:
        stage.console.say(f"{settings.name}: {mixing[0]} cannot keep samples of a row apart, so each has its own row, "
                          "which is slower", warning=True)
    window = 0 if mixing else settings.window
    return {"samples": len(kept), "too_long": len(items) - len(kept)} | fit(
        stage, start, kept, lambda samples: gradient(policy, loss, pack(samples, window), settings.micro_batch_size))


def cross_entropy(model: PreTrainedModel, inputs: dict[str, Tensor], targets: Tensor, tokens: float) -> Tensor:
    """The loss of pretraining and SFT."""
    return r1kernels.linear_cross_entropy(
        hidden_states(model, **inputs), targets=targets, normalizer=tokens, **head_of(model))


def divergence_loss(teacher: Policy, vocabulary: int, model: PreTrainedModel, inputs: dict[str, Tensor],
                    targets: Tensor, tokens: float) -> Tensor:
    """KL(teacher || student). Rows of a head after the `vocabulary` are padding."""
    with torch.no_grad():
        theirs = teacher(hidden_states, **inputs)
    student, other = head_of(model), head_of(teacher.model)  # which stays gathered
    if len(student["weight"]) != len(other["weight"]):
        if "process_group" in student:
            raise ConfigError("'parallel.tensor' is more than 1, and the heads of 'model' and 'teacher' have different "
                              "numbers of rows")
        for head in (student, other):
            head["weight"] = head["weight"][:vocabulary]
            head["bias"] = None if head["bias"] is None else head["bias"][:vocabulary]
    return r1kernels.linear_distillation_loss(
        hidden_states(model, **inputs), student.pop("weight"), theirs, other.pop("weight"), mask=targets != IGNORED,
        normalizer=tokens, teacher_options=other, **student).loss


def start_of(stage: Stage, new: Callable[[], Any] | None = None) -> Start:
    """The state in which the stage continues, or the `new` model and tokenizer, or those that its settings name."""
    policy, tokenizer, state = stage.start(new)
    ends = dict.fromkeys([tokenizer.eos_token_id, *end_tokens(policy.model, tokenizer)])
    policy.model.generation_config.eos_token_id = list(ends)  # the token after every response must end generation too
    return policy, tokenizer, state


def cosine(settings: Any, steps: int, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to the final rate in the last step."""
    highest, lowest, warmup = settings.learning_rate, settings.final_learning_rate, settings.warmup_steps
    if step < warmup:
        return highest * (step + 1) / warmup
    lowest = highest / 10 if lowest is None else lowest
    share = (step - warmup) / max(1, steps - 1 - warmup)
    height = (1 + math.cos(math.pi * share)) / 2
    return height * highest + (1 - height) * lowest


def fit(stage: Stage, start: Start, items: Sequence[Any], learn: Callable[[list[Any]], Measures]) -> Summary:
    """Trains on items in epochs with different orders. `learn(items)` adds the gradient of some of them."""
    settings, size = stage.settings, stage.settings.batch_size
    order = [index for epoch in range(settings.epochs)
             for index in permutation(len(items), stage.recipe.seed, settings.name, "samples", epoch)]
    steps = math.ceil(len(order) / size)
    optimizer = make_optimizer(start[0], stage.recipe.optimizer_state, weight_decay=settings.weight_decay)
    return train(stage, start, optimizer, steps,
                 lambda step: learn([items[index] for index in order[step * size : (step + 1) * size]]),
                 partial(cosine, settings, steps), settings.grad_clip)


def train(
    stage: Stage, start: Start, optimizer: torch.optim.Optimizer, steps: int, learn: Callable[[int], Measures],
    rate: Callable[[int], float], grad_clip: float,
) -> Summary:
    """Makes the updates up to `steps`, with checkpoints between them and one at the end.

    `learn(step)` adds the gradient and returns "loss", "tokens" and more measures; `rate(step)` is the learning rate.
    """
    (policy, tokenizer, state), settings, done = start, stage.settings, 0
    most = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if getattr(settings, "window", 0) > most:
        raise ConfigError(f"'window' is {settings.window}, but the model supports at most {most} positions")
    if state:
        done = state["step"]
        load_state(latest_checkpoint(stage.directory), policy, optimizer)

    def save() -> None:
        save_checkpoint(stage.directory, done, policy=policy, tokenizer=tokenizer, state={"step": done},
                        shards=shards_of(policy, optimizer), keep=stage.recipe.checkpoint.keep)

    with StepLog(stage, first_step=done) as log:
        while done < steps:
            started = time.monotonic()
            try:
                check(stage.interrupt)
                measures = learn(done)
            except Interrupted:
                save()
                raise
            measures |= optimizer_step(policy, optimizer, measures["loss"], rate(done), grad_clip, f"step {done}")
            seconds = time.monotonic() - started
            timing = {"updates": seconds, "total": seconds, "tokens_per_second": measures["tokens"] / seconds}
            line = {"step": done, **measures, "timing": timing}
            log.write(line)
            done += 1
            if done % math.ceil(steps / 20) == 0 or done == steps:
                stage.console.step(settings.name, line, steps)
            if done % stage.recipe.checkpoint.supervised_every == 0 or done == steps:
                save()
    lines = first(lambda: read_lines(stage.directory / METRICS))
    return {"steps": steps, "loss_first": lines[0]["loss"], "loss": lines[-1]["loss"],
            "tokens": sum(line["tokens"] for line in lines)}


def gradient(policy: Policy, loss: Loss, rows: Rows, size: int | None) -> Measures:
    """Adds the gradient of the mean loss per token, which is independent of the micro-batches of `size` rows and of
    the ranks that share the rows."""
    tokens = sum(len(ids) - first for row in rows for ids, first in row)

    def part(some: Rows) -> tuple[Tensor, Tensor]:
        value = policy(loss, *collate(some, policy.device), float(tokens))
        return value, value

    losses = policy.add_gradients(policy.share(rows, size), rows[:1], part)
    return {"loss": math.fsum(map(float, losses)), "tokens": tokens}


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[str, str]], chunk: int = 1024) -> Iterator[Sample]:
    """(prompt, completion) pairs as tokens. Each part is encoded separately, as in a rollout; then an end token."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, chunk)):
        prompts, completions = zip(*some, strict=True)
        written = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        for prompt, completion in zip(prompt_tokens(tokenizer, prompts), written, strict=True):
            ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id], dtype=torch.int32)
            yield Sample(ids, max(1, len(prompt)))


def fill(documents: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, count: int, window: int) -> Rows:
    """`count` rows of exactly `window` tokens, filled with (head, tail) documents. The last one of a row is cut off."""
    rows: Rows = [[]]
    for document in encode(tokenizer, documents, 2 * count):
        rows[-1].append(Sample(document.ids[: window - row_length(rows[-1])], 1))
        if row_length(rows[-1]) == window:
            if len(rows) == count:
                return rows
            rows.append([])
    raise DataError("the corpus ended before the rows of a step were full; it must yield documents without end")
