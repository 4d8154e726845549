"""Reads tables/cuda_faster.json: where the CUDA kernels were measured to be faster than Triton's.

benchmarks/choose.py writes the table:

    {device name: {"measured": versions, "operators": {operator: [measurement, ...]}}}

A measurement is {"dtype": ..., "vocab": ..., "tokens": ..., "ratio": ...}, for logits of this dtype and vocabulary. For
operators on tokens, `dtype` and `vocab` are null, and the measurement is valid for all of them. `ratio` is the time of
Triton divided by that of CUDA, less the spread of both: above 1, CUDA is faster. A case without a measurement counts as
not faster. A measurement is also used for vocabularies up to two times larger or smaller.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).parent / "tables" / "cuda_faster.json"
FARTHEST = 2.0  # largest factor between a vocabulary and a measured one


class Measurement(NamedTuple):
    dtype: str | None
    vocab: int | None
    tokens: int
    ratio: float


Table = dict[str, dict[str, list[Measurement]]]


@functools.lru_cache(maxsize=4096)
def cuda_is_faster(operator: str, device_name: str, dtype: torch.dtype | None, vocab: int | None) -> bool:
    """Whether the CUDA kernels of an operator of namespace r1kernels are faster than Triton's.

    Args:
        operator: its name, such as "token_stats".
        device_name: the result of torch.cuda.get_device_name.
        dtype: the dtype of the operator's first argument, the logits.
        vocab: the last dimension of that argument, V.

    Raises:
        RuntimeError: the table cannot be read.
    """
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    known = [each for each in load(TABLE).get(device_name, {}).get(operator, []) if each.dtype in (None, name)]
    distance = {each: _apart(vocab, each.vocab) for each in known}
    least = min(distance.values(), default=FARTHEST)
    near = [each for each, factor in distance.items() if factor == least <= FARTHEST]
    # The table has ratios for few and for many tokens, but there is one choice for all of them.
    return bool(near) and all(each.ratio > 1 for each in near)


def _apart(vocab: int | None, measured: int | None) -> float:
    if measured is None or vocab is None:
        return 1.0 if measured is None else math.inf
    larger, smaller = max(vocab, measured), min(vocab, measured)
    return larger / smaller if smaller > 0 else math.inf


@functools.cache
def load(path: Path) -> Table:
    """{device name: {operator: measurements}}."""
    try:
        return {
            device: {
                operator: [_measurement(**each) for each in measurements]
                for operator, measurements in entry["operators"].items()
            }
            for device, entry in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RuntimeError(
            f"{path} cannot be read ({type(error).__name__}: {error}); reinstall r1kernels, or in a source tree "
            "restore the file"
        ) from None


def _measurement(*, dtype: Any, vocab: Any, tokens: Any, ratio: Any) -> Measurement:
    whole = isinstance(tokens, int) and (vocab is None or isinstance(vocab, int))
    if not whole or not isinstance(ratio, (int, float)) or not (dtype is None or isinstance(dtype, str)):
        raise ValueError(f"invalid measurement: dtype {dtype!r}, vocab {vocab!r}, tokens {tokens!r}, ratio {ratio!r}")
    return Measurement(dtype, vocab, tokens, float(ratio))
