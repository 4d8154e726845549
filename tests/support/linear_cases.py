"""Inputs of the linear head and its dense float64 oracle: every product, cap and chain rule written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import testing
from r1kernels.ops.linear.budget import row_bytes

# Which keywords a head has; the tensors are made by `make`.
HEADS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "bias": ("bias",),
    "lora": ("lora",),
    "logit_scale": ("logit_scale",),
    "softcap": ("softcap",),
    "temperature": ("temperature",),
    "temperatures": ("temperatures",),
    "scale and temperatures": ("logit_scale", "temperatures", "bias"),
    "everything": ("bias", "lora", "logit_scale", "softcap", "temperatures"),
}
TENSORS = ("hidden", "weight", "bias", "lora_a", "lora_b")


def chunk_of(rows: int, vocab: int, width: int, dtype: torch.dtype = torch.float32) -> int:
    """The budget that holds so many rows; the dtype is that of the logits."""
    return rows * row_bytes(vocab, width, dtype)


def make(
    head: str = "plain", *lead: int, width: int = 12, vocab: int = 37, dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None, seed: int = 0, scale: float = 2.0,
) -> dict[str, Any]:
    """hidden, weight, token_ids and the options of a head; logits have a standard deviation of about `scale`."""
    rng = testing.generator(seed)

    def normal(*shape: int, size: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=rng) * size).to(to)

    case: dict[str, Any] = {
        "hidden": normal(*lead, width),
        "weight": normal(vocab, width, size=scale / math.sqrt(max(width, 1)), to=weight_dtype or dtype),
        "token_ids": testing.random_ids(*lead, vocab=vocab, seed=seed),
    }
    wanted = HEADS[head]
    if "bias" in wanted:
        case["bias"] = normal(vocab)
    if "lora" in wanted:
        case["lora"] = (normal(width, 3, size=1 / math.sqrt(max(width, 1))), normal(3, vocab))
    if "logit_scale" in wanted:
        case["logit_scale"] = 0.6
    if "softcap" in wanted:
        case["softcap"] = 5.0
    if "temperature" in wanted:
        case["temperature"] = 0.7
    if "temperatures" in wanted:
        case["temperature"] = torch.rand(lead, generator=rng) + 0.5
    return case


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a case that may receive gradients, by name."""
    named = {name: case[name] for name in ("hidden", "weight", "bias") if name in case}
    if "lora" in case:
        named |= dict(zip(("lora_a", "lora_b"), case["lora"], strict=True))
    return named


def with_tensors(case: dict[str, Any], named: dict[str, Tensor]) -> dict[str, Any]:
    """The case with other tensors in the place of its own."""
    result = case | {name: value for name, value in named.items() if not name.startswith("lora")}
    if "lora_a" in named:
        result["lora"] = (named["lora_a"], named["lora_b"])
    return result


def gradients(
    function: Callable[..., Any], case: dict[str, Any], upstream: Callable[[Any], Tensor], **keywords: Any
) -> tuple[Any, dict[str, Tensor]]:
    """(result of `function`, gradients of `upstream(result)` by name) with every tensor a leaf."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors(case).items()}
    result = function(**with_tensors(case, leaves), **keywords)
    grads = torch.autograd.grad(upstream(result), list(leaves.values()))
    return result, dict(zip(leaves, grads, strict=True))


class Exact(NamedTuple):
    """Float64 values. `terms`: for each gradient the sum of the absolute values of what was added up."""

    logprobs: Tensor
    entropy: Tensor
    grads: dict[str, Tensor]
    terms: dict[str, Tensor]


def logits(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(u, v, z), each (N, V): scaled, capped, and divided by the temperature."""
    hidden = case["hidden"].detach().double().reshape(-1, case["hidden"].shape[-1])
    x = hidden @ case["weight"].detach().double().T
    if "lora" in case:
        a, b = (matrix.detach().double() for matrix in case["lora"])
        x = x + hidden @ a @ b
    if case.get("bias") is not None:
        x = x + case["bias"].detach().double()
    u = case.get("logit_scale", 1.0) * x
    cap = case.get("softcap")
    v = u if cap is None else cap * torch.tanh(u / cap)
    return u, v, v / _temperatures(case)


def _temperatures(case: dict[str, Any]) -> Tensor:
    value = case.get("temperature", 1.0)
    return value.double().reshape(-1, 1) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def exact(case: dict[str, Any], g: Tensor | None = None, eta: Tensor | None = None) -> Exact:
    """Statistics, and the gradients for dL/dlogprob = g and dL/dentropy = eta, both (...), 0 unless given."""
    shape = case["token_ids"].shape
    ids = case["token_ids"].reshape(-1)
    _, _, z = logits(case)
    if "support" in case:
        z = testing.over_support(z, case["support"])
    stats = testing.token_stats(z, ids)
    zero = torch.zeros(ids.shape, dtype=torch.float64)
    g, eta = (zero if value is None else value.detach().double().reshape(-1) for value in (g, eta))
    grad_z = testing.token_stats_gradient(z, ids, g, eta).value
    # A gradient of logits is itself a difference: g (1[j = y] - p_j) and the entropy's terms.
    p = stats.log_p.exp()
    surprise = 1 + stats.entropy[:, None] + torch.where(p == 0, 0, stats.log_p).abs()
    rough = (g.abs()[:, None] + eta.abs()[:, None] * surprise) * p
    rough = rough + g.abs()[:, None] * torch.nn.functional.one_hot(ids, p.shape[-1])
    return Exact(stats.logprobs.reshape(shape), stats.entropy.reshape(shape), *products(case, grad_z, rough))


def products(case: dict[str, Any], grad_z: Tensor, rough: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`Exact.grads` and `Exact.terms` from the gradient of z (N, V), and the sums of its terms' absolute values."""
    _, v, _ = logits(case)
    slope = case.get("logit_scale", 1.0) / _temperatures(case)
    if case.get("softcap") is not None:
        slope = slope * (1 - (v / case["softcap"]) ** 2)
    hidden = case["hidden"].detach().double().reshape(-1, case["hidden"].shape[-1])
    weight = case["weight"].detach().double()

    def of(d: Tensor, h: Tensor, w: Tensor, lora: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        grads = {"hidden": d @ w, "weight": d.T @ h, "bias": d.sum(0)}
        if lora is not None:
            a, b = lora
            grads["hidden"] = grads["hidden"] + d @ b.T @ a.T
            grads |= {"lora_a": h.T @ (d @ b.T), "lora_b": (h @ a).T @ d}
        grads["hidden"] = grads["hidden"].reshape(case["hidden"].shape)
        return grads

    lora = tuple(matrix.detach().double() for matrix in case["lora"]) if "lora" in case else None
    absolute = None if lora is None else tuple(matrix.abs() for matrix in lora)
    return of(grad_z * slope, hidden, weight, lora), of(rough * slope.abs(), hidden.abs(), weight.abs(), absolute)


def assert_gradients(got: dict[str, Tensor], expected: Exact, relative: float) -> None:
    """Every element to `relative` of the sum of the absolute values of its terms, and of its result's dtype."""
    for name, grad in got.items():
        try:
            slack = relative * expected.terms[name] + testing.rounding(expected.grads[name], grad.dtype)
            testing.assert_within(grad, expected.grads[name], slack + torch.finfo(torch.float32).tiny)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def weights_of(*shape: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Upstream gradients of log-prob and entropy, float64."""
    both = torch.randn(2, *shape, generator=testing.generator(seed), dtype=torch.float64)
    return both[0], both[1]
