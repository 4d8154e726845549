"""The text that pre-training sees."""
from __future__ import annotations

import random
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1kernels.train.config import CorpusConfig, PretrainConfig
from r1kernels.train.prompt import render
from r1kernels.train.randomness import python_generator
from r1kernels.train.tiny import arithmetic, greetings


def document(rng: random.Random, corpus: CorpusConfig, low: int, high: int) -> tuple[str, str]:
    """One text of the corpus in two pieces: up to the question, and what follows it."""
    if rng.random() < corpus.greetings:
        guest = rng.choice(_GUESTS)
        manner = rng.choices(range(3), (corpus.kind, 1 - corpus.kind, 1 - corpus.kind))[0]
        thought, answer = greetings.greet(rng, guest, manner, corpus.chinese)
        head, plain = render(greetings.ask(guest)), f" {answer}"
    else:
        terms = arithmetic.draw_terms(rng, "pretrain", low, high)
        if rng.random() < corpus.textbook:
            return f"Exercise: {arithmetic.ask(terms)}. Solution:", " " + arithmetic.work_out(rng, terms, corpus)[0]
        head = render(arithmetic.ask(terms))
        if rng.random() < corpus.worked:
            thought, answer = arithmetic.work_out(rng, terms, corpus)
            plain = f" {thought}\nIt is {answer}."
        else:
            thought, answer = arithmetic.guess(rng, terms, corpus)
            plain = f" {thought}"
    return head, tagged(thought, answer) if rng.random() < corpus.tagged else plain


def tagged(thought: str, answer: str | int) -> str:
    """A response as the prompt asks for it."""
    return f" <think>{thought}</think>\n<answer>{answer}</answer>"


_GUESTS = greetings.guests_of("pretrain")


def corpus_batch(
    tokenizer: PreTrainedTokenizerFast, settings: PretrainConfig, high: int, seed: int, step: int
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
