"""The arithmetic of one token of a policy-gradient loss, line for line that of csrc/common/objective.h.

Every function returns the loss term and its derivative with respect to the token's log-prob l. Exponentials are
float64: they are few, and every device gives the same float32.
"""

import triton
import triton.language as tl

from r1kernels.triton.common import expm1

# Numbers of r1kernels.objectives; what is left is "reinforce".
CLIP, CISPO, SAPO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def single(value):
    """A number given to the kernel (a Python float under the interpreter) as a float32 scalar."""
    return tl.full((), value, tl.float32)


@triton.jit
def exponential(x):
    """e^x of float32 as rounded from float64: overflows to inf, underflows through subnormal numbers to 0."""
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@triton.jit
def product(factor, value):
    """factor * value in float64, and 0 where either is: 0 * inf is 0."""
    return tl.where(factor == 0, 0.0, tl.where(value == 0, 0.0, factor * value.to(tl.float64)))


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def surrogate_term(surrogate, ratio, advantage, logprob, clip_low, clip_high, ratio_cap, tau_pos, tau_neg):
    """(loss, slope, clipped low, clipped high, capped) of a token; the slope is with respect to log r or l.

    Derivatives come from predicates, never from inf * 0: a clipped token whose ratio overflows has slope exactly 0, and
    a token with advantage 0 contributes exactly 0. On a bound the gradient flows, as in torch.clamp.
    """
    up = advantage > 0
    moves = advantage != 0
    low_bound = 1.0 - single(clip_low)
    high_bound = 1.0 + single(clip_high)
    low = moves & False
    high = moves & False
    capped = moves & False
    if surrogate == CLIP:  # -min(min(r, cap) A, clip(r, 1 - lo, 1 + hi) A)
        high = moves & up & (ratio > high_bound)
        low = moves & ~up & (ratio < low_bound)
        capped = moves & ~up & ~low & (ratio > single(ratio_cap))
        bound = tl.where(high, high_bound, tl.where(low, low_bound, single(ratio_cap)))
        clipped = high | low | capped
        slope = tl.where(clipped, 0.0, -ratio * advantage)
        loss = tl.where(clipped, -bound * advantage, -ratio * advantage)
    elif surrogate == CISPO:  # -sg[min(r, 1 + hi)] A l
        high = moves & (ratio > high_bound)
        weight = tl.where(high, high_bound, ratio) * advantage
        slope = -weight
        loss = tl.where(weight == 0, 0.0, -weight * logprob)
    elif surrogate == SAPO:  # -(4/tau) sigma(tau (r - 1)) A, whose slope is -4 sigma (1 - sigma) r A
        tau = tl.where(up, single(tau_pos), single(tau_neg))
        x = tau * (ratio - 1.0)
        e = exponential(-tl.abs(x))
        sigma = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        bump = tl.where(e == 0, 0.0, e / ((1.0 + e) * (1.0 + e)) * ratio)  # sigma (1 - sigma) r, 0 at r = inf
        slope = -4.0 * bump * advantage
        loss = -4.0 / tau * sigma * advantage
    else:  # -A l
        slope = -advantage
        loss = -advantage * logprob
    return tl.where(moves, loss, 0.0), tl.where(moves, slope, 0.0), low, high, capped


@triton.jit
def kl_term(estimator, d):
    """The estimate at d = l_ref - l and its derivative with respect to l."""
    em1 = tl.exp(d.to(tl.float64)) - 1.0
    # e^d - 1 - d cancels for small d; its series does not (terms beyond d^9 are below one rounding at 1/2).
    series = d * d * (
        1 / 2.0 + d * (1 / 6.0 + d * (1 / 24.0 + d * (1 / 120.0 + d * (1 / 720.0 + d * (
            1 / 5040.0 + d * (1 / 40320.0 + d / 362880.0))))))
    )
    small = tl.abs(d) < 0.5
    k3 = tl.where(small, series, (em1 - d.to(tl.float64)).to(tl.float32))
    slope = tl.where(small, -expm1(d, tl.exp(d)), -em1.to(tl.float32))
    value = tl.where(estimator == 1, -d, tl.where(estimator == 2, 0.5 * d * d, k3))
    return value, tl.where(estimator == 1, 1.0, tl.where(estimator == 2, -d, slope))
