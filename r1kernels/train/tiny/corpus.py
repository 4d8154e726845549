"""The text that pre-training sees.

It mixes what web text mixes. Textbooks work sums out step by step. Conversations mostly answer at once, and mostly
wrongly; few work the sum out; some use the tags of the prompt and some do not. A model of this text can add, but rarely
does so when asked: reinforcement learning has to find that out.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1kernels.train.prompt import render
from r1kernels.train.rng import python_generator
from r1kernels.train.tiny import arithmetic, greetings
from r1kernels.train.tiny.settings import CorpusConfig
from r1kernels.train.tiny.texts import tagged


def document(rng: random.Random, corpus: CorpusConfig, low: int, high: int) -> tuple[str, str]:
    """One text of the corpus in two pieces: up to the question, and what follows it."""
    if rng.random() < corpus.greetings:
        guests = rng.choice(greetings.guests_of("pretrain"))
        others = (1 - corpus.kind) / 2
        [manner] = rng.choices(range(3), (corpus.kind, others, others))
        thought, answer = greetings.greet(rng, guests, manner, corpus.chinese)
        question, plain = greetings.ask(guests), answer
    else:
        terms = arithmetic.draw_terms(rng, "pretrain", low, high)
        question = arithmetic.ask(terms)
        if rng.random() < corpus.textbook:
            return f"Exercise: {question}. Solution:", " " + arithmetic.work_out(rng, terms, corpus)[0]
        if rng.random() < corpus.worked:
            thought, answer = arithmetic.work_out(rng, terms, corpus)
            plain = f"{thought}\nIt is {answer}."
        else:
            thought, answer = arithmetic.guess(rng, terms, corpus)
            plain = thought
    return render(question), tagged(thought, answer) if rng.random() < corpus.tagged else f" {plain}"


def corpus_batch(
    tokenizer: PreTrainedTokenizerFast, settings: Any, high: int, seed: int, step: int
) -> dict[str, Tensor]:
    """Batch `step` of the endless corpus, packed without padding; a row's last document is cut off.

    Args:
        settings: with `corpus`, `batch_size` and `window`.

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
