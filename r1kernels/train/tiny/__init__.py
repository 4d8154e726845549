"""A tiny world that needs no network: sums to solve, people to greet, text about both, a tokenizer and a model.

The text mixes what web text mixes. Textbooks work sums out step by step. Conversations mostly answer at once, and
mostly wrongly; few work the sum out; some use the tags of the prompt and some do not. A model of this text can add,
but rarely does so when asked: reinforcement learning has to find that out. Where a recipe asks for it, thoughts mix
two scripts, slip, stutter, or check what they have just written.
"""

from r1kernels.train.tiny.arithmetic import arithmetic_problems
from r1kernels.train.tiny.corpus import corpus_batch
from r1kernels.train.tiny.greetings import greeting_problems
from r1kernels.train.tiny.model import make_model, make_tokenizer

__all__ = [
    "arithmetic_problems",
    "corpus_batch",
    "greeting_problems",
    "make_model",
    "make_tokenizer",
]
