"""The arithmetic of one token of a policy-gradient loss, line for line that of csrc/common/objective.h.

Every function returns the loss term and its derivative with respect to the token's log-prob l. Exponentials are
float64: they are few, and every device gives the same float32.
"""

import triton
import triton.language as tl

from r1kernels.triton.common import expm1

# Numbers of r1kernels.objectives; what is left is "reinforce".
CLIP, CISPO, SAPO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DPPO_TV, DPPO_KL, IPO, VESPO = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
SEQUENCE, SEQUENCE_PRODUCT = tl.constexpr(1), tl.constexpr(3)  # ratios


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
def binary_kl(logprob, old):
    """KL(Bernoulli(p_old) || Bernoulli(p)), from l and l_old, in float64: 1 - p cancels in float32."""
    p, p_old = tl.exp(logprob.to(tl.float64)), tl.exp(old.to(tl.float64))
    rest, rest_old = tl.where(p > 1, 0.0, 1.0 - p), 1.0 - p_old
    of_rest = tl.where(rest_old <= 0, 0.0, rest_old * (tl.log(tl.where(rest_old <= 0, 1.0, rest_old)) - tl.log(rest)))
    return (tl.where(p_old == 0, 0.0, p_old * (old - logprob).to(tl.float64)) + of_rest).to(tl.float32)


@triton.jit
def clip_term(ratio, advantage, clip_low, clip_high, ratio_cap):
    """-min(min(r, cap) A, clip(r, 1 - lo, 1 + hi) A); (loss, slope, clipped low, clipped high, capped)."""
    up = advantage > 0
    down = advantage < 0
    low_bound = 1.0 - single(clip_low)
    high_bound = 1.0 + single(clip_high)
    up_bound = tl.minimum(high_bound, single(ratio_cap))
    down_bound = tl.maximum(high_bound, single(ratio_cap))
    high = up & (ratio > up_bound)
    low = down & (ratio < low_bound)
    capped = down & ~low & (ratio > down_bound)
    bound = tl.where(high, up_bound, tl.where(low, low_bound, down_bound))
    clipped = high | low | capped
    slope = tl.where(clipped, 0.0, -ratio * advantage)
    return tl.where(clipped, -bound * advantage, -ratio * advantage), slope, low, high, capped


@triton.jit
def sapo_term(ratio, advantage, tau_pos, tau_neg):
    """-(4/tau) sigma(tau (r - 1)) A, whose slope is -4 sigma (1 - sigma) r A; (loss, slope)."""
    tau = tl.where(advantage > 0, single(tau_pos), single(tau_neg))
    x = tau * (ratio - 1.0)
    e = exponential(-tl.abs(x))
    sigma = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    bump = tl.where(e == 0, 0.0, e / ((1.0 + e) * (1.0 + e)) * ratio)  # sigma (1 - sigma) r, 0 at r = inf
    return -4.0 / tau * sigma * advantage, -4.0 * bump * advantage


@triton.jit
def shared_slope(surrogate, delta, advantage, clip_low, clip_high, ratio_cap, tau_pos, tau_neg):
    """The slope with respect to a sequence's log-ratio, of the surrogates whose ratio has a gradient."""
    ratio = exponential(delta)
    slope = clip_term(ratio, advantage, clip_low, clip_high, ratio_cap)[1]
    if surrogate == SAPO:
        slope = sapo_term(ratio, advantage, tau_pos, tau_neg)[1]
    return tl.where(advantage != 0, slope, 0.0)


@triton.jit
def surrogate_term(surrogate, delta, advantage, logprob, clip_low, clip_high, ratio_cap, tau_pos, tau_neg):
    """(loss, slope, clipped low, clipped high, capped) of a token; the slope is with respect to log r or l.

    Derivatives come from predicates, never from inf * 0: a clipped token whose ratio overflows has slope exactly 0, and
    a token with advantage 0 contributes exactly 0. On a bound the gradient flows, as in torch.clamp.
    """
    ratio = exponential(delta)
    up = advantage > 0
    moves = advantage != 0
    tau = tl.where(up, single(tau_pos), single(tau_neg))
    low_bound = 1.0 - single(clip_low)
    high_bound = 1.0 + single(clip_high)
    low = moves & False
    high = moves & False
    capped = moves & False
    if surrogate == CLIP:
        loss, slope, low, high, capped = clip_term(ratio, advantage, clip_low, clip_high, ratio_cap)
    elif surrogate == CISPO:  # -sg[clamp(r, 1 - lo, 1 + hi)] A l
        high = moves & (ratio > high_bound)
        low = moves & ~high & (ratio < low_bound)
        weight = tl.where(high, high_bound, tl.where(low, low_bound, ratio)) * advantage
        slope = -weight
        loss = tl.where(weight == 0, 0.0, -weight * logprob)
    elif surrogate == IPO:  # -r A + tau (log r)^2, the first 0 where p - p_old is beyond -lo or hi
        moved = exponential(logprob) - exponential(logprob - delta)
        high = moves & (moved > single(clip_high))
        low = moves & (moved < -single(clip_low))
        gain = tl.where(moves & ~high & ~low, ratio * advantage, 0.0)
        pull = tl.where(tau == 0, 0.0, tau * delta)
        slope = 2.0 * pull - gain
        loss = tl.where(pull == 0, 0.0, pull * delta) - gain
        moves = moves | True
    elif (surrogate == DPPO_TV) | (surrogate == DPPO_KL):
        # -sg[min(r, cap)] A l, 0 where the policy moved beyond a bound in the direction of A
        old = logprob - delta
        moved = exponential(logprob) - exponential(old)
        high = moves & up & (moved > 0)
        low = moves & ~up & (moved < 0)
        size = tl.abs(moved)
        if surrogate == DPPO_KL:
            size = binary_kl(logprob, old)
        high = high & (size > single(clip_high))
        low = low & (size > single(clip_low))
        capped = moves & ~high & ~low & (ratio > single(ratio_cap))
        weight = tl.where(high | low, 0.0, tl.where(capped, single(ratio_cap), ratio) * advantage)
        slope = -weight
        loss = tl.where(weight == 0, 0.0, -weight * logprob)
    elif surrogate == VESPO:  # -sg[phi(w)] A l, log phi = tau + k log w - tau w; the bounds' places have the powers
        power = tl.where(up, single(clip_high), single(clip_low)).to(tl.float64)
        log_w = tl.where(delta > 20.0, 20.0, tl.where(delta < -18.420680743952367, -18.420680743952367, delta))
        log_w = log_w.to(tl.float64)
        weight = tl.exp(tau + power * log_w - tau * tl.exp(log_w)).to(tl.float32) * advantage
        slope = -weight
        loss = tl.where(weight == 0, 0.0, -weight * logprob)
    elif surrogate == SAPO:
        loss, slope = sapo_term(ratio, advantage, tau_pos, tau_neg)
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


@triton.jit
def kl_ratio_slope(estimator, d):
    """k + dk/dl, the slope of r k over r, without the cancellation of e^d."""
    return tl.where(estimator == 1, 1.0 - d, tl.where(estimator == 2, d * (0.5 * d - 1.0), -d))
