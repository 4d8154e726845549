r"""Per-token estimators of KL(pi || pi_ref) from the log-probs of tokens sampled from pi.

With d = l_ref - l:   k1 = -d,   k2 = d^2 / 2,   k3 = e^d - d - 1   (Schulman, "Approximating KL divergence").

As values, k1 and k3 are unbiased. As terms of a loss, their expected gradients are (by exact enumeration over the
vocabulary): 0 for k1, the gradient of KL(pi || ref) for k2, and the gradient of KL(ref || pi) for k3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from r1kernels import _dispatch
from r1kernels.objectives import KL_ESTIMATORS
from r1kernels.ops._autograd import differentiable_once, origin_of
from r1kernels.ops._checks import accumulator_dtype, check_floating, check_shape


def reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """The estimate in plain differentiable PyTorch, in the dtype of its inputs."""
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    # e^d - 1 - d cancels near 0; its series does not. Each branch stays finite where the other one is used.
    small = d.abs() < 0.5
    near = torch.where(small, d, 0)
    order = 16 if d.dtype == torch.float64 else 10  # the next term at 1/2 is below one rounding
    series = torch.full_like(d, 1 / math.factorial(order))
    for n in range(order - 1, 1, -1):
        series = series * near + 1 / math.factorial(n)
    far = torch.where(small, 1, d)
    exact = torch.expm1(far) - far
    return torch.where(small, series * near.square(), exact)


def times_ratio(kl: Tensor, log_ratio: Tensor) -> Tensor:
    """r k, and 0 where k is 0 even if r overflows."""
    return kl * torch.where(kl == 0, log_ratio.clamp(max=80), log_ratio).exp()


class _KlEstimate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, ref_logprobs: Tensor, estimator: int, origin: Tensor | None
    ) -> Tensor:
        kl, slope = torch.ops.r1kernels.kl_estimate.default(logprobs, ref_logprobs, estimator)
        ctx.save_for_backward(slope, origin)
        return kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, _ = ctx.saved_tensors
        grad_logprobs = grad * slope
        return grad_logprobs, -grad_logprobs, None, None  # the estimate depends only on the difference


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    r"""Per-token estimate of KL(pi || pi_ref) on tokens sampled from pi.

        d = ref_logprobs - logprobs;  "k1": -d,  "k2": d^2/2,  "k3": e^d - d - 1 (accurate also where d is tiny)

    In a loss, the expected gradient of "k1" is 0 (it regularises nothing), "k2" has the gradient of KL(pi || ref), and
    "k3" has the gradient of KL(ref || pi).

    Args:
        logprobs, ref_logprobs: (...), same shape and device, float; computed in float32 (float64 if given so).
        estimator: "k1", "k2" or "k3".

    Returns:
        (...), float32, nats; differentiable once with respect to both inputs.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes or devices differ, unknown estimator.

    Memory: 8 bytes a token.

    Equivalent to: `(d.exp() - d - 1)` for k3. Source: http://joschu.net/blog/kl-approx.html
    """
    check_floating("logprobs", logprobs)
    check_floating("ref_logprobs", ref_logprobs, logprobs)
    check_shape("ref_logprobs", ref_logprobs, logprobs.shape, "the shape of logprobs")
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(KL_ESTIMATORS)}")
    if _dispatch.select(logprobs) == "reference":
        dtype = accumulator_dtype(logprobs.dtype)
        return reference(logprobs.to(dtype), ref_logprobs.to(dtype), estimator)
    return _KlEstimate.apply(
        logprobs.float().contiguous(), ref_logprobs.float().contiguous(), KL_ESTIMATORS.index(estimator) + 1,
        origin_of(logprobs, ref_logprobs),
    )
