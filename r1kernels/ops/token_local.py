"""Token-local objectives: a user's function of single tokens, differentiated by autograd on tensors of [n] numbers.

The slopes of a token depend on nothing but the token, so a walk over chunks of hidden states can call the function for
each chunk, and leave out tokens whose slopes are exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r1kernels.objectives import Objective, TokenLocal
from r1kernels.ops import kl_estimate
from r1kernels.ops._checks import values_are_free


def loss_of(
    surrogate: TokenLocal, logprobs: Tensor, entropies: Tensor | None, tokens: Any, counts: Tensor | None = None
) -> Tensor:
    """The function's loss of each token (n,), without the importance weight.

    A token of importance weight 0 is rejected: it gets no gradient, whatever the function's derivative is.

    Raises:
        ValueError: the result is no floating-point tensor of shape (n,), has no gradient, or is NaN at a token that
            counts although its log-prob and entropy are not; or the function changed its inputs. Nobody looks at values
            on a device, because that would synchronise.
    """
    if tokens.importance_weights is not None:
        kept = tokens.importance_weights != 0
        counts = kept if counts is None else counts & kept
        logprobs = torch.where(kept, logprobs, logprobs.detach())
        entropies = None if entropies is None else torch.where(kept, entropies, entropies.detach())
    inputs = {"logprobs": logprobs, "entropies": entropies,
              **{f"tokens.{name}": value for name, value in tokens._asdict().items()}}
    versions = _versions(inputs)
    loss = surrogate.function(logprobs, entropies, tokens)
    name, shape = f"the token-local objective {surrogate.name}", tuple(logprobs.shape)
    if not isinstance(loss, Tensor) or loss.shape != shape:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"{name} returned {got}, expected one loss for each token, of shape {shape}")
    if not loss.is_floating_point():
        raise ValueError(f"{name} returned losses of {loss.dtype}, expected a floating-point dtype")
    for field, version in _versions(inputs).items():
        if version != versions[field]:
            raise ValueError(f"{name} changed {field} in place, expected a function that leaves its inputs as they are")
    given = [value for value in (logprobs, entropies) if value is not None]
    if torch.is_grad_enabled() and any(value.requires_grad for value in given) and not loss.requires_grad:
        raise ValueError(f"{name} returned losses without a gradient, expected differentiable ones of the log-probs "
                         "or entropies that it gets")
    _check(f"{name} returned a loss that is", loss, given, counts)
    return loss if counts is None else torch.where(counts, loss, 0)


def _versions(inputs: dict[str, Tensor | None]) -> dict[str, int]:
    """How often each was written to, where torch counts that."""
    if torch.compiler.is_compiling():
        return {}
    return {name: value._version for name, value in inputs.items() if value is not None and not value.is_inference()}


def check_derivatives(
    surrogate: TokenLocal, derivatives: Sequence[Tensor | None], given: list[Tensor | None],
    importance: Tensor | None, counts: Tensor | None,
) -> None:
    """Refuses NaN in the derivatives of tokens that count and are not rejected, on CPUs."""
    if importance is not None:
        counts = importance != 0 if counts is None else counts & (importance != 0)
    for slope in derivatives:
        if slope is not None:
            _check(f"the token-local objective {surrogate.name} has a derivative that is", slope,
                   [value for value in given if value is not None], counts)


def _check(what: str, value: Tensor, given: list[Tensor], counts: Tensor | None) -> None:
    """Refuses NaN that the function made."""
    if not values_are_free(value):
        return
    bad = value.isnan()
    if not bad.any():
        return
    for source in given:
        bad = bad & ~source.isnan()
    bad = bad if counts is None else bad & counts
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{what} NaN at token {at} of the {len(value)} that it got (log-prob "
                         f"{float(given[0].detach()[at]):g}), expected a number")


def slopes(objective: Objective, logprobs: Tensor, entropies: Tensor, tokens: Any) -> tuple[Tensor, Tensor | None]:
    """(dL/dlogprob, dL/dentropy) of each token (n,), before the weights of the reduction.

    The second is None if the loss does not depend on the entropy.
    """
    with torch.enable_grad():
        logp, h = logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()
        loss, importance = loss_of(objective.surrogate, logp, h, tokens), tokens.importance_weights
        if importance is not None:
            loss = loss * importance
        if objective.kl_coef != 0:
            kl = kl_estimate.reference(logp, tokens.ref_logprobs, objective.kl)
            if objective.kl_ratio:
                old = logp.detach() if tokens.old_logprobs is None else tokens.old_logprobs
                kl = kl_estimate.times_ratio(kl, logp - old)
            loss = loss + objective.kl_coef * kl
        if objective.entropy_coef != 0:
            loss = loss - objective.entropy_coef * h
        g, eta = torch.autograd.grad(loss.sum(), (logp, h), allow_unused=True)
    g = torch.zeros_like(logp) if g is None else g
    check_derivatives(objective.surrogate, (g, eta), [logprobs, entropies], importance, None)
    return g.detach(), eta
