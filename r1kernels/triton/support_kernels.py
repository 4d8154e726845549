"""The kernels of sets of ids: products of entries, their gradients, and the statistics of a set."""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import kernel, only_if, rounded


@kernel
def products_kernel(
    hidden, hidden_stride: tl.int64, weight, weight_stride: tl.int64, starts, entries, tokens, values,
    accumulate: tl.int64, width: tl.int64, vocab: tl.int64, parts: tl.int64, ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """values[entry] = or += hidden[token] . weight[id]: `parts` programs share the entries of an id."""
    id = tl.program_id(0).to(tl.int64) // parts
    part = tl.program_id(0).to(tl.int64) % parts
    begin, end = tl.load(starts + id), tl.load(starts + id + 1)
    cols = tl.arange(0, COLUMNS)
    for first in range(begin + part * ENTRIES, end, parts * ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        here = at < end
        token = tl.load(tokens + at, mask=here, other=0).to(tl.int64)
        total = tl.zeros((ENTRIES,), tl.float32)
        for column in range(0, width, COLUMNS):
            inside = column + cols < width
            w = tl.load(weight + id * weight_stride + column + cols, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(hidden + token[:, None] * hidden_stride + column + cols[None, :],
                        mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(h * w[None, :], 1)
        out = values + tl.load(entries + at, mask=here, other=0)
        if accumulate != 0:
            total += tl.load(out, mask=here, other=0.0)
        tl.store(out, total, mask=here)


@kernel
def grad_hidden_kernel(
    values, ids, begins, weight, weight_stride: tl.int64, out, width: tl.int64, vocab: tl.int64,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):
    """out[token] += sum of values[entry] weight[id] over the entries of a token, in the order of its set."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    begin, end = tl.load(begins + token), tl.load(begins + token + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        id = tl.load(ids + at, mask=at < end, other=-1).to(tl.int64)
        here = (id >= 0) & (id < vocab)  # those of ids that a set has twice are beyond
        value = tl.load(values + at, mask=here, other=0.0)
        here = here & (value != 0)
        rows = tl.load(weight + id[:, None] * weight_stride + columns[None, :], mask=here[:, None] & inside[None, :],
                       other=0.0).to(tl.float32)
        total += tl.sum(tl.where(here, value, 0.0)[:, None] * rows, 0)
    to = out + token * width + columns
    tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


@kernel
def grad_weight_kernel(
    values, starts, entries, tokens, hidden, hidden_stride: tl.int64, out, accumulate: tl.int64, width: tl.int64,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):
    """out[id] = or += sum of values[entry] hidden[token] over the entries of an id, by ascending token."""
    id = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    begin, end = tl.load(starts + id), tl.load(starts + id + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        here = at < end
        token = tl.load(tokens + at, mask=here, other=0).to(tl.int64)
        value = tl.load(values + tl.load(entries + at, mask=here, other=0), mask=here, other=0.0)
        here = here & (value != 0)
        rows = tl.load(hidden + token[:, None] * hidden_stride + columns[None, :],
                       mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.where(here, value, 0.0)[:, None] * rows, 0)
    to = out + id * width + columns
    if accumulate != 0:
        total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _temperature(temperature, temperatures, many, n):
    factor = tl.load(temperatures + n, mask=many != 0, other=1.0).to(tl.float64)
    return tl.full((), temperature, tl.float64) * factor


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, which keeps the digits of a small x."""
    return tl.where(x < 1e-5, x - 0.5 * x * x, tl.log(1.0 + x))


@kernel
def stats_kernel(
    values, offsets, targets, mask, masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, logprobs,
    lse, entropy, BLOCK: tl.constexpr,
):
    """Log-prob, log-sum-exp and entropy of one set, in float64: sets are short."""
    n = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    keep = (tl.load(mask + n, mask=masked != 0, other=1) != 0) & (begin < end)
    end = tl.where(keep, end, begin)
    t = _temperature(temperature, temperatures, many, n)
    target = begin + tl.load(targets + n)
    top = tl.full((), float("-inf"), tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < end, other=float("-inf")).to(tl.float64)
        top = tl.maximum(top, tl.max(x, 0), propagate_nan=tl.PropagateNan.ALL)
    rest = tl.zeros((), tl.float64)
    weighted = tl.zeros((), tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < end, other=float("-inf")).to(tl.float64)
        d = (x - top) / t
        e = tl.where(at < end, tl.exp(d), 0.0)
        rest += tl.sum(tl.where(at == target, 0.0, e), 0)
        weighted += tl.sum(tl.where(e == 0, 0.0, e * d), 0)
    own = tl.load(values + target, mask=keep, other=0.0).to(tl.float64)
    ahead = (own - top) / t
    mine = tl.exp(ahead)
    # Where the token is on top, the sum is 1 and the rest, and its log-prob keeps the digits of the rest.
    log_total = tl.where(ahead == 0, _log1p(rest), tl.log(rest + mine))
    tl.store(logprobs + n, tl.where(keep, ahead - log_total, 0.0).to(tl.float32))
    tl.store(lse + n, tl.where(keep, top / t + log_total, 0.0))
    tl.store(entropy + n, tl.where(keep, log_total - weighted / (rest + mine), 0.0))


@kernel
def gradient_kernel(
    values, offsets, targets, lse, entropy, grad_logprobs, has_g: tl.int64, grad_entropy, has_eta: tl.int64,
    temperatures, many: tl.int64, temperature: tl.float64, softcap: tl.float64, out, BLOCK: tl.constexpr,
):
    """dL/dx of the entries of one set, in float64."""
    n = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    g = tl.load(grad_logprobs + n, mask=has_g != 0, other=0.0).to(tl.float64)
    eta = tl.load(grad_entropy + n, mask=has_eta != 0, other=0.0).to(tl.float64)
    active = (g != 0) | (eta != 0)
    t = _temperature(temperature, temperatures, many, n)
    target = begin + tl.load(targets + n)
    row_lse, row_entropy = tl.load(lse + n), tl.load(entropy + n)
    cap = tl.full((), softcap, tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        x = tl.load(values + at, mask=only_if(active.to(tl.int64), inside), other=0.0).to(tl.float64)
        log_p = x / t - row_lse
        log_p = tl.where(at == target, tl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL), log_p)
        p = tl.exp(log_p)
        below = tl.where(tl.abs(log_p) < 1e-5, log_p + 0.5 * log_p * log_p, p - 1.0)
        finite = tl.where(p == 0, 0.0, log_p)
        grad = -g * tl.where(at == target, below, p) - eta * p * (finite + row_entropy)
        if softcap > 0:
            grad *= (1.0 - x / cap) * (1.0 + x / cap)
        tl.store(out + at, tl.where(active, grad / t, 0.0).to(tl.float32), mask=inside)
