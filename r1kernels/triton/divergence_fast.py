"""One entry of the vocabulary in the divergence of 16-bit rows, in few instructions.

Exponentials and logarithms are the hardware's: 2^-22 of their result, or absolutely next to 1. They therefore never
stand where they cancel: next to p = q every term is a polynomial's, of second order in r = log(q / p), and r comes
from the difference of the logits. An error common to all of a row's r counts squared, for p - q sums to 0. Gradients
are of first order and rounded to 16 bits: nothing cancels in them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import LN2, LOG2E, UPCAST, log2, product_error, reciprocal

# A sign is a subtraction from 0 to Triton, an instruction more.
_MINUS_LOG2E = tl.constexpr(-1.4426950408889634)
_MINUS_LN2 = tl.constexpr(-0.6931471805599453)


@triton.jit
def fast_constants(row):
    """Of what `load_constants` gives: (log2(e)/T, 1/T, gap/T and its rest, the anchors and their rests)."""
    scale, _, _, slope, gap, gap_rest, anchor_a, rest_a, anchor_b, rest_b = row
    product = gap * slope
    rest = product_error(gap, slope, product) + gap_rest * slope
    return scale, slope, product, rest, anchor_a, rest_a, anchor_b, rest_b


@triton.jit
def _at_least(x, low):
    """The larger of both, `low` for a NaN; the interpreter's maximum would be NaN."""
    if UPCAST:
        return tl.where(x > low, x, low)
    else:
        return tl.maximum(x, low)


@triton.jit
def _at_most(x, high):
    """The smaller of both, `high` for a NaN."""
    if UPCAST:
        return tl.where(x < high, x, high)
    else:
        return tl.minimum(x, high)


@triton.jit
def _log_ratio(x, y, row):
    """log(b / a) of the entries x of row a and y of row b; NaN where both are -inf."""
    _, slope, gap, gap_rest, _, _, _, _ = row
    return ((y - x) * slope - gap) - gap_rest


@triton.jit
def _exponents(x, y, row):
    """log2 a and log2 b."""
    scale, _, _, _, anchor_a, rest_a, anchor_b, rest_b = row
    return (x - anchor_a) * scale + rest_a, (y - anchor_b) * scale + rest_b


@triton.jit
def kl_fast(x, y, row):
    """b log(b/a) - b + a >= 0, the term of KL(b||a); a few 1e-36 below 0 where b or both are 0."""
    r = _at_least(_log_ratio(x, y, row), -100.0)  # below, the term is a
    log_a, log_b = _exponents(x, y, row)
    a = tl.exp2(log_a)
    b = tl.exp2(tl.maximum(log_b, -126.0))  # not 0: times a ratio that is infinite it is infinite
    p = r * -2.78146217e-6 + 2.56678377e-5  # minimax of (e^-r + r - 1) / r^2 on [-1.25, 1.25]: 7e-8
    p = p * r - 1.98480469e-4
    p = p * r + 1.38805097e-3
    p = p * r - 8.33324529e-3
    p = p * r + 4.1666925e-2
    p = p * r - 1.66666687e-1
    p = p * r + 0.5
    near = b * (r * r * p)
    far = b * (r - 1.0) + a
    return tl.where(tl.abs(r) < 1.25, near, far)


@triton.jit
def _atanh_rest(z):
    """(2 atanh(s) - 2 s) / s^3 for z = s^2 <= 1/9: minimax, 4e-7."""
    return ((z * 2.68610239e-1 + 2.82350421e-1) * z + 4.0007627e-1) * z + 6.66666389e-1


@triton.jit
def jsd_fast(x, y, row, weight_q, weight_p, NVIDIA: tl.constexpr):
    """The terms of KL(p||m) and of KL(q||m) with m = weight_q q + weight_p p.

    In units of the larger of the two, t = e^{-|r|} is the smaller. log(m / big) = log(1 - f) = -2 atanh(s) with
    s = f / (2 - f), so the larger one's term, -f - log(1 - f), is s (f + s^2 R(s^2)), in which nothing cancels; the
    smaller one's likewise.
    """
    r = _log_ratio(x, y, row)
    log_p, log_q = _exponents(x, y, row)
    big = tl.exp2(tl.maximum(log_p, log_q))
    q_is_big = r >= 0
    r = _at_most(tl.abs(r), 1e30)  # NaN as well, where big is 0
    t = tl.exp2(r * _MINUS_LOG2E)
    p = r * 7.05719134e-3 - 4.12294194e-2  # minimax of (1 - e^-r) / r on [0, 0.4]: 6e-8
    p = p * r + 1.66604325e-1
    p = p * r - 4.99996841e-1
    p = p * r + 1.0
    one_minus = tl.where(r < 0.4, r * p, 1.0 - t)
    f = tl.where(q_is_big, weight_p, weight_q) * one_minus
    g = tl.where(q_is_big, weight_q, weight_p) * one_minus  # m - small
    m = 1.0 - f

    s = f * reciprocal(2.0 - f, NVIDIA)
    z = s * s
    near = s * (f + z * _atanh_rest(z))
    of_big = tl.where(f < 0.5, near, log2(m, NVIDIA) * _MINUS_LN2 - f)
    u = g * reciprocal(m + t, NVIDIA)
    z = u * u
    near = u * (g - t * z * _atanh_rest(z))
    of_small = tl.where(u < 1 / 3, near, g - t * ((r - f) - of_big))
    student = tl.where(q_is_big, of_small, of_big)
    teacher = tl.where(q_is_big, of_big, of_small)
    return big * student, big * teacher


@triton.jit
def gradient_fast(x, y, row, inner, factor, weight_q, weight_p, kind, NVIDIA: tl.constexpr):
    """dD/dx_j times `factor`, which holds 1/T and for jsd 1 - beta."""
    log_p, log_q = _exponents(x, y, row)
    p = tl.exp2(log_p)
    minus = -factor
    if kind == 0:  # p_j - q_j
        grad = factor * (p - tl.exp2(log_q))
    else:  # -p_j (log(q_j / p_j) + KL(p||q)), or the same with m for q
        r = _log_ratio(x, y, row)
        if kind == 1:
            # An infinite ratio meets a p of 0: where it does not, the divergence is infinite and the factor 0.
            log_m = _at_most(r, 1e30)
        else:
            power = _at_most(r * LOG2E, 126.0)
            log_m = log2(weight_q * tl.exp2(power) + weight_p, NVIDIA) * LN2
        grad = (minus * p) * (log_m + inner)
    return grad
