"""A tiny world that needs no network: sums to solve, text about them, a tokenizer and a model.

The text mixes what web text mixes. Textbooks work sums out step by step. Conversations mostly answer at once,
and mostly wrongly; few work the sum out; some use the tags of the prompt and some do not. A model of this
text can add, but rarely does so when asked: reinforcement learning has to find that out.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r1kernels.train.data import Problem
from r1kernels.train.prompt import render
from r1kernels.train.randomness import python_generator, torch_seeded
from r1kernels.train.schema import ConfigError

PAD, EOS = "<pad>", "<eos>"
Split = Literal["pretrain", "train", "test"]

# Shares of all sums, in tenths: what pre-training has seen, RL never asks, and neither has seen the test.
_SPLITS: dict[Split, range] = {"pretrain": range(6), "train": range(6, 8), "test": range(8, 10)}
# Of the smallest range of terms, one draw in some tens hits a split.
_TRIES = 10_000
_ERRORS = (-20, -10, -9, -5, -3, -2, -1, 1, 2, 3, 5, 9, 10, 20)


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model made on the spot (Llama architecture)."""

    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 3


@dataclass(frozen=True)
class CorpusConfig:
    """What the generated text of pre-training is made of (see `document`); all are probabilities."""

    textbook: float = 0.6
    worked: float = 0.15
    tagged: float = 0.5
    terse_wrong: float = 0.8
    slip: float = 0.02


def split_of(terms: list[int]) -> Split:
    """The split a sum belongs to, whatever the order of its terms."""
    bucket = hashlib.blake2b(bytes(sorted(terms)), digest_size=8).digest()[0] % 10
    return next(split for split, buckets in _SPLITS.items() if bucket in buckets)


def draw_terms(rng: random.Random, split: Split, low: int, high: int) -> list[int]:
    """`low` to `high` digits from 1 to 9 whose sum belongs to `split`."""
    for _ in range(_TRIES):
        terms = [rng.randint(1, 9) for _ in range(rng.randint(low, high))]
        if split_of(terms) == split:
            return terms
    raise ConfigError(
        f"'data.min_terms' {low} and 'data.max_terms' {high} leave no sum to the {split!r} split; widen the range"
    )


def sums_of(split: Split, low: int, high: int) -> Iterator[list[int]]:
    """All the sums that `draw_terms` draws from, those of few terms first."""
    for count in range(low, high + 1):
        for terms in itertools.product(range(1, 10), repeat=count):
            if split_of(list(terms)) == split:
                yield list(terms)


def ask(terms: list[int]) -> str:
    return "Compute " + "+".join(map(str, terms))


def arithmetic_problems(split: Split, count: int, low: int, high: int, seed: int, key: str = "count") -> list[Problem]:
    """`count` different sums of a split, in a random order given by the seed; `key` is the setting to blame for it."""
    rng = python_generator(seed, "problems", split)
    # Twice as many as asked for, or all there are: among fewer, drawing until all are different would take for ever.
    some = list(itertools.islice(sums_of(split, low, high), 2 * count))
    if len(some) < count:
        raise ConfigError(
            f"'{key}' is {count}, expected at most {len(some)}: no more different sums of 'data.min_terms' {low} to "
            f"'data.max_terms' {high} digits are in the {split!r} split"
        )
    found: dict[str, Problem] = {}

    def add(terms: list[int]) -> None:
        question = ask(terms)
        found.setdefault(question, Problem(f"{split}-{len(found)}", question, str(sum(terms))))

    if len(some) < 2 * count:
        for terms in rng.sample(some, count):
            add(terms)
    while len(found) < count:
        add(draw_terms(rng, split, low, high))
    return list(found.values())


def work_out(rng: random.Random, terms: list[int], slip: float) -> tuple[str, int]:
    """One addition a line, each wrong with probability `slip`; the text and its result."""
    total, lines = terms[0], []
    for term in terms[1:]:
        result = total + term
        if rng.random() < slip:
            result = max(0, result + rng.choice(_ERRORS))
        lines.append(f"{total}+{term}={result}")
        total = result
    return "\n".join(lines), total


def document(rng: random.Random, corpus: CorpusConfig, low: int, high: int) -> tuple[str, str]:
    """One text of the corpus in two pieces: up to the question, and what follows it."""
    terms = draw_terms(rng, "pretrain", low, high)
    if rng.random() < corpus.textbook:
        return f"Exercise: {ask(terms)}. Solution:", " " + work_out(rng, terms, corpus.slip)[0]
    if rng.random() < corpus.worked:
        thought, answer = work_out(rng, terms, corpus.slip)
        plain = f" {thought}\nIt is {answer}."
    else:
        answer = sum(terms)
        if rng.random() < corpus.terse_wrong:
            answer = max(0, answer + rng.choice(_ERRORS))
        thought = plain = f" It is {answer}."
    tagged = f" <think>{thought.strip()}</think>\n<answer>{answer}</answer>"
    return render(ask(terms)), tagged if rng.random() < corpus.tagged else plain


def make_tokenizer(corpus: CorpusConfig, high: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the corpus, with every digit and newline a token of its own.

    Nothing else splits the text, so the merges swallow the template: a prompt is little more than its sum.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9\n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    rng = python_generator(seed, "tokenizer")
    texts = [piece for _ in range(1000) for piece in document(rng, corpus, 2, high)]
    trainer = trainers.BpeTrainer(vocab_size=1024, min_frequency=2, special_tokens=[PAD, EOS], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model(shape: TinyConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=True,  # lets a head attend by position alone, which finding the next term of a sum needs
        # The usual 0.02 suits a width in the thousands; here learning would start late.
        initializer_range=0.6 * shape.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch_seeded(seed, "model"):
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def corpus_batch(
    tokenizer: PreTrainedTokenizerFast, settings: Any, high: int, seed: int, step: int
) -> dict[str, Tensor]:
    """Batch `step` of the endless corpus, packed without padding; a row's last document is cut off.

    Returns:
        input_ids, position_ids and targets, each (batch_size, window). Positions restart at 0 with each document,
        by which the model knows to keep its attention inside; no target (-100) asks for the start of a document.
    """
    rng = python_generator(seed, "corpus", step)
    shape = (settings.batch_size, settings.window)
    ids, positions = torch.empty(shape, dtype=torch.long), torch.empty(shape, dtype=torch.long)
    for row in range(settings.batch_size):
        filled = 0
        while filled < settings.window:
            # Encoded apart, as a prompt and its completion will be.
            head, tail = tokenizer(list(document(rng, settings.corpus, 2, high)))["input_ids"]
            text = torch.tensor([*head, *tail, tokenizer.eos_token_id])[: settings.window - filled]
            ids[row, filled : filled + len(text)] = text
            positions[row, filled : filled + len(text)] = torch.arange(len(text))
            filled += len(text)
    return {"input_ids": ids, "position_ids": positions, "targets": ids.masked_fill(positions == 0, -100)}
