"""Log-prob and entropy from hidden states, without a gradient: those of the old and the reference policy.

Beside the time, the errors of log-probs against float64: of our tiles, and of the library's product with float32
accumulators, which no arithmetic after it can mend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels
from gpu.inputs import make_head, sampled_ids, uniform_ids
from gpu.losses import PEER_TOLERANCE, compare, with_compiled
from gpu.setting import (
    FLOAT32_PRODUCT,
    FLUSHED,
    OURS,
    PRODUCTS,
    Candidate,
    Case,
    Setting,
    head_shape,
    quietly,
)
from gpu.tiles import forced, kernel_device
from gpu.timing import Timed
from r1kernels.bench import eager
from r1kernels.bench.peers import EAGER

NO_ROUNDING = 1e-3  # nats: a log-prob that is off by more is wrong
CHECKED_ROWS, BLOCK = 2048, 256

Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return eager.finite_logprobs_and_entropy(F.linear(hidden, weight), ids)


def is_sampled(ids: Tensor) -> Tensor:
    """Every other token is one that the model would draw; the others are any."""
    return torch.arange(len(ids), device=ids.device) % 2 == 0


def exact(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, block by block."""
    wide = weight.double()
    blocks = [
        plain(h.double(), wide, i) for h, i in zip(hidden.split(BLOCK), ids.split(BLOCK), strict=True)
    ]
    return torch.cat([block[0] for block in blocks]), torch.cat([block[1] for block in blocks])


def with_float32_product(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The library's product, in float32; the rest in float64, block by block."""
    if hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.T.float()
    parts = [
        eager.finite_logprobs_and_entropy(block.double(), i)
        for block, i in zip(logits.split(BLOCK), ids.split(BLOCK), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def with_flushed_tile(setting: Setting) -> dict[str, Function]:
    """Ours with a second accumulator, where the device has such a tile (and there is Triton)."""
    module = quietly(lambda: importlib.import_module("r1kernels.triton.linear_statistics"))
    space = module.search_space(kernel_device(setting.device)) if module else []
    tile = next((tile for tile in space if tile.flush), None)
    if tile is None:
        return {}

    def function(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with forced(module, tile):
            return r1kernels.linear_token_logprobs_and_entropy(hidden, weight, ids)

    return {FLUSHED: function}


def errors(function: Function, hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Any]:
    """Of log-probs against float64, of tokens of the model and of uniform ones; and the largest logit there is."""
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS].sort().values
    rows = chosen.to(ids.device)
    with torch.no_grad():
        found, entropy = (value[rows] for value in function(hidden, weight, ids))
        logprobs, true_entropy = exact(hidden[rows], weight, ids[rows])
        largest = max(float((h @ weight.T).max()) for h in hidden[rows].split(BLOCK))
    compare("the entropies", entropy, true_entropy, 1e-5)
    error = (found.double() - logprobs).abs()
    sampled = is_sampled(ids)[rows]
    return {
        "mean_error": float(error.mean()), "largest_error": float(error.max()), "largest_logit": largest,
        **{
            f"{what}_error_{name}": float(value)
            for name, each in (("sampled", error[sampled]), ("uniform", error[~sampled]))
            for what, value in (("mean", each.mean()), ("largest", each.max()))
        },
    }


def check(name: str, function: Function, hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Any] | None:
    if name.startswith(OURS) or name == FLOAT32_PRODUCT:
        found = errors(function, hidden, weight, ids)
        # Whether the bars are met is said beside the numbers.
        if not found["largest_error"] <= NO_ROUNDING:
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
    ids = torch.where(is_sampled(drawn), drawn, uniform_ids(shape.tokens, shape.vocab, setting.device))
    functions: dict[str, Function] = {
        OURS: r1kernels.linear_token_logprobs_and_entropy, **with_flushed_tile(setting), EAGER: plain,
        FLOAT32_PRODUCT: with_float32_product,
    }
    if setting.compiled:
        functions |= with_compiled(plain)

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
