"""Log-prob and entropy from hidden states, without a gradient: those of the old and the reference policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels
from gpu import eager
from gpu.inputs import make_head, sampled_ids, uniform_ids
from gpu.losses import COMPILED, PEER_TOLERANCE, compare
from gpu.setting import OURS, PRODUCTS, Candidate, Case, Setting, head_shape
from gpu.timing import Timed

MEAN_ERROR, LARGEST_ERROR = 1e-6, 2e-5  # of log-probs, in nats: a bar
CHECKED_ROWS, BLOCK = 2048, 256

Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return eager.logprobs_and_entropy(F.linear(hidden, weight), ids)


def exact(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, block by block."""
    wide = weight.double()
    blocks = [
        plain(h.double(), wide, i) for h, i in zip(hidden.split(BLOCK), ids.split(BLOCK), strict=True)
    ]
    return torch.cat([block[0] for block in blocks]), torch.cat([block[1] for block in blocks])


def errors(function: Function, hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Any]:
    """Of log-probs against float64: mean and largest, and the largest logit the inputs have."""
    rows = torch.arange(0, len(ids), max(1, len(ids) // CHECKED_ROWS), device=ids.device)
    with torch.no_grad():
        found, entropy = (value[rows] for value in function(hidden, weight, ids))
        logprobs, true_entropy = exact(hidden[rows], weight, ids[rows])
        largest = max(float((h @ weight.T).max()) for h in hidden[rows].split(BLOCK))
    compare("the entropies", entropy, true_entropy, 1e-5)
    error = (found.double() - logprobs).abs()
    return {"mean_error": float(error.mean()), "largest_error": float(error.max()), "largest_logit": largest}


def check(name: str, function: Function, hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Any] | None:
    if name.startswith(OURS):
        found = errors(function, hidden, weight, ids)
        # Ten times the bar is no rounding; whether the bar is met is said beside the numbers.
        if not found["largest_error"] <= 10 * LARGEST_ERROR:
            raise AssertionError(f"log-probs are off by {found['largest_error']:.3g}")
        return found
    with torch.no_grad():
        compare("log-probs", function(hidden, weight, ids)[0][:BLOCK],
                exact(hidden[:BLOCK], weight, ids[:BLOCK])[0], PEER_TOLERANCE)
    return None


def cases(setting: Setting) -> Iterator[Case]:
    shape = head_shape(setting)
    hidden, weight = make_head(shape, setting.device)
    drawn = sampled_ids(hidden, weight)
    ids = torch.where(
        torch.arange(len(drawn), device=drawn.device) % 2 == 0, drawn,
        uniform_ids(shape.tokens, shape.vocab, setting.device),
    )
    functions: dict[str, Function] = {OURS: r1kernels.linear_token_logprobs_and_entropy, "torch eager": plain}
    if setting.compiled:
        functions[COMPILED] = torch.compile(plain, dynamic=False)

    def run(function: Function) -> Any:
        with torch.no_grad():
            return function(hidden, weight, ids)

    candidates = {
        name: Candidate(Timed(partial(run, function)), partial(check, name, function, hidden, weight, ids))
        for name, function in functions.items()
    }
    out = hidden.new_empty(shape.tokens, shape.vocab)
    candidates[PRODUCTS] = Candidate(Timed(lambda: torch.mm(hidden, weight.T, out=out)))
    yield Case(
        "linear_statistics", "log-prob + entropy", str(shape), hidden.dtype, candidates,
        bytes=hidden.nbytes + weight.nbytes, flop=2 * shape.tokens * shape.width * shape.vocab,
    )
