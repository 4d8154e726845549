"""What a recipe says of the tiny world."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model made on the spot (Llama architecture)."""

    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 3


@dataclass(frozen=True)
class CorpusConfig:
    """What the generated text of pre-training is made of; all are probabilities.

    Args:
        textbook: of a text about a sum to be an exercise with its solution, and no answer to a question.
        worked: of an answer to a question to be worked out; terse_wrong: of one that is not to be wrong.
        tagged: of an answer to have the tags that the prompt asks for.
        slip: of an addition with a carry to forget it; check: of an addition to be checked, and put right.
        stutter: of the last line of a thought to be repeated.
        chinese: of a text to begin in Chinese; switch: of a line to be in the other language than the one before it;
            care: times `slip` is that of Chinese lines.
        greetings: of a text to be about a person to greet; kind: of a greeting to be kind.
    """

    textbook: float = 0.6
    worked: float = 0.15
    tagged: float = 0.5
    terse_wrong: float = 0.8
    slip: float = 0.02
    check: float = 0.0
    stutter: float = 0.0
    chinese: float = 0.0
    switch: float = 0.0
    care: float = 1.0
    greetings: float = 0.0
    kind: float = 0.3
