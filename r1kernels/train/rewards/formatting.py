"""Format: whether a completion is one thought followed by one answer, in their tags."""

from .base import Sample
from .tags import is_well_formed


def format_reward(sample: Sample) -> float:
    """1.0 for `<think>...</think> <answer>...</answer>`, each tag once and nothing outside, else 0.0.

    When the prompt ends with `<think>`, the completion must not repeat it.
    """
    return float(is_well_formed(sample.prompt, sample.completion))
