"""Length: a penalty for completions that come near their limit, instead of a cliff at it."""

from collections.abc import Callable

from .base import Sample
from .settings import ScoringConfig


def overlong(sample: Sample, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to `limit - buffer` tokens, then linear to
    -1 at the limit.

    Raises:
        ValueError: the sample has no token count or limit.
    """
    if sample.tokens is None or sample.limit is None:
        raise ValueError(f"reward 'overlong' got tokens={sample.tokens}, limit={sample.limit}, expected two numbers")
    over = sample.tokens - (sample.limit - buffer)
    return -float(min(max(over / buffer, 0.0), 1.0))


def prepare_overlong(settings: ScoringConfig) -> Callable[[Sample], float]:
    """`overlong` with the buffer of the settings."""
    return lambda sample: overlong(sample, settings.overlong_buffer)
