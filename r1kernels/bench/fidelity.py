"""Numerical fidelity: errors of log-probs, entropies, gradients and advantages against float64, as distributions.

The inputs are like those of a language model (`language_logits`, `language_head`): peaked rows, heavy tails, offsets
and a few entries of -inf. They are rounded to the dtype first, and float64 gets the rounded values, so that the errors
are those of the arithmetic alone. Log-probs, entropies and advantages have absolute errors; gradients have errors
relative to the largest entry of the exact gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels
from r1kernels import testing
from r1kernels.bench import eager, peers
from r1kernels.bench.engine import Engine
from r1kernels.bench.peers import Peer
from r1kernels.bench.tasks import BOTH, OURS, Function, Problem, Setting, name_of, results

QUANTILES = (0.5, 0.9, 0.99, 0.999)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Quantity(NamedTuple):
    """What one set of candidates computes, and what their results are called."""

    names: tuple[str, ...]  # of the results, in the order of `results`
    problem: Problem
    exact: list[Tensor]
    candidates: dict[str, Function]
    peers: tuple[Peer, ...]
    shape: dict[str, int]
    dtype: torch.dtype


# ---- inputs like those of a language model --------------------------------------------------------------------


def language_logits(tokens: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and token ids (N,), on the CPU, the same for a seed on every machine.

    Entry j of a row has the base -log(1 + rank_j), as frequencies of words have (Zipf's law), plus noise of Student's t
    distribution with 5 degrees of freedom times 2, which has heavy tails. One row in three is peaked: its token is 12
    above the largest other entry, so that its probability rounds to 1. Every row has an offset from -20 to 20, which
    changes no probability. One row in eight has an entry of -inf, as masked ids have. Tokens of rows that are not
    peaked are drawn from the row's distribution.
    """
    rng = testing.generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    base = -(torch.randperm(vocab, generator=rng) + 1).float().log()
    chi_square = sum(normal(tokens, vocab).square() for _ in range(5)) / 5
    logits = base + 2 * normal(tokens, vocab) / chi_square.sqrt()
    logits = logits.clamp(-60, 60)
    rows = torch.arange(tokens)
    ids = torch.multinomial(logits.double().softmax(-1), 1, generator=rng)[:, 0]
    peaked = rows % 3 == 0
    logits[rows[peaked], ids[peaked]] = logits[peaked].amax(-1) + 12
    logits += torch.rand(tokens, 1, generator=rng) * 40 - 20
    masked = rows % 8 == 1
    logits[rows[masked], (ids[masked] + 1) % vocab] = -math.inf
    return logits.to(dtype), ids


def language_head(tokens: int, vocab: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Hidden states (N, H), a weight (V, H) and token ids (N,), on the CPU.

    Two channels of the hidden states are 8 times as large as the others, as in trained models. The norms of the
    weight's rows are spread by a factor of e^0.3. One hidden state in three points along the row of its token, so that
    this token has almost all of the probability.
    """
    rng = testing.generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    weight = normal(vocab, width) * (0.3 * normal(vocab, 1)).exp() * 1.5 / width**0.5
    hidden = normal(tokens, width)
    hidden[:, :2] *= 8
    ids = torch.randint(vocab, (tokens,), generator=rng)
    peaked = torch.arange(tokens) % 3 == 0
    along = weight[ids[peaked]]
    hidden[peaked] += 25 * along / along.square().sum(-1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), ids


# ---- what is compared -----------------------------------------------------------------------------------------


def shape_of_logits(setting: Setting) -> tuple[int, int]:
    """N, V."""
    return setting.pick((96, 4096), (512, 32_768), (1024, 131_072))


def shape_of_hidden(setting: Setting) -> tuple[int, int, int]:
    """N, V, H."""
    return setting.pick((96, 4096, 64), (256, 32_768, 512), (1024, 131_072, 2048))


def of_logits(setting: Setting, dtype: torch.dtype) -> Quantity:
    tokens, vocab = shape_of_logits(setting)
    logits, ids = (value.to(setting.device) for value in language_logits(tokens, vocab, dtype))
    problem = Problem({"logits": logits, "token_ids": ids}, ("logits",))

    def exact_function(logits: Tensor, token_ids: Tensor) -> Tensor:
        return eager.logprobs(logits, token_ids)

    entropy = testing.token_stats(logits.cpu(), ids.cpu()).entropy.to(setting.device)
    logprob, gradient = results(exact_function, problem.to(torch.float64), BOTH)
    # The gradient is that of the sum of the log-probs: entropies of peers have none where an entry is -inf.
    return Quantity(
        ("logprob", "entropy", "grad_logits"), problem, [logprob, entropy, gradient],
        {OURS: constant_entropy(r1kernels.token_logprobs_and_entropy),
         peers.EAGER: constant_entropy(eager.logprobs_and_entropy)},
        (Peer(peers.TRL, lambda: constant_entropy(peers.trl_logprobs_and_entropy())),
         Peer(peers.VERL, lambda: constant_entropy(peers.verl_entropy()))),
        {"N": tokens, "V": vocab}, dtype,
    )


def of_hidden(setting: Setting, dtype: torch.dtype) -> Quantity:
    tokens, vocab, width = shape_of_hidden(setting)
    values = (value.to(setting.device) for value in language_head(tokens, vocab, width, dtype))
    problem = Problem(dict(zip(("hidden", "weight", "token_ids"), values, strict=True)), ("hidden", "weight"))

    def in_torch(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return eager.logprobs_and_entropy(F.linear(hidden, weight), token_ids)

    exact = results(constant_entropy(in_torch), problem.to(torch.float64), BOTH)
    return Quantity(
        ("logprob", "entropy", "grad_hidden", "grad_weight"), problem, exact,
        {OURS: constant_entropy(r1kernels.linear_token_logprobs_and_entropy), peers.EAGER: constant_entropy(in_torch)},
        (Peer(peers.TRL, lambda: constant_entropy(peers.trl_head())),
         Peer(peers.VERL, lambda: constant_entropy(peers.verl_head()))),
        {"N": tokens, "V": vocab, "H": width}, dtype,
    )


def of_rewards(setting: Setting) -> Quantity:
    """Random rewards, groups with one right answer, and groups whose rewards are all 0.1 or all 1e6 / 3: binary
    fractions cannot hold these numbers, but the advantages are exactly 0."""
    prompts, answers = setting.pick((64, 8), (4096, 16), (4096, 16))
    rng = testing.generator(0)
    rewards = torch.randn(prompts, answers, generator=rng)
    quarter = prompts // 4
    rewards[:quarter] = 0.1
    rewards[quarter : quarter + quarter // 2] = 1e6 / 3
    rewards[2 * quarter : 3 * quarter] = 0.0
    rewards[2 * quarter : 3 * quarter, 0] = 1.0
    groups = torch.arange(prompts).repeat_interleave(answers)
    exact = testing.group_advantages(rewards.flatten(), groups).view_as(rewards).to(setting.device)
    return Quantity(
        ("advantage",), Problem({"rewards": rewards.to(setting.device)}), [exact],
        {OURS: r1kernels.group_advantages, peers.EAGER: eager.group_advantages},
        (Peer(peers.VERL, peers.verl_advantages),), {"P": prompts, "G": answers}, torch.float32,
    )


def constant_entropy(function: Function) -> Function:
    """The same without a gradient from the entropy."""

    def run(*arguments: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = function(*arguments, *inputs.values())
        return logprobs, entropy.detach()

    return run


def quantities(setting: Setting) -> Iterator[tuple[str, Callable[[], Quantity], int]]:
    """(a name for messages, what makes the quantity, bytes that it takes: several tensors in float64)."""
    tokens, vocab = shape_of_logits(setting)
    rows, entries, width = shape_of_hidden(setting)
    for dtype in DTYPES:
        yield f"logits, {name_of(dtype)}", lambda dtype=dtype: of_logits(setting, dtype), 80 * tokens * vocab
        needed = 80 * rows * entries + 40 * entries * width
        yield f"hidden states, {name_of(dtype)}", lambda dtype=dtype: of_hidden(setting, dtype), needed
    yield "advantages", lambda: of_rewards(setting), 64 << 20


# ---- errors ---------------------------------------------------------------------------------------------------


def errors(found: Tensor, exact: Tensor, relative: bool) -> dict[str, Any]:
    """Mean, maximum and quantiles of |found - exact| where both are finite, and how many entries of `found` are not
    finite though the exact ones are. With `relative`, in units of the largest |exact|."""
    found, exact = (value.detach().double().flatten().cpu() for value in (found, exact))
    expected = exact.isfinite()
    nonfinite = int((expected & ~found.isfinite()).sum())
    kept = expected & found.isfinite()
    error = (found - exact)[kept].abs().numpy()
    if relative:
        error = error / max(float(exact[expected].abs().max()), np.finfo(np.float64).tiny)
    if not error.size:
        return {"mean": None, "max": None, "quantiles": {str(q): None for q in QUANTILES}, "nonfinite": nonfinite}
    values = np.quantile(error, QUANTILES)
    return {"mean": float(error.mean()), "max": float(error.max()),
            "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, values, strict=True)},
            "nonfinite": nonfinite}


def measure(quantity: Quantity, engine: Engine) -> Iterator[dict[str, Any]]:
    """A row for each result of each implementation."""
    candidates = dict(quantity.candidates)
    place = f"fidelity, {name_of(quantity.dtype)}"
    for peer in quantity.peers:
        try:
            candidates[peer.implementation] = engine.load(peer)
        except peers.Missing as missing:
            where = "" if missing.everywhere else place
            engine.results.leave_out(peer.implementation, str(missing), where)
    for name, function in candidates.items():
        passes = BOTH if quantity.problem.leaves else "forward"
        try:
            found = results(function, quantity.problem, passes)
        except Exception as error:
            engine.results.leave_out(name, peers.one_line(error), place)
            engine.trouble |= name == OURS
            continue
        for what, mine, exact in zip(quantity.names, found, quantity.exact, strict=True):
            yield {
                "quantity": what, "implementation": name, "dtype": name_of(quantity.dtype), "shape": quantity.shape,
                **errors(mine, exact, relative=what.startswith("grad")),
            }
