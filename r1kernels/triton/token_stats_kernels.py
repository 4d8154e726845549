"""Kernels of the token statistics: a segment of a row to some float32 numbers, and the merge of a row's segments.

A thread keeps the sums of the entries that it reads (`token_stats_tiles`). Their order depends on the tile alone, not
on how the row lies in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import (
    LN2,
    LOG2E,
    LOWEST,
    checking_kernel,
    difference_error,
    fma,
    kernel,
    product_error,
    row_offset,
    wide,
)
from r1kernels.triton.token_stats_tiles import columns, load_tile

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
def raised_squares(top, new_top, squares, count, c, c_rest, EXACT: tl.constexpr):
    """The sum of squares (`add_squares`) relative to a maximum that is no less; called before `raised`."""
    if EXACT:
        _, factor = below(top, new_top, c, c_rest)
        squares = factor * factor * tl.where(new_top > top, squares + count, squares)
    else:
        base, r = reference_of(top, c)
        new_base, new_r = reference_of(new_top, c)
        factor = tl.exp2(fma(base - new_base, c, r - new_r))
        squares = factor * factor * squares
    return squares


@triton.jit
def add_squares(x, top, squares, count, c, c_rest, EXACT: tl.constexpr):
    """Adds the squares of the powers that `add_tile` adds to `rest`, and is called before it."""
    new_top = tl.maximum(top, tl.max(x, 1))
    squares = raised_squares(top, new_top, squares, count, c, c_rest, EXACT)
    at = new_top[:, None]
    if EXACT:
        d, e = below(x, at, c, c_rest)
        e = tl.where(d == 0, 0.0, e)
    else:
        base, r = reference_of(new_top, c)
        e = tl.exp2(fma(x - base[:, None], c, -r[:, None]))
    return squares + tl.sum(e * e, 1)


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


@triton.jit
def _walk_segment(
    row, vocab_stride, target, t, partials, n, segment, count, vocab, segments,
    SEGMENT: tl.constexpr, THREADS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    EXACT: tl.constexpr, MORE: tl.constexpr,
):
    """The planes of partials of one segment of a row whose token has the id `target`."""
    scale = 1 / t * LOG2E
    c = scale.to(tl.float32)
    c_rest = (scale - c).to(tl.float32)
    TILE: tl.constexpr = THREADS * UNROLL * VEC
    cols = columns(THREADS, UNROLL, VEC)
    top = tl.full((THREADS,), LOWEST, tl.float32)
    rest = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    maxima = tl.zeros((THREADS,), tl.float32)
    if MORE:
        squares = tl.zeros((THREADS,), tl.float32)
        total = tl.zeros((THREADS,), tl.float32)

    begin = segment * SEGMENT
    size = tl.minimum(vocab - begin, SEGMENT).to(tl.int32)
    target -= begin
    own = tl.where((target >= 0) & (target < size), target, -1).to(tl.int32)
    start = row + begin * vocab_stride
    full = size // TILE * TILE
    for at in range(0, full, TILE):
        x = load_tile(start, at, vocab_stride, 0, THREADS, UNROLL, VEC, LAYOUT, False)
        if MORE:
            total += tl.sum(x, 1)
        if (own >= at) & (own < at + TILE):
            x = tl.where(cols == own - at, float("-inf"), x)
        if MORE:
            squares = add_squares(x, top, squares, maxima, c, c_rest, EXACT)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)
    if full < size:
        x = load_tile(start, full, vocab_stride, size - full, THREADS, UNROLL, VEC, LAYOUT, True)
        if MORE:
            total += tl.sum(tl.where(cols < size - full, x, 0.0), 1)
        if own >= full:
            x = tl.where(cols == own - full, float("-inf"), x)
        if MORE:
            squares = add_squares(x, top, squares, maxima, c, c_rest, EXACT)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)

    highest = tl.max(top, 0)
    if MORE:
        squares = raised_squares(top, highest, squares, maxima, c, c_rest, EXACT)
    rest, weighted, maxima = raised(top, highest, rest, weighted, maxima, c, c_rest, EXACT)
    out = partials + segment * count + n
    plane = segments * count
    tl.store(out, highest)
    tl.store(out + plane, tl.sum(rest, 0))
    tl.store(out + 2 * plane, tl.sum(weighted, 0))
    tl.store(out + 3 * plane, tl.sum(maxima, 0))
    if MORE:
        known = (target + begin >= 0) & (target + begin < vocab)
        x = tl.load(row + (target + begin) * vocab_stride, mask=known, other=0).to(tl.float32)
        ahead = ((highest > x) | ((highest == x) & (target >= size))).to(tl.float32)
        if (own >= 0) & (highest == x):  # of equal logits, the first one is the largest
            for at in range(0, own, TILE):
                tile = load_tile(start, at, vocab_stride, size - at, THREADS, UNROLL, VEC, LAYOUT, True)
                equal = ((tile == x) & (cols < own - at)).to(tl.float32)
                ahead = tl.maximum(ahead, tl.max(tl.max(equal, 1), 0))
        tl.store(out + 4 * plane, tl.sum(squares, 0))
        tl.store(out + 5 * plane, tl.sum(total, 0))
        tl.store(out + 6 * plane, ahead)


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
    t = temperature_of(temperature, temperatures, many, n)
    _walk_segment(
        row, vocab_stride, tl.load(token_ids + n), t, partials, n, segment, count, vocab, segments, SEGMENT, THREADS,
        UNROLL, VEC, LAYOUT, EXACT, False,
    )


@kernel
def segment_more_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials, count: tl.int64, vocab: tl.int64,
    segments: tl.int64,
    SEGMENT: tl.constexpr, THREADS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partials (7, segments, N): those of `segment_kernel`, the sum of squares (`add_squares`), the sum of x with the
    token's, and 1 if another entry is larger than the token's, or equal and before it, else 0."""
    pid = tl.program_id(0)
    n = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if masked != 0:
        if not tl.load(mask + n):
            return
    row = logits + row_offset(n, inner, outer_stride, inner_stride)
    t = temperature_of(temperature, temperatures, many, n)
    _walk_segment(
        row, vocab_stride, tl.load(token_ids + n), t, partials, n, segment, count, vocab, segments, SEGMENT, THREADS,
        UNROLL, VEC, LAYOUT, EXACT, True,
    )


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


@triton.jit
def row_more(partials, x, n, counts, count, segments, vocab, t, exact):
    """The sum of p^2, the mean of z, the largest z, and whether it is that of the first entry with this logit x, of
    rows n, from the partials of `segment_more_kernel`. The other arguments are those of `row_statistics`."""
    exact = exact != 0
    inv_t = 1 / t
    scale = inv_t * LOG2E
    c = scale.to(tl.float32)
    scale = tl.where(exact, scale, c.to(tl.float64))
    octaves = tl.where(exact, scale, 1.0)
    own = tl.where(exact, x, x * scale)

    plane = segments * count
    top, largest = own, x
    for s in range(0, segments):
        highest = tl.load(partials + s * count + n, mask=counts, other=0)
        top = tl.maximum(top, _segment_reference(highest, c, exact))
        # The maxima of threads begin with the lowest finite number.
        largest = tl.maximum(largest, tl.where(highest == LOWEST, float("-inf"), highest).to(tl.float64))
    e = tl.exp2((own - top) * octaves)
    total, squares = e, e * e
    sum_x = tl.zeros_like(x)
    ahead = tl.zeros_like(x)
    for s in range(0, segments):
        at = partials + s * count + n
        factor = tl.exp2((_segment_reference(tl.load(at, mask=counts, other=0), c, exact) - top) * octaves)
        maxima = tl.load(at + 3 * plane, mask=counts, other=0).to(tl.float64)
        total += factor * (tl.load(at + plane, mask=counts, other=0).to(tl.float64) + maxima)
        squares += factor * factor * (tl.load(at + 4 * plane, mask=counts, other=0).to(tl.float64) + maxima)
        sum_x += tl.load(at + 5 * plane, mask=counts, other=0).to(tl.float64)
        ahead = tl.maximum(ahead, tl.load(at + 6 * plane, mask=counts, other=0).to(tl.float64))
    return squares / (total * total), sum_x / vocab * inv_t, largest * inv_t, ahead == 0


@triton.jit
def _tokens(
    logits, inner, outer_stride, inner_stride, vocab_stride, token_ids, mask, masked, temperatures, many, temperature,
    n, count, vocab, BLOCK: tl.constexpr,
):
    """Of rows n: which ones count, their temperatures, and the logits of their tokens, in float64."""
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
    return counts, t, x


@checking_kernel
def merge_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials, logprobs, lse, entropy,
    count: tl.int64, vocab: tl.int64, segments: tl.int64, exact: tl.int64, BLOCK: tl.constexpr,
):
    """The segments of BLOCK rows and their tokens' own logits -> log-prob, log-sum-exp, entropy."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts, t, x = _tokens(
        logits, inner, outer_stride, inner_stride, vocab_stride, token_ids, mask, masked, temperatures, many,
        temperature, n, count, vocab, BLOCK,
    )
    of_token, of_row, h = row_statistics(partials, x, n, counts, count, segments, t, exact)
    keep = n < count
    tl.store(logprobs + n, tl.where(counts, of_token, 0.0).to(tl.float32), mask=keep)
    tl.store(lse + n, tl.where(counts, of_row, 0.0), mask=keep)
    tl.store(entropy + n, tl.where(counts, h, 0.0), mask=keep)


@checking_kernel
def merge_more_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials, logprobs, lse, entropy, more,
    count: tl.int64, vocab: tl.int64, segments: tl.int64, exact: tl.int64, BLOCK: tl.constexpr,
):
    """`merge_kernel`, and more (4, N): the results of `row_more`."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts, t, x = _tokens(
        logits, inner, outer_stride, inner_stride, vocab_stride, token_ids, mask, masked, temperatures, many,
        temperature, n, count, vocab, BLOCK,
    )
    of_token, of_row, h = row_statistics(partials, x, n, counts, count, segments, t, exact)
    keep = n < count
    tl.store(logprobs + n, tl.where(counts, of_token, 0.0).to(tl.float32), mask=keep)
    tl.store(lse + n, tl.where(counts, of_row, 0.0), mask=keep)
    tl.store(entropy + n, tl.where(counts, h, 0.0), mask=keep)
    sum_sq, mean, largest, is_first = row_more(partials, x, n, counts, count, segments, vocab, t, exact)
    is_top1 = (is_first & (of_token == of_token)).to(tl.float64)
    tl.store(more + n, tl.where(counts, sum_sq, 0.0), mask=keep)
    tl.store(more + count + n, tl.where(counts, mean, 0.0), mask=keep)
    tl.store(more + 2 * count + n, tl.where(counts, largest, 0.0), mask=keep)
    tl.store(more + 3 * count + n, tl.where(counts, is_top1, 0.0), mask=keep)
