"""Oracles of the token filters, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def high_entropy(entropy: Sequence[float], counts: Sequence[bool], top: float) -> list[float]:
    """1 for counted tokens at or above the linearly interpolated quantile 1 - top."""
    ordered = sorted(h for h, counted in zip(entropy, counts, strict=True) if counted and not math.isnan(h))
    if not ordered:
        return [0.0] * len(entropy)
    place = round((1 - top) * (len(ordered) - 1), 9)
    below = ordered[math.floor(place)]
    limit = below + (ordered[math.ceil(place)] - below) * (place - math.floor(place))
    return [float(counted and h >= limit) for h, counted in zip(entropy, counts, strict=True)]


def off_policy(gaps: Sequence[Sequence[float]], advantages: Sequence[float], threshold: float) -> list[float]:
    """1 for the sequences that are kept, from l_old - l of their counted tokens."""
    kept = []
    for of_sequence, advantage in zip(gaps, advantages, strict=True):
        mean = sum(gap for gap in of_sequence if not math.isnan(gap)) / max(len(of_sequence), 1)
        kept.append(float(advantage >= 0 or mean <= threshold))
    return kept


def covariances(logprobs: Sequence[float], advantages: Sequence[float], counts: Sequence[bool]) -> list[float]:
    """(l - mean l) (A - mean A) of counted tokens, NaN elsewhere."""
    kept = [at for at, counted in enumerate(counts) if counted]
    mean_l, mean_a = (sum(values[at] for at in kept) / max(len(kept), 1) for values in (logprobs, advantages))
    return [(logprobs[at] - mean_l) * (advantages[at] - mean_a) if counted else math.nan
            for at, counted in enumerate(counts)]
