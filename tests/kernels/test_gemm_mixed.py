"""The matrix product of a float32 operand and a 16-bit one: exactness, error, the same bits, infinities, limits."""

import math
from collections.abc import Iterator

import pytest
import torch
from backends import host_code
from gemm_cases import (
    ISAS,
    LAYOUTS,
    check,
    emulated_product,
    gemm_f32,
    lay_out,
    product,
    random_matrix,
    running,
    same_on_tiles,
    wide,
)
from torch import Tensor

from r1kernels import testing
from r1kernels.ops.linear import gemm

pytestmark = host_code

WIDE, HALVES = torch.float32, (torch.bfloat16, torch.float16)
PAIRS = [pair for half in HALVES for pair in ((WIDE, half), (half, WIDE))]
ON_TILES = [pair for pair in PAIRS if torch.bfloat16 in pair]
BOTH_LAYOUTS = [(x, y) for x in LAYOUTS for y in LAYOUTS]
LARGEST = torch.finfo(WIDE).max
Pair = tuple[torch.dtype, torch.dtype]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each set of CPU instructions that this processor has."""
    with running(request.param):
        yield request.param


def matrices(pair: Pair, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    return random_matrix(m, k, pair[0], 1), random_matrix(k, n, pair[1], 2)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (29, 33, 70), (131, 9, 331), (5, 514, 33)])
def test_integers_are_exact(isa: str, pair: Pair, m: int, k: int, n: int) -> None:
    """Of 16 bits in float32, with sums below 2^24."""
    rng = testing.generator(0)
    most = min(2**15, 2**21 // k)
    a, b = (
        torch.randint(-most if dtype == WIDE else -7, most if dtype == WIDE else 8, shape, generator=rng).to(dtype)
        for dtype, shape in zip(pair, ((m, k), (k, n)), strict=True)
    )
    out = torch.randint(-8, 9, (m, n), generator=rng).float()
    expected = (a.double() @ b.double()).float()
    for layouts in BOTH_LAYOUTS:
        left, right = lay_out(a, layouts[0]), lay_out(b, layouts[1])
        assert torch.equal(product(left, right), expected)
        assert torch.equal(product(left, right, out), out + expected)


@pytest.mark.parametrize("half", HALVES)
def test_every_bit_of_float32_counts(isa: str, half: torch.dtype) -> None:
    """Of any number that is not close to the denormals, also beyond the largest bfloat16."""
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=testing.generator(0)).to(torch.int32)
    values = torch.cat([bits.view(WIDE), torch.tensor([LARGEST, -LARGEST, 1 - 2**-24, 1 + 2**-23, 0.0])])
    values = values[values.isfinite() & ((values.abs() > 2.0**-100) | (values == 0))]
    ones = torch.ones(1, 1, dtype=half)
    for column in (values[:, None], values[None].t()):
        assert torch.equal(product(column, ones)[:, 0], values)
        assert torch.equal(product(ones, column.t())[0], values)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("m", "k", "n"), [(20, 1000, 40), (5, 8195, 33), (70, 64, 1100)])
def test_products_keep_to_their_budget(isa: str, pair: Pair, m: int, k: int, n: int) -> None:
    a, b = matrices(pair, m, k, n)
    for layouts in (("row", "column"), ("column", "row")):
        left, right = lay_out(a, layouts[0]), lay_out(b, layouts[1])
        check(left, right)
        check(left, right, random_matrix(m, n, WIDE, 3))
    errors = [(x - a.double() @ b.double()).norm() for x in (product(a, b), product(a.float(), b.float()))]
    assert errors[0] <= 1.5 * errors[1], "coarser than a product of float32"


@pytest.mark.parametrize("pair", PAIRS)
def test_long_sums_do_not_drift(isa: str, pair: Pair) -> None:
    """Equal terms round the same way every time: one running sum of these is off by 8e-5 or more."""
    a = torch.full((2, 100_000), 1 / 3, dtype=pair[0])
    b = torch.full((100_000, 2), 0.1, dtype=pair[1])
    exact = 100_000 * a[0, 0].double() * b[0, 0].double()
    assert ((product(a, b) - exact).abs() <= 4e-6 * exact).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_accumulation_is_one_addition_for_each_slice(isa: str, pair: Pair) -> None:
    a, b = matrices(pair, 20, 250, 40)
    out = random_matrix(20, 40, WIDE, 3)
    assert torch.equal(product(a, b, out), out + product(a, b))


# ---- the same bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_an_entry_depends_on_its_row_and_column_alone(isa: str, pair: Pair) -> None:
    """Also if there is an infinity or NaN in another row and column, and in matrices of more than one block."""
    a, b = matrices(pair, 161, 777, 1100)
    whole = product(a, b)
    rng = testing.generator(0)
    for count, layouts in ((1, BOTH_LAYOUTS[0]), (17, BOTH_LAYOUTS[1]), (40, BOTH_LAYOUTS[2])):
        rows, columns = (torch.randperm(size, generator=rng)[:count] for size in (161, 1100))
        part = product(lay_out(a[rows], layouts[0]), lay_out(b[:, columns], layouts[1]))
        assert same_bits(part, whole[rows][:, columns])
    for poison in (math.inf, math.nan):
        a[3, 5] = b[9, 700] = poison
        poisoned = product(a, b)
        rows, columns = (torch.arange(size) != skip for size, skip in ((161, 3), (1100, 700)))
        assert same_bits(poisoned[rows][:, columns], whole[rows][:, columns])


@pytest.mark.parametrize("pair", PAIRS)
def test_threads_change_nothing(isa: str, pair: Pair, on_threads: object) -> None:
    a, b = matrices(pair, 200, 700, 300)
    expected = product(a, b)
    on_threads(3)
    assert same_bits(product(a, b), expected)


# ---- NaN, inf and the largest numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_those_of_a_float32_product(isa: str, pair: Pair, poison: float) -> None:
    """Whatever the other operand holds: 1 has parts that are 0, and 0 * inf is NaN."""
    for m, k, n in ((3, 5, 7), (31, 600, 75)):
        for places in ("a", "b", "ab"):
            a, b = matrices(pair, m, k, n)
            a[:, 2:4], b[k - 1] = 1, -1
            if "a" in places:
                a[m // 2, k - 1] = poison
            if "b" in places:
                b[2, n - 1] = b[3, n // 2] = poison
            expected = a.double() @ b.double()
            for layout in LAYOUTS:
                got = product(lay_out(a, layout), lay_out(b, layout))
                for part in (torch.isnan, torch.isposinf, torch.isneginf):
                    assert torch.equal(part(got), part(expected)), (places, part)


def test_a_nan_of_any_payload_stays_nan(isa: str) -> None:
    for payload in (0x7FC00000, 0x7F800001, -1):
        a = torch.tensor([[payload]], dtype=torch.int32).view(WIDE)
        assert product(a, torch.ones(1, 1).bfloat16()).isnan().all()


def test_the_largest_numbers(isa: str) -> None:
    """There is no infinity on the way to a finite result, and one where float32 overflows."""
    a = torch.tensor([[LARGEST, 0], [LARGEST, -LARGEST], [LARGEST, LARGEST], [-LARGEST, -LARGEST]])
    b = torch.ones(2, 3).bfloat16()
    expected = torch.tensor([LARGEST, 0, math.inf, -math.inf])
    assert torch.equal(product(a, b), expected[:, None].expand(4, 3))
    assert torch.equal(product(b.t(), a.t()), expected.expand(3, 4))


# ---- two float32 operands where a coarse product is enough ------------------------------------------------


def test_a_coarse_product_keeps_16_bits(isa: str) -> None:
    """Without a drift, and the same bits for a row and a column anywhere."""
    a, b = matrices((WIDE, WIDE), 130, 2000, 345)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    whole = product(a, b, coarse=True)
    testing.assert_within(whole, exact, 2.0**-16 * terms)
    assert (((whole - exact) * exact).sum() / exact.square().sum()).abs() <= 1e-7
    part = product(lay_out(a[100:101], "column"), lay_out(b[:, 300:310], "column"), coarse=True)
    assert same_bits(part[0], whole[100, 300:310])
    out = random_matrix(130, 345, WIDE, 3)
    testing.assert_within(product(a, b, out, coarse=True), exact + out, 2.0**-16 * (terms + out.abs()))
    half = b.bfloat16()
    assert same_bits(product(a, half, coarse=True), product(a, half))  # other operands are multiplied as ever


def test_a_coarse_product_of_special_numbers(isa: str) -> None:
    large = LARGEST * (1 - 2.0**-16)  # more than the largest bfloat16
    a = torch.tensor([[large, 0], [large, -large], [large, large], [math.nan, 1], [math.inf, 1]])
    got = product(a, torch.ones(2, 3), coarse=True)
    expected = torch.tensor([large, 0, math.inf])[:, None].expand(3, 3)
    torch.testing.assert_close(got[:3], expected, rtol=2.0**-16, atol=0)
    assert got[3].isnan().all() and not got[4].isfinite().any()


# ---- the operator, tiles and other routes -----------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_empty_dimensions_and_opcheck(pair: Pair) -> None:
    ones = torch.ones(3, 4)
    for m, k, n in ((0, 5, 4), (3, 5, 0), (3, 0, 4)):
        a, b = torch.ones(m, k, dtype=pair[0]), torch.ones(k, n, dtype=pair[1])
        assert torch.equal(product(a, b), torch.zeros(m, n))
        assert torch.equal(product(a, b, ones[:m, :n]), ones[:m, :n])
    a, b = matrices(pair, 5, 7, 6)
    torch.library.opcheck(gemm_f32, (a, b, torch.zeros(5, 6), True))


@pytest.mark.parametrize("pair", [*ON_TILES, (WIDE, WIDE)])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (33, 31, 47), (130, 33, 20), (5, 1025, 3), (3, 40, 530)])
def test_emulated_tiles(pair: Pair, m: int, k: int, n: int) -> None:
    a, b = matrices(pair, m, k, n)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for layouts in BOTH_LAYOUTS:
        left, right = lay_out(a, layouts[0]), lay_out(b, layouts[1])
        got = emulated_product(left, right)
        coarse = 2.0**-16 if pair == (WIDE, WIDE) else 0
        testing.assert_within(got, exact, ((k + 2) * testing.EPS32 / 2 + coarse) * terms)
        same_on_tiles(left, right, None, got)
    out = random_matrix(m, n, WIDE, 3)
    same_on_tiles(a, b, out, emulated_product(a, b, out))


@pytest.mark.parametrize("pair", ON_TILES)
def test_emulated_tiles_with_infinities_and_denormals(pair: Pair) -> None:
    a, b = matrices(pair, 35, 70, 50)
    a[3] *= 2.0**-110  # parts of it are denormals
    b[:, 7] *= 2.0**100
    a[20, 3] = b[9, 30] = math.inf
    a[21, 4] = -math.inf
    a[22, 0] = math.nan
    expected = a.double() @ b.double()
    got = emulated_product(a, b)
    for part in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(part(got), part(expected))
    same_on_tiles(a, b, None, got)


@pytest.mark.parametrize(
    ("route", "pair"), [*(("parts", pair) for pair in ON_TILES), *(("copies", pair) for pair in PAIRS)]
)
@pytest.mark.parametrize(("m", "k", "n"), [(5, 33, 7), (130, 300, 129), (2, 0, 3)])
def test_routes_of_other_devices(
    route: str, pair: Pair, m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "route", lambda *_: route)
    monkeypatch.setattr(gemm, "_wide", wide)
    for name, size in (("_BLOCK", 100), ("_SPLIT_DEPTH", 128), ("_SPLIT_WIDTH", 64)):
        monkeypatch.setattr(gemm, name, size)
    a, b = matrices(pair, m, k, n)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for invariant in (False, True):
        for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            out = gemm.matmul(left, right, torch.full((m, n), torch.nan), batch_invariant=invariant)
            testing.assert_within(out, exact, 8 * testing.EPS32 * terms)
            gemm.matmul(left, right, out, accumulate=True, batch_invariant=invariant)
            testing.assert_within(out, 2 * exact, 16 * testing.EPS32 * terms)


def test_parts_are_exact_and_keep_infinities_apart() -> None:
    values = torch.tensor([LARGEST, -LARGEST, 1 / 3, 1 + 2**-23, 0.0, math.inf, -math.inf, math.nan])
    third, second, first = gemm._thirds(values)
    assert torch.equal((third.double() + second.double() + first.double())[:5].float(), values[:5])
    assert not third[5:].any() and not second[5:].any()
    assert torch.equal(first[5:7].float(), values[5:7]) and first[7].isnan()
