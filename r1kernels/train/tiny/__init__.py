"""A tiny world that needs no network: sums to solve, people to greet, text about both, a tokenizer and a model."""

from r1kernels.train.tiny.arithmetic import arithmetic_problems
from r1kernels.train.tiny.corpus import corpus_batch
from r1kernels.train.tiny.greetings import greeting_demonstrations, greeting_pairs, greeting_problems
from r1kernels.train.tiny.model import make_model, make_tokenizer
from r1kernels.train.tiny.settings import CorpusConfig, TinyConfig

__all__ = [
    "CorpusConfig",
    "TinyConfig",
    "arithmetic_problems",
    "corpus_batch",
    "greeting_demonstrations",
    "greeting_pairs",
    "greeting_problems",
    "make_model",
    "make_tokenizer",
]
