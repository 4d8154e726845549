"""Kernels of the token statistics: a segment of a row to four float32 numbers, and the merge of a row's segments.

A thread keeps the sums of the entries that it reads: `VEC` neighbours, 16 bytes, of each of `UNROLL` vectors of a tile.
Which entries these are, and the order of the sums, depend on the tile alone, not on how the row lies in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import (
    ALIGNED,
    LN2,
    LOG2E,
    LOWEST,
    UNIT_STRIDE,
    checking_kernel,
    difference_error,
    entries,
    fma,
    kernel,
    product_error,
    row_offset,
    wide,
    widened,
    word_entries,
)

# ---- the entries of a tile (THREADS, VEC * UNROLL) ---------------------------------------------------------
#
# Shapes decide which thread has which entry. Loads are of (THREADS, VEC) in vectors, or of (THREADS,): the compiler
# can only give a row of either to one thread, and joins of tensors stay in a thread.


@triton.jit
def columns(THREADS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr):
    """Where the entries of a tile are, seen from its first: vector u of a thread is THREADS * VEC after u - 1."""
    entry = tl.arange(0, VEC * UNROLL)[None, :]
    first = tl.arange(0, THREADS)[:, None] * VEC
    return first + entry // UNROLL + entry % UNROLL * (THREADS * VEC)


@triton.jit
def _joined(a, b, c, d, UNROLL: tl.constexpr):
    """The entries of up to four vectors, those of one place in the vectors next to each other."""
    if UNROLL == 4:
        x = tl.join(tl.join(a, c), tl.join(b, d))
    elif UNROLL == 2:
        x = tl.join(a, b)
    else:
        x = a
    return tl.reshape(x, (a.shape[0], a.shape[1] * UNROLL))


@triton.jit
def _vectors(start, at, left, THREADS: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr):
    """float32 of a vector for each thread; with MASKED -inf beyond `left` entries, which are whole vectors."""
    first = tl.arange(0, THREADS)[:, None] * VEC
    if start.dtype.element_ty == tl.bfloat16:
        pointers = word_entries(start, at, first // 2 + tl.arange(0, VEC // 2)[None, :])
        if MASKED:
            words = tl.load(pointers, mask=first < left, other=-8323200)  # 0xff80 twice: -inf
        else:
            words = tl.load(pointers)
        x = widened(words)
    else:
        pointers = entries(start, at, first + tl.arange(0, VEC)[None, :], 1, ALIGNED)
        if MASKED:
            x = tl.load(pointers, mask=first < left, other=float("-inf")).to(tl.float32)
        else:
            x = tl.load(pointers).to(tl.float32)
    return x


@triton.jit
def _single(
    start, at, k: tl.constexpr, stride, left, THREADS: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Entry k of each thread's vector."""
    entry = tl.arange(0, THREADS) * VEC + k
    if UNIT:
        pointers = start + at + entry
    else:
        pointers = start + (at + tl.arange(0, THREADS) * VEC).to(tl.int64) * stride + k * stride
    if MASKED:
        return tl.load(pointers, mask=entry < left, other=float("-inf")).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def _singles(
    start, at, stride, left, THREADS: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr
):
    """The same entries as `_vectors`, one by one."""
    even = tl.join(
        _single(start, at, 0, stride, left, THREADS, VEC, UNIT, MASKED),
        _single(start, at, VEC // 2, stride, left, THREADS, VEC, UNIT, MASKED),
    )
    odd = tl.join(
        _single(start, at, 1, stride, left, THREADS, VEC, UNIT, MASKED),
        _single(start, at, VEC // 2 + 1, stride, left, THREADS, VEC, UNIT, MASKED),
    )
    if VEC == 8:
        even = tl.join(even, tl.join(
            _single(start, at, 2, stride, left, THREADS, VEC, UNIT, MASKED),
            _single(start, at, 6, stride, left, THREADS, VEC, UNIT, MASKED),
        ))
        odd = tl.join(odd, tl.join(
            _single(start, at, 3, stride, left, THREADS, VEC, UNIT, MASKED),
            _single(start, at, 7, stride, left, THREADS, VEC, UNIT, MASKED),
        ))
    return tl.reshape(tl.join(even, odd), (THREADS, VEC))


@triton.jit
def _part(
    start, at, stride, left, THREADS: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, MASKED: tl.constexpr
):
    """A vector of each thread from entry `at` on; with MASKED `left` entries of the row are from there on."""
    if LAYOUT == ALIGNED:
        if MASKED:
            if left % VEC == 0:
                x = _vectors(start, at, left, THREADS, VEC, MASKED)
            else:
                x = _singles(start, at, stride, left, THREADS, VEC, True, MASKED)
        else:
            x = _vectors(start, at, left, THREADS, VEC, MASKED)
    else:
        x = _singles(start, at, stride, left, THREADS, VEC, LAYOUT == UNIT_STRIDE, MASKED)
    return x


@triton.jit
def load_tile(
    start, at, stride, left, THREADS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """float32 of the entries from `at` on, a multiple of VEC; with MASKED only `left` are there, and -inf beyond."""
    STEP: tl.constexpr = THREADS * VEC
    a = _part(start, at, stride, left, THREADS, VEC, LAYOUT, MASKED)
    b, c, d = a, a, a
    if UNROLL >= 2:
        b = _part(start, at + STEP, stride, left - STEP, THREADS, VEC, LAYOUT, MASKED)
    if UNROLL == 4:
        c = _part(start, at + 2 * STEP, stride, left - 2 * STEP, THREADS, VEC, LAYOUT, MASKED)
        d = _part(start, at + 3 * STEP, stride, left - 3 * STEP, THREADS, VEC, LAYOUT, MASKED)
    return _joined(a, b, c, d, UNROLL)


# ---- a thread's sums ---------------------------------------------------------------------------------------


@triton.jit
def exp2_of_product(d, c, c_rest, lost):
    """2^(d (c + c_rest) + lost) with a small `lost`, and with what rounding d c loses."""
    power = d * c
    lost += product_error(d, c, power) + d * c_rest
    e = tl.exp2(power)
    return e + e * (lost * LN2)


@triton.jit
def below(x, top, c, c_rest):
    """x - top, finite for an x of -inf (0 times it is 0), and e^{(x - top)/T}, with what float32 rounds away."""
    lowest = top - 1000.0 / c  # 2^-1000 is 0, and nothing on the way is inf - inf
    x = tl.where(x < lowest, lowest, x)  # NaN stays
    d = x - top
    return d, exp2_of_product(d, c, c_rest, difference_error(x, top, d) * c)


# From here on, what float32 rounds off top c would matter.
FAR_EXPONENT = tl.constexpr(1048576.0)


@triton.jit
def reference_of(top, c):
    """(base, r) of a maximum: exponents relative to it are (x - base) c - r.

    r is top c as float32 rounds it, and base is 0; where r is large base is top, and r is 0.
    """
    product = top * c
    near = tl.abs(product) < FAR_EXPONENT
    return tl.where(near, 0.0, top), tl.where(near, product, 0.0)


@triton.jit
def raised(top, new_top, rest, weighted, count, c, c_rest, EXACT: tl.constexpr):
    """The sums relative to a maximum that is no less."""
    if EXACT:
        shift, factor = below(top, new_top, c, c_rest)
        is_raised = new_top > top
        # In a factor of 0 the weighted sum may be 0 * inf.
        weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * (rest + count)))
        rest = factor * tl.where(is_raised, rest + count, rest)
        count = tl.where(is_raised, 0.0, count)
    else:
        base, r = reference_of(top, c)
        new_base, new_r = reference_of(new_top, c)
        shift = fma(base - new_base, c, r - new_r)
        factor = tl.exp2(shift)
        weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * rest))
        rest = factor * rest
    return rest, weighted, count


@triton.jit
def add_tile(x, top, rest, weighted, count, c, c_rest, EXACT: tl.constexpr):
    """Adds a tile to the sums of each thread, which are relative to its maximum `top`. With EXACT

        rest = sum e^{(x - top)/T},  weighted = sum e^{(x - top)/T} (x - top),

    where the maxima are not in `rest`, where their ones would cost the digits of everything else, but in `count`.
    Else one rounding less a power pays: with (base, r) of `reference_of`

        rest = sum 2^{(x - base) c - r},  weighted = sum 2^{(x - base) c - r} ((x - base) c - r).
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    rest, weighted, count = raised(top, new_top, rest, weighted, count, c, c_rest, EXACT)
    if EXACT:
        at = new_top[:, None]
        d, e = below(x, at, c, c_rest)
        weighted += tl.sum(e * d, 1)
        rest += tl.sum(tl.where(d == 0, 0.0, e), 1)
        count += tl.sum((x == at).to(tl.float32), 1)  # not an -inf that was raised to the lowest number
    else:
        base, r = reference_of(new_top, c)
        exponent = fma(x - base[:, None], c, -r[:, None])
        e = tl.exp2(exponent)
        weighted += tl.sum(e * tl.maximum(exponent, LOWEST), 1)  # 0 * (-inf) = 0
        rest += tl.sum(e, 1)
    return new_top, rest, weighted, count


@triton.jit
def temperature_of(temperature, temperatures, many, n):
    """T of token n in float64; there is one for each where `many` is not 0."""
    t = wide(temperature)
    if many != 0:
        t = t * tl.load(temperatures + n).to(tl.float64)
    return t


@kernel
def segment_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials, count: tl.int64, vocab: tl.int64,
    segments: tl.int64,
    SEGMENT: tl.constexpr, THREADS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partials (4, segments, N): maximum, sum, weighted sum and number of maxima of a segment, as in `add_tile`."""
    pid = tl.program_id(0)
    n = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if masked != 0:
        if not tl.load(mask + n):
            return
    row = logits + row_offset(n, inner, outer_stride, inner_stride)
    scale = 1 / temperature_of(temperature, temperatures, many, n) * LOG2E
    c = scale.to(tl.float32)
    c_rest = (scale - c).to(tl.float32)
    TILE: tl.constexpr = THREADS * UNROLL * VEC
    cols = columns(THREADS, UNROLL, VEC)
    top = tl.full((THREADS,), LOWEST, tl.float32)
    rest = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    maxima = tl.zeros((THREADS,), tl.float32)

    begin = segment * SEGMENT
    size = tl.minimum(vocab - begin, SEGMENT).to(tl.int32)
    target = tl.load(token_ids + n) - begin
    own = tl.where((target >= 0) & (target < size), target, -1).to(tl.int32)
    start = row + begin * vocab_stride
    full = size // TILE * TILE
    for at in range(0, full, TILE):
        x = load_tile(start, at, vocab_stride, 0, THREADS, UNROLL, VEC, LAYOUT, False)
        if (own >= at) & (own < at + TILE):
            x = tl.where(cols == own - at, float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)
    if full < size:
        x = load_tile(start, full, vocab_stride, size - full, THREADS, UNROLL, VEC, LAYOUT, True)
        if own >= full:
            x = tl.where(cols == own - full, float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)

    highest = tl.max(top, 0)
    rest, weighted, maxima = raised(top, highest, rest, weighted, maxima, c, c_rest, EXACT)
    out = partials + segment * count + n
    plane = segments * count
    tl.store(out, highest)
    tl.store(out + plane, tl.sum(rest, 0))
    tl.store(out + 2 * plane, tl.sum(weighted, 0))
    tl.store(out + 3 * plane, tl.sum(maxima, 0))


# ---- the row as a whole, in float64 ------------------------------------------------------------------------


@triton.jit
def _segment_reference(top, c, exact):
    """What the sums of a segment are relative to: its maximum, or where they are not exact an exponent."""
    product = top * c
    exponent = tl.where(tl.abs(product) < FAR_EXPONENT, product.to(tl.float64), top.to(tl.float64) * c.to(tl.float64))
    return tl.where(exact, top.to(tl.float64), exponent)


@triton.jit
def row_statistics(partials, x, n, counts, count, segments, t, exact):
    """Log-prob of a logit x (float64) which the segments leave out, log-sum-exp and entropy of rows n.

    t: temperatures. exact: whether `segment_kernel` was EXACT, for its sums are then in units of a logit, and else in
    octaves; -inf for x leaves nothing out.
    """
    exact = exact != 0
    scale = 1 / t * LOG2E
    c = scale.to(tl.float32)
    scale = tl.where(exact, scale, c.to(tl.float64))  # what the segments were summed with
    octaves = tl.where(exact, scale, 1.0)  # of a unit
    nats = tl.where(exact, 1 / t, 1 / t / scale)
    own = tl.where(exact, x, x * scale)

    plane = segments * count
    top = own
    for s in range(0, segments):
        at = partials + s * count + n
        top = tl.maximum(top, _segment_reference(tl.load(at, mask=counts, other=0), c, exact))
    d = own - top  # of a token at +inf NaN, as all of its row is
    e = tl.exp2(d * octaves)
    total, weighted = e, tl.where(e == 0, 0.0, e * d)
    for s in range(0, segments):
        at = partials + s * count + n
        shift = _segment_reference(tl.load(at, mask=counts, other=0), c, exact) - top
        factor = tl.exp2(shift * octaves)
        part = tl.load(at + plane, mask=counts, other=0).to(tl.float64)
        part += tl.load(at + 3 * plane, mask=counts, other=0).to(tl.float64)
        part_weighted = tl.load(at + 2 * plane, mask=counts, other=0).to(tl.float64)
        total += factor * part
        weighted += tl.where(factor == 0, 0.0, factor * (part_weighted + shift * part))
    mean = weighted / total  # sum_j p_j (x_j - top)
    log_total = tl.log(total)
    # The sums are those of a temperature that is a rounding away, and the logarithm's slope is the mean.
    log_sum = log_total + tl.where(total == 0, 0.0, (nats - octaves * LN2) * mean)  # no word at all: -inf
    lse = top * nats + log_sum
    logprob = tl.where(own == top, -log_sum, own * nats - lse)
    return logprob, lse, log_total - mean * octaves * LN2


@checking_kernel
def merge_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials, logprobs, lse, entropy,
    count: tl.int64, vocab: tl.int64, segments: tl.int64, exact: tl.int64, BLOCK: tl.constexpr,
):
    """The segments of BLOCK rows and their tokens' own logits -> log-prob, log-sum-exp, entropy."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = n < count
    if masked != 0:
        counts = counts & tl.load(mask + n, mask=counts, other=0).to(tl.int1)
    target = tl.load(token_ids + n, mask=counts, other=0)
    known = (target >= 0) & (target < vocab)
    tl.device_assert(known, "r1kernels: token_ids holds an id outside [0, V)")
    t = tl.full((BLOCK,), temperature, tl.float64)
    if many != 0:
        t = t * tl.load(temperatures + n, mask=counts, other=1).to(tl.float64)
    own = row_offset(n, inner, outer_stride, inner_stride) + target * vocab_stride
    x = tl.load(logits + own, mask=counts & known, other=0).to(tl.float64)
    of_token, of_row, h = row_statistics(partials, x, n, counts, count, segments, t, exact)
    keep = n < count
    tl.store(logprobs + n, tl.where(counts, of_token, 0.0).to(tl.float32), mask=keep)
    tl.store(lse + n, tl.where(counts, of_row, 0.0), mask=keep)
    tl.store(entropy + n, tl.where(counts, h, 0.0), mask=keep)
