"""Training on given texts: pretraining, supervised fine-tuning and distillation, in one loop.

The samples of a step depend only on its number. So the state between two steps is the model and the optimizer, and a
resumed run equals an uninterrupted one bit for bit. The same loop trains the reward model.

Samples are packed into rows, without padding between them and without attention across them: positions restart at 0 in
each sample, and for most architectures `transformers` then keeps attention inside it (see `keeps_apart`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.train.checkpoint import latest_checkpoint, save_checkpoint
from r1kernels.train.errors import ConfigError, DataError, Interrupted
from r1kernels.train.log import METRICS, StepLog, read_lines
from r1kernels.train.lora import adapter_state, mergeable
from r1kernels.train.model import head_of, hidden_states
from r1kernels.train.precision import AdamW
from r1kernels.train.rng import permutation, torch_seeded
from r1kernels.train.rollout import Sampling, TransformersSampler, end_tokens, prompt_tokens
from r1kernels.train.stage import Stage
from r1kernels.train.update import optimizer_step

IGNORED = -100  # the target of a token that is not learned
Rows = list[list["Sample"]]
Summary = dict[str, Any]
Measures = dict[str, float]
# (model, inputs, targets, learned tokens of the whole step) -> what these rows add to the mean loss per token
Loss = Callable[[PreTrainedModel, dict[str, Tensor], Tensor, float], Tensor]
# Model, tokenizer, and the state of the last checkpoint, which is empty if there is none
Start = tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]


class Sample(NamedTuple):
    """Tokens (int32). `first` is the position of the first learned token. It is at least 1: token 0 has no context."""
    ids: Tensor
    first: int


def run_pretrain(stage: Stage) -> Summary:
    """Next-token training of a new model on generated documents."""
    settings, architecture = stage.settings, stage.settings.architecture
    corpus = partial(settings.corpus.load(), **settings.corpus.options)
    try:
        start = start_of(stage, partial(architecture.load(), stage.recipe.seed, **architecture.options))
        next(corpus(stage.recipe.seed, 0))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"stage '{settings.name}': 'architecture' or 'corpus' failed: {error}") from error
    model, tokenizer, _ = start
    stage.template(tokenizer)  # raises ConfigError if it is 'chat' and the tokenizer has none

    def learn(step: int) -> Measures:
        rows = fill(corpus(stage.recipe.seed, step), tokenizer, settings.batch_size, settings.window)
        return gradient(model, cross_entropy, rows, None, stage.interrupt.check)

    def rate(step: int) -> float:
        warmup, decay = min(1.0, (step + 1) / 50), max(0.05, 1 - step / settings.steps)
        return settings.learning_rate * warmup * decay

    optimizer = AdamW(model, stage.recipe.dtype, betas=(0.9, 0.98), weight_decay=0.01)
    summary = train(stage, start, optimizer, settings.steps, learn, rate, grad_clip=1.0)
    return summary | {"parameters": model.num_parameters()}


def run_sft(stage: Stage) -> Summary:
    """Next-token training on the responses of samples, never on their prompts."""
    return fit_texts(stage, start_of(stage), cross_entropy)


def run_distill(stage: Stage) -> Summary:
    """Distillation into a smaller model. The paper's method `samples` is SFT on texts of the teacher. `logits` matches
    the teacher's distribution of every token, in given samples or in texts of the student (2306.13649)."""
    settings, start = stage.settings, start_of(stage)
    if settings.method == "samples":
        return fit_texts(stage, start, cross_entropy)
    (teacher, tokenizer), own = stage.load_model(settings.teacher), start[1]
    ours, theirs = ({**one.get_vocab(), "(end of text)": one.eos_token_id}.items() for one in (own, tokenizer))
    if different := ours ^ theirs:
        raise ConfigError(f"the tokenizers of 'model' and 'teacher' differ, for example in {min(different)}; method "
                          "'logits' needs equal tokenizers, because it compares probabilities of tokens; use 'samples'")
    loss = partial(divergence_loss, settings, teacher.requires_grad_(False), len(tokenizer))
    return fit_texts(stage, start, loss, teacher, on_policy=settings.on_policy)


def fit_texts(stage: Stage, start: Start, loss: Loss, *others: PreTrainedModel, on_policy: bool = False) -> Summary:
    """Trains on given samples, or on the model's own answers to problems. `others` see the packed rows too."""
    settings, (model, tokenizer, _), template = stage.settings, start, stage.template(start[1])
    if on_policy:
        items, key = [template.render(problem.question) for problem in stage.problems(settings.problems)], "problems"
        sizes, most = map(len, prompt_tokens(tokenizer, items)), settings.window - settings.max_new_tokens
    else:
        texts, key = stage.demonstrations(settings.samples, template), "samples"
        items = list(encode(tokenizer, texts))
        sizes, most = (len(sample.ids) for sample in items), settings.window
    kept = [item for item, size in zip(items, sizes, strict=True) if size <= most]
    too_long = f"{len(items) - len(kept)} of {len(items)} texts have more than {most} tokens (see 'window')"
    if not kept:
        raise DataError(f"'{key}' {', '.join(getattr(settings, key))}: {too_long}; at least one must have fewer")
    if len(kept) < len(items):  # cut off, a sample would teach to stop in the middle
        stage.console.say(f"{settings.name}: {too_long} and are left out", warning=True)
    mixing = [type(one).__name__ for one in (model, *others) if not keeps_apart(one)]
    if mixing:
        stage.console.say(f"{settings.name}: {mixing[0]} cannot keep samples of a row apart, so each has its own row, "
                          "which is slower", warning=True)
    sampler, window = TransformersSampler(model, tokenizer, stage.interrupt.check), 0 if mixing else settings.window

    def learn(step: int, chosen: list[Any]) -> Measures:
        samples, measures = write(stage, sampler, step, chosen) if on_policy else (chosen, {})
        rows = pack(samples, window)
        return gradient(model, loss, rows, settings.micro_batch_size, stage.interrupt.check) | measures

    return {key: len(kept), "too_long": len(items) - len(kept)} | fit(stage, start, kept, learn)


def write(stage: Stage, sampler: TransformersSampler, step: int, prompts: list[str]) -> tuple[list[Sample], Measures]:
    """The texts that the model writes in a step, and their measures."""
    settings = stage.settings
    with torch_seeded(stage.recipe.seed, settings.name, "rollout", step):
        written = sampler.sample(prompts, Sampling(settings.sampling_temperature, settings.max_new_tokens))
    rows = zip(written.prompt_ids, written.prompt_mask, written.token_ids, written.mask, strict=True)
    samples = [Sample(torch.cat([prompt[asked], answer[given]]).to("cpu", torch.int32), int(asked.sum()))
               for prompt, asked, answer, given in rows]
    return samples, {"length": written.lengths.float().mean().item(),
                     "truncated": 1 - written.finished.float().mean().item()}


def cross_entropy(model: PreTrainedModel, inputs: dict[str, Tensor], targets: Tensor, tokens: float) -> Tensor:
    """The loss of pretraining and SFT."""
    return r1kernels.linear_cross_entropy(
        hidden_states(model, **inputs), targets=targets, normalizer=tokens, **head_of(model))


def divergence_loss(settings: Any, teacher: PreTrainedModel, vocabulary: int, model: PreTrainedModel,
                    inputs: dict[str, Tensor], targets: Tensor, tokens: float) -> Tensor:
    """The divergence of the student from the teacher. Rows of a head after the `vocabulary` are padding."""
    with torch.no_grad():
        theirs = hidden_states(teacher, **inputs)
    student, other = head_of(model), head_of(teacher)
    if len(student["weight"]) != len(other["weight"]):
        for head in (student, other):
            head["weight"] = head["weight"][:vocabulary]
            head["bias"] = None if head["bias"] is None else head["bias"][:vocabulary]
    return r1kernels.linear_distillation_loss(
        hidden_states(model, **inputs), student.pop("weight"), theirs, other.pop("weight"), mask=targets != IGNORED,
        divergence=settings.divergence, beta=settings.beta, temperature=settings.temperature, normalizer=tokens,
        teacher_options=other, **student).loss


def start_of(stage: Stage, new: Callable[[], Any] | None = None) -> Start:
    """The state in which the stage continues, or the `new` model and tokenizer, or those that its settings name."""
    model, tokenizer, state = (*new(), {}) if new and not latest_checkpoint(stage.directory) else stage.start()
    ends = dict.fromkeys([tokenizer.eos_token_id, *end_tokens(model, tokenizer)])
    model.generation_config.eos_token_id = list(ends)  # the token after every response must end generation too
    return model.to(stage.recipe.device), tokenizer, state


def cosine(settings: Any, steps: int, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to the final rate in the last step."""
    highest, lowest, warmup = settings.learning_rate, settings.final_learning_rate, settings.warmup_steps
    if step < warmup:
        return highest * (step + 1) / warmup
    lowest = highest / 10 if lowest is None else lowest
    share = (step - warmup) / max(1, steps - 1 - warmup)
    height = (1 + math.cos(math.pi * share)) / 2
    return height * highest + (1 - height) * lowest


def fit(stage: Stage, start: Start, items: Sequence[Any], learn: Callable[[int, list[Any]], Measures]) -> Summary:
    """Trains on items in epochs with different orders. `learn(step, items)` adds the gradient of some of them."""
    settings, size = stage.settings, stage.settings.batch_size
    order = [index for epoch in range(settings.epochs)
             for index in permutation(len(items), stage.recipe.seed, settings.name, "samples", epoch)]
    steps = math.ceil(len(order) / size)
    optimizer = AdamW(start[0], stage.recipe.dtype, weight_decay=settings.weight_decay)
    return train(stage, start, optimizer, steps,
                 lambda step: learn(step, [items[index] for index in order[step * size : (step + 1) * size]]),
                 partial(cosine, settings, steps), settings.grad_clip)


def train(
    stage: Stage, start: Start, optimizer: AdamW, steps: int, learn: Callable[[int], Measures],
    rate: Callable[[int], float], grad_clip: float,
) -> Summary:
    """Makes the updates up to `steps`, with checkpoints between them and one at the end.

    `learn(step)` adds the gradient and returns "loss", "tokens" and more measures; `rate(step)` is the learning rate.
    """
    (model, tokenizer, state), settings, done = start, stage.settings, 0
    model.eval()  # dropout would draw random numbers
    stage.enable_checkpointing(model)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if getattr(settings, "window", 0) > most:
        raise ConfigError(f"'window' is {settings.window}, but the model supports at most {most} positions")
    if state:
        done = state["step"]
        optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        with optimizer.float32_model():
            save_checkpoint(stage.directory, done, model=mergeable(model), tokenizer=tokenizer,
                            keep=stage.recipe.checkpoint.keep,
                            state={"step": done, "optimizer": optimizer.state_dict(), **adapter_state(model)})

    with StepLog(stage, first_step=done) as log:
        while done < steps:
            started = time.monotonic()
            try:
                stage.interrupt.check()
                optimizer.zero_grad()
                measures = learn(done)
            except Interrupted:
                save()
                raise
            measures |= optimizer_step(optimizer, measures["loss"], rate(done), grad_clip, f"step {done}")
            seconds = time.monotonic() - started
            timing = {"updates": seconds, "total": seconds, "tokens_per_second": measures["tokens"] / seconds}
            line = {"step": done, **measures, "timing": timing}
            log.write(line)
            done += 1
            if done % math.ceil(steps / 20) == 0 or done == steps:
                stage.console.step(settings.name, line, steps)
            if done % stage.recipe.checkpoint.supervised_every == 0 or done == steps:
                save()
    lines = read_lines(stage.directory / METRICS)
    return {"steps": steps, "loss_first": lines[0]["loss"], "loss": lines[-1]["loss"],
            "tokens": sum(line["tokens"] for line in lines)}


def gradient(model: PreTrainedModel, loss: Loss, rows: Rows, size: int | None, check: Callable[[], None]) -> Measures:
    """Adds the gradient of the mean loss per token, which is independent of the micro-batches of `size` rows."""
    tokens, total, size = sum(len(ids) - first for row in rows for ids, first in row), 0.0, size or len(rows)
    for first in range(0, len(rows), size):
        check()
        share = loss(model, *collate(rows[first : first + size], model.device), float(tokens))
        share.backward()
        total += share.item()
    return {"loss": total, "tokens": tokens}


def row_length(row: Sequence[Sample]) -> int:
    """The number of tokens in a row."""
    return sum(len(sample.ids) for sample in row)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[str, str]], chunk: int = 1024) -> Iterator[Sample]:
    """(prompt, completion) pairs as tokens. Each part is encoded separately, as in a rollout; then an end token."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, chunk)):
        prompts, completions = zip(*some, strict=True)
        written = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        for prompt, completion in zip(prompt_tokens(tokenizer, prompts), written, strict=True):
            ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id], dtype=torch.int32)
            yield Sample(ids, max(1, len(prompt)))


def pack(samples: Sequence[Sample], window: int) -> Rows:
    """Rows of at most `window` tokens. Longest first, each sample goes into the first row with room, or a new one."""
    rows: Rows = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        row = next((row for row in rows if row_length([*row, sample]) <= window), None)
        if row is None:
            rows.append(row := [])
        row.append(sample)
    return rows


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


def collate(rows: Rows, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model and targets, each (rows, longest row): the next token if it is learned, else `IGNORED`."""
    shape = len(rows), max(map(row_length, rows))
    padding = torch.zeros(shape[1], dtype=torch.int32)
    samples = [sample for row in rows for sample in (*row, Sample(padding[row_length(row) :], shape[1]))]
    places = [torch.arange(len(ids)) for ids, _ in samples]
    learned = torch.cat([place >= first for place, (_, first) in zip(places, samples, strict=True)])
    ids, positions = torch.cat([ids for ids, _ in samples]).long(), torch.cat(places)
    targets = ids.where(learned, IGNORED).roll(-1)  # it may cross the ends of rows: first tokens are never learned
    ids, positions, targets = (column.view(shape).to(device) for column in (ids, positions, targets))
    return {"input_ids": ids, "position_ids": positions}, targets


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether samples in one row do not see each other. For example, recurrent models ignore positions."""
    ids = torch.arange(12, dtype=torch.int32) % model.get_output_embeddings().weight.shape[0]
    row = [Sample(ids[:6], 1), Sample(ids[6:], 1)]
    together, alone = (hidden_states(model, **collate([some], model.device)[0])[0, -6:] for some in (row, row[1:]))
    # The limit is far above rounding, and far below the effect of one sample on the next.
    limit = max(1e-3, 8 * torch.finfo(alone.dtype).eps)
    return bool((together - alone).abs().max() <= limit * alone.abs().max())
