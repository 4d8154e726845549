"""One entry of the vocabulary in the divergence of student p and teacher q, in float32 without cancellation.

With d = log q_j - log p_j an entry is described by the larger of the two probabilities and by t = e^{-|d|}: every sum
is made of terms >= 0 and every difference of probabilities is big (1 - t), however close p and q are. Powers of 2 are
a polynomial times a shift, for the hardware's approximation has no 1 - t near 1: on a GPU as in the interpreter they
are good to a unit in the last place, and only the quotients of jsd (2 units) are coarser there.

That takes 80 instructions an entry for a KL and 110 more for jsd. For 16-bit logits, whose kernels are to keep up with
a memory that is twice as fast for them, `divergence_fast` has formulas in a third of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import LN2, LOG2E, difference_error, product_error

# What a row's entries need to know of it, in float32, as `store_constants` lays it out and `load_constants` reads it.
CONSTANTS = tl.constexpr(16)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def store_constants(constants, n, keep, lse_student, lse_teacher, temperature, beta, inner, factor, inv_softcap):
    """Rows n, where `keep`: everything is rounded once from float64, with what that lost where it matters."""
    at = constants + n * CONSTANTS
    scale = 1.0 / temperature * LOG2E
    _store_pair(at, keep, scale, 1.0)
    tl.store(at + 2, (-126.0 / scale).to(tl.float32), mask=keep)  # below this difference a power counts as 0
    tl.store(at + 3, (1.0 / temperature).to(tl.float32), mask=keep)
    _store_pair(at + 4, keep, (lse_teacher - lse_student) * temperature, 1.0)
    # log p = (x - anchor)/T + rest, as an exponent of 2: the anchor is lse T rounded.
    _store_pair(at + 6, keep, lse_student * temperature, -scale)
    _store_pair(at + 8, keep, lse_teacher * temperature, -scale)
    tl.store(at + 10, beta.to(tl.float32), mask=keep)
    tl.store(at + 11, (1.0 - beta).to(tl.float32), mask=keep)
    tl.store(at + 12, inner.to(tl.float32), mask=keep)
    tl.store(at + 13, factor.to(tl.float32), mask=keep)
    tl.store(at + 14, inv_softcap.to(tl.float32), mask=keep)


@triton.jit
def _store_pair(at, keep, exact, slope):
    rounded = exact.to(tl.float32)
    tl.store(at, rounded, mask=keep)
    tl.store(at + 1, ((exact - rounded.to(tl.float64)) * slope).to(tl.float32), mask=keep)


@triton.jit
def load_constants(constants, n, swapped):
    """(scale, its rest, underflow limit, 1/T, gap, its rest, student's anchor, rest, teacher's anchor, rest).

    With `swapped`, 1 or 0, student and teacher have changed places.
    """
    at = constants + n * CONSTANTS
    sign = 1.0 - 2.0 * swapped
    first, second = at + 6 + 2 * swapped, at + 8 - 2 * swapped
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4) * sign, tl.load(at + 5) * sign,
        tl.load(first), tl.load(first + 1), tl.load(second), tl.load(second + 1),
    )


@triton.jit
def _exp2_scaled(d, scale, scale_rest, limit, extra):
    """2^(d (scale + scale_rest) + extra) as power (1 + fraction), and where it counts as 0; extra is small."""
    shifted = d * scale + _MAGIC
    n = shifted - _MAGIC
    r = product_error(d, scale, n) + (d * scale_rest + extra)
    p = r * 1.5353362e-4 + 1.33988744e-3  # minimax of (2^r - 1) / r on [-0.5, 0.5]: 2e-9 of 2^r
    p = p * r + 9.61843736e-3
    p = p * r + 5.55033247e-2
    p = p * r + 2.40226479e-1
    p = p * r + 6.93147203e-1
    power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return p * r, power, d < limit


@triton.jit
def _lost(a, b, difference):
    """`difference_error`, and 0 where that is inf - inf."""
    lost = difference_error(a, b, difference)
    return tl.where(lost == lost, lost, 0.0)


@triton.jit
def entry_of(x, y, row):
    """Of both logits: whether q is the larger, max(p, q), t = min / max, 1 - t, |d|, and whether both are 0."""
    scale, scale_rest, limit, slope, gap, gap_rest, anchor_p, rest_p, anchor_q, rest_q = row
    difference = y - x
    d = difference - gap
    lost = _lost(difference, gap, d) + (_lost(y, x, difference) - gap_rest)
    total = d + lost  # d T
    rest = (d - total) + lost
    rest = tl.where(rest == rest, rest, 0.0)  # inf - inf
    q_is_big = total >= 0
    far = tl.where(q_is_big, -total, total)
    extra = tl.where(q_is_big, -rest, rest) * scale
    fraction, power, underflow = _exp2_scaled(far, scale, scale_rest, limit, extra)
    t = tl.where(underflow, 0.0, fraction * power + power)
    one_minus = tl.where(underflow, 1.0, (1.0 - power) - fraction * power)

    logit = tl.where(q_is_big, y, x)
    anchor = tl.where(q_is_big, anchor_q, anchor_p)
    from_anchor = logit - anchor
    extra = _lost(logit, anchor, from_anchor) * scale + tl.where(q_is_big, rest_q, rest_p)
    fraction, power, dead = _exp2_scaled(from_anchor, scale, scale_rest, limit, extra)
    big = tl.where(dead, 0.0, fraction * power + power)
    return q_is_big, big, t, one_minus, -far * slope, dead


@triton.jit
def kl_term(entry):
    """a log(a / o) - a + o >= 0, the term of KL(a||o) for a = q and o = p."""
    a_is_big, big, t, one_minus, distance, dead = entry
    d = tl.where(a_is_big, distance, -distance)
    p = d * 2.4922436e-5 - 1.9962174e-4  # minimax of (e^{-d} + d - 1) / d^2 on [-0.5, 0.5]: 4e-10
    p = p * d + 1.3888738e-3
    p = p * d - 8.333182e-3
    p = p * d + 4.1666668e-2
    p = p * d - 1.6666667e-1
    p = p * d + 0.5
    near = tl.where(a_is_big, 1.0, t) * (d * d * p)
    small = tl.where(t == 0, 0.0, t * distance)  # 0 * inf = 0
    far = tl.where(a_is_big, distance - one_minus, one_minus - small)
    term = big * tl.where(distance < 0.5, near, far)
    # Underflow makes a probability 0, but one that is not -inf against one that is stays infinitely far from it.
    return tl.where(dead, tl.where(a_is_big & (distance == _INFINITY), _INFINITY, 0.0), term)


@triton.jit
def _log1p(f, one_plus):
    """log(1 + f), and f - log(1 + f) >= 0 without cancellation; `one_plus` is 1 + f rounded once, and > 0."""
    # one_plus = 2^e m with m in [sqrt(1/2), sqrt(2)).
    bits = one_plus.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    e = exponent.to(tl.float32)
    near_one = exponent == 0
    x = tl.where(near_one, f, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    p = x * -0.06770003 + 0.11558942  # minimax of (x - log(1 + x)) / x^2 on that interval: 5e-9
    p = p * x - 0.11812596
    p = p * x + 0.12420613
    p = p * x - 0.14232242
    p = p * x + 0.16667543
    p = p * x - 0.2000145
    p = p * x + 0.25000012
    p = p * x - 0.33333322
    p = p * x + 0.5
    square = x * x * p
    # log 2 in two floats: products of the first with an exponent are exact.
    log = e * 0.693145752 + (x - (square - e * 1.42860677e-6))
    log = tl.where(one_plus < _INFINITY, log, one_plus)  # inf and NaN
    # f - log(1 + f) = square + what the change from f to x leaves, small beside it for the powers next to 1.
    gap = tl.where(exponent == 1, square + (one_plus * 0.5 - LN2), f - log)
    gap = tl.where(exponent == -1, square + ((LN2 - 1.0) - f), gap)
    return log, tl.where(near_one, square, gap)


@triton.jit
def jsd_terms(entry, weight_q, weight_p):
    """The terms of KL(p||m) and of KL(q||m) with m = weight_q q + weight_p p."""
    q_is_big, big, t, one_minus, _, dead = entry
    of_big = tl.where(q_is_big, weight_q, weight_p)
    of_small = tl.where(q_is_big, weight_p, weight_q)
    # log(m / big) and log(m / small), which is infinite where the smaller probability is 0.
    _, big_gap = _log1p(-of_small * one_minus, of_big + of_small * t)
    _, small_gap = _log1p(of_big * one_minus / t, of_big / t + of_small)
    big_term = big * big_gap
    # small (m / small - 1) alone is left where the logarithm's part of the gap is rounded away.
    small_term = tl.where(t < 2.0**-60, big * of_big, big * t * small_gap)
    student = tl.where(q_is_big, small_term, big_term)
    teacher = tl.where(q_is_big, big_term, small_term)
    return tl.where(dead, 0.0, student), tl.where(dead, 0.0, teacher)


@triton.jit
def gradient_of(x, y, row, inner, factor, weight_q, weight_p, kind):
    """dD/dx_j times `factor`, which holds 1/T and for jsd 1 - beta."""
    entry = entry_of(x, y, row)
    q_is_big, big, t, one_minus, distance, dead = entry
    if kind == 0:  # p_j - q_j
        difference = big * one_minus
        grad = factor * tl.where(q_is_big, -difference, difference)
    else:  # p_j (log(p_j / q_j) - KL(p||q)), or the same with m for q
        if kind == 1:
            log_ratio = tl.where(q_is_big, -distance, distance)
        else:
            # log(m / p): p is the smaller of the two, or the larger.
            one_plus = tl.where(q_is_big, weight_q / t + weight_p, weight_p + weight_q * t)
            f = weight_q * one_minus
            log_m, _ = _log1p(tl.where(q_is_big, f / t, -f), one_plus)
            log_ratio = -log_m
        p = big * tl.where(q_is_big, t, 1.0)
        grad = tl.where(p == 0, 0.0, factor * (p * (log_ratio - inner)))  # 0 * inf = 0
    return tl.where(dead, 0.0, grad)
