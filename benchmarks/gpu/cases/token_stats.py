"""Log-prob and entropy of logits, and their gradient: into fresh memory, in place, and from a float32 chunk to bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import r1kernels
from gpu.ceilings import copy_of
from gpu.inputs import make_logits, noise_like, uniform_ids
from gpu.losses import PEER_TOLERANCE, compare, distance, with_eager
from gpu.setting import COPY, OURS, Candidate, Case, Logits, Setting, logits_shapes, peers, with_cuda
from gpu.timing import Timed
from r1kernels.bench import eager
from r1kernels.bench.peers import named
from r1kernels.ops import token_stats

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
FEW = 8
CHUNK = 1024  # rows of the chunks of a linear head
STATISTICS_FLOP, GRADIENT_FLOP = 6, 4  # of an entry


def _trl() -> Function:
    function = named("trl.trainer.utils", "selective_log_softmax_and_entropy")
    return lambda logits, ids: function(logits, ids, entropy_requires_grad=False)


def _functions(setting: Setting, main: bool) -> dict[str, Function]:
    plain = with_eager(eager.finite_logprobs_and_entropy, setting, also_compiled=main)
    return {OURS: r1kernels.token_logprobs_and_entropy, **plain, **peers(setting, {"TRL": _trl})}


def _edges(count: int) -> Tensor:
    """The first and the last rows."""
    return torch.tensor([*range(FEW), *range(count - FEW, count)])


def _tolerance(name: str, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    ours = name.startswith(OURS)
    return 2 * (distance(plain, exact) + torch.finfo(dtype).eps) if ours else PEER_TOLERANCE


def check_statistics(name: str, function: Function, logits: Tensor, ids: Tensor) -> None:
    rows = _edges(len(ids)).to(ids.device)
    with torch.no_grad():
        found = function(logits, ids)
        exact = eager.finite_logprobs_and_entropy(logits[rows].double(), ids[rows])
        plain = eager.finite_logprobs_and_entropy(logits[rows], ids[rows])
    for what, got, same_dtype, true in zip(("log-probs", "entropies"), found, plain, exact, strict=True):
        compare(what, got[rows], true, _tolerance(name, same_dtype, true, torch.float32))


def _gradient(logits: Tensor, ids: Tensor, g: Tensor) -> Tensor:
    """g (1[j = y] - p_j), in the arithmetic of `eager`."""
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(eager.finite_logprobs_and_entropy(leaf, ids)[0], leaf, g.to(eager.wide(leaf).dtype))[0]


def check_gradient(
    name: str, run: Callable[[], Tensor], logits: Tensor, ids: Tensor, g: Tensor, dtype: torch.dtype
) -> None:
    """`run` may write to the logits' own memory: the rows that count are kept first."""
    rows = _edges(len(ids)).to(ids.device)
    kept = logits[rows].clone()
    found = run()[rows]
    exact, plain = (_gradient(x, ids[rows], g[rows]) for x in (kept.double(), kept))
    compare("the gradient", found, exact, _tolerance(name, plain.to(dtype), exact, dtype))


def forward_case(setting: Setting, shape: Logits, logits: Tensor, ids: Tensor) -> Case:
    def run(function: Function) -> Any:
        with torch.no_grad():
            return function(logits, ids)

    candidates = {
        name: Candidate(Timed(partial(run, function)), partial(check_statistics, name, function, logits, ids))
        for name, function in _functions(setting, shape.main).items()
    }
    candidates = with_cuda(candidates, setting)
    candidates[COPY] = copy_of(logits)
    flop = STATISTICS_FLOP * logits.numel()
    return Case("token_stats", "statistics", str(shape), logits.dtype, candidates, bytes=logits.nbytes, flop=flop)


def backward_case(setting: Setting, shape: Logits, logits: Tensor, ids: Tensor, g: Tensor) -> Case:
    leaf = logits.detach().requires_grad_()

    def candidate(name: str, function: Function) -> Candidate:
        logprobs: list[Tensor] = []  # made by the check: the forward of a peer that fails leaves nothing behind

        def run() -> Tensor:
            if not logprobs:
                logprobs.append(function(leaf, ids)[0])
            return torch.autograd.grad(logprobs[0], leaf, g.to(logprobs[0].dtype), retain_graph=True)[0]

        return Candidate(Timed(run), partial(check_gradient, name, run, logits, ids, g, logits.dtype))

    functions = _functions(setting, shape.main)
    candidates = with_cuda({name: candidate(name, function) for name, function in functions.items()}, setting)
    candidates[COPY] = copy_of(logits)
    return Case(
        "token_stats", "gradient", str(shape), logits.dtype, candidates, bytes=2 * logits.nbytes,
        flop=GRADIENT_FLOP * logits.numel(), inherent_bytes=logits.nbytes,
    )


def in_place_case(
    setting: Setting, shape: Logits, logits: Tensor, ids: Tensor, g: Tensor, dtype: torch.dtype
) -> Case:
    """Gradient of `dtype` over the logits, row for row: what the walk over a head's chunks does."""
    _, lse, entropy = token_stats.statistics(logits, ids, None, 1.0, None)
    work = logits.clone()
    out = work if dtype == logits.dtype else work.view(dtype)[:, : logits.shape[1]]

    def run() -> Tensor:
        return token_stats.gradient_into(
            out, work, ids, lse, entropy, g, None, temperature=1.0, temperatures=None, softcap=0.0, rows=None
        )

    def prepared() -> Tensor:
        work.copy_(logits)
        return run()

    timed = Timed(run, prepare=lambda: work.copy_(logits))
    check = partial(check_gradient, OURS, prepared, logits, ids, g, dtype)
    candidates = with_cuda({OURS: Candidate(timed, check)}, setting)
    candidates[COPY] = copy_of(logits)
    moved = logits.numel() * (logits.itemsize + dtype.itemsize)
    case = "gradient in place" if dtype == logits.dtype else "gradient in place, narrowed to 16 bits"
    return Case(
        "token_stats", case, str(shape), logits.dtype, candidates, bytes=moved, flop=GRADIENT_FLOP * logits.numel()
    )


def cases(setting: Setting) -> Iterator[Case]:
    shapes = [shape for shape in logits_shapes(setting) if not setting.lean or shape.main or shape.vocab < 50_000]
    for shape in shapes:
        logits = make_logits(shape, torch.bfloat16, setting.device)
        ids = uniform_ids(shape.tokens, shape.vocab, setting.device)
        g = 1 + noise_like(ids, 0.1)
        yield forward_case(setting, shape, logits, ids)
        yield backward_case(setting, shape, logits, ids, g)
        if shape.main:
            yield in_place_case(setting, shape, logits, ids, g, logits.dtype)
            chunk = shape._replace(tokens=min(CHUNK, shape.tokens), main=False)
            logits = make_logits(chunk, torch.float32, setting.device)
            ids, g = ids[: chunk.tokens], g[: chunk.tokens]
            yield forward_case(setting, chunk, logits, ids)
            yield in_place_case(setting, chunk, logits, ids, g, torch.bfloat16)
