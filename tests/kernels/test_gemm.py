"""The matrix product with an fp32 result: exactness, its error budget, the same bits however it is cut, edges."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import host_code
from gemm_cases import (
    DTYPES,
    ISAS,
    LAYOUTS,
    TINY,
    check,
    emulated_product,
    gemm_f32,
    lay_out,
    product,
    random_matrix,
    running,
    same_on_tiles,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import _library, testing
from r1kernels.ops.linear import gemm

pytestmark = host_code


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each set of CPU instructions that this processor has."""
    with running(request.param):
        yield request.param


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (14, 32, 32), (15, 33, 31), (29, 545, 70), (523, 9, 41)])
@pytest.mark.parametrize("layouts", [(x, y) for x in LAYOUTS for y in LAYOUTS])
def test_integers_are_exact(isa: str, dtype: torch.dtype, m: int, k: int, n: int, layouts: tuple[str, str]) -> None:
    a, b, out = (
        torch.randint(-8, 9, shape, generator=testing.generator(seed)).to(kind)
        for seed, (shape, kind) in enumerate([((m, k), dtype), ((k, n), dtype), ((m, n), torch.float32)])
    )
    expected = a.float() @ b.float()
    a, b = lay_out(a, layouts[0]), lay_out(b, layouts[1])
    assert torch.equal(product(a, b), expected)
    assert torch.equal(product(a, b, out), out + expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(3, 8, 50), (20, 1000, 40), (5, 8195, 33), (70, 64, 1100)])
@pytest.mark.parametrize("layouts", [("row", "column"), ("row", "row"), ("column", "row")])
def test_products_keep_to_their_budget(
    isa: str, dtype: torch.dtype, m: int, k: int, n: int, layouts: tuple[str, str]
) -> None:
    a = lay_out(random_matrix(m, k, dtype, 1), layouts[0])
    b = lay_out(random_matrix(k, n, dtype, 2), layouts[1])
    check(a, b)
    check(a, b, random_matrix(m, n, torch.float32, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_do_not_drift(isa: str, dtype: torch.dtype) -> None:
    """Equal terms round the same way every time: one running sum of these is off by 8e-5 or more."""
    a = torch.full((2, 100_000), 1.0, dtype=dtype)
    b = torch.full((100_000, 2), 0.1, dtype=dtype)
    exact = 100_000 * b[0, 0].double()
    assert ((product(a, b) - exact).abs() <= 4e-6 * exact).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulation_is_one_addition_for_each_slice(isa: str, dtype: torch.dtype) -> None:
    a, b = random_matrix(20, 250, dtype, 1), random_matrix(250, 40, dtype, 2)
    out = random_matrix(20, 40, torch.float32, 3)
    assert torch.equal(product(a, b, out), out + product(a, b))
    assert torch.equal(product(a, b, torch.zeros(20, 40)), product(a, b))


def test_every_bfloat16_and_float16_is_read_exactly(isa: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        values = values[values.isfinite() & ((values.abs() >= torch.finfo(dtype).tiny) | (values == 0))]
        ones = torch.ones(1, 1, dtype=dtype)
        for column in (values[:, None], values[None, :].t()):
            assert torch.equal(product(column, ones)[:, 0], values.float())
            assert torch.equal(product(ones, column.t())[0], values.float())


def test_float16_denormals_count(isa: str) -> None:
    values = torch.arange(1, 1024).to(torch.int16).view(torch.float16)[:, None]
    assert torch.equal(product(values, torch.ones(1, 3, dtype=torch.float16))[:, 2], values[:, 0].float())


# ---- the same bits ----------------------------------------------------------------------------------------


@pytest.fixture
def whole(isa: str) -> Callable[[torch.dtype], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, b = random_matrix(61, 777, dtype, 1), random_matrix(777, 83, dtype, 2)
        out = random_matrix(61, 83, torch.float32, 3)
        return a, b, out, product(a, b), product(a, b, out)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_depends_on_its_row_and_column_alone(whole: Callable, dtype: torch.dtype) -> None:
    a, b, out, expected, expected_sum = whole(dtype)

    @given(
        rows=st.lists(st.integers(0, 60), min_size=1, max_size=40),
        columns=st.lists(st.integers(0, 82), min_size=1, max_size=70),
        layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    )
    def any_selection(rows: list[int], columns: list[int], layouts: tuple[str, str]) -> None:
        part_a, part_b = lay_out(a[rows], layouts[0]), lay_out(b[:, columns], layouts[1])
        assert torch.equal(product(part_a, part_b), expected[rows][:, columns])
        assert torch.equal(product(part_a, part_b, out[rows][:, columns]), expected_sum[rows][:, columns])

    any_selection()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_is_computed_as_in_a_large_batch(isa: str, dtype: torch.dtype) -> None:
    """Larger than one block of the result and than one block of packed rows."""
    a, b = random_matrix(2100, 40, dtype, 1), random_matrix(40, 1100, dtype, 2)
    large = product(a, b)
    for row in (0, 503, 504, 2047, 2099):
        assert torch.equal(product(a[row : row + 1], b)[0], large[row])
    for column in (0, 1023, 1024, 1099):
        assert torch.equal(product(a, b[:, column : column + 1])[:, 0], large[:, column])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(200, 300), (5, 4000), (3000, 9)])
def test_threads_change_nothing(
    isa: str, dtype: torch.dtype, m: int, n: int, on_threads: Callable[[int], None]
) -> None:
    a, b = random_matrix(m, 700, dtype, 1), random_matrix(n, 700, dtype, 2).t()
    out = random_matrix(m, n, torch.float32, 3)
    expected = product(a, b, out)
    for threads in (2, 3, 64):
        on_threads(threads)
        assert torch.equal(product(a, b, out), expected), f"{threads} threads"


# Sums over more than 16,384 elements are made of groups of 4,096, which threads share.


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_long_sums(isa: str, dtype: torch.dtype, on_threads: Callable[[int], None]) -> None:
    a, b = random_matrix(37, 17_000, dtype, 1), random_matrix(41, 17_000, dtype, 2).t()
    out = random_matrix(37, 41, torch.float32, 3)
    added, expected = product(a, b, out), product(a, b)
    check(a, b)
    assert (added - (expected.double() + out)).abs().max() <= 5 * 2**-24 * (expected.abs() + out.abs()).max()
    for threads in (2, 64):
        on_threads(threads)
        assert torch.equal(product(a, b, out), added), f"{threads} threads"
        assert torch.equal(product(a, b), expected), f"{threads} threads"
        assert torch.equal(product(a[5:6], b[:, 7:]), expected[5:6, 7:])  # other rows change nothing


@pytest.mark.parametrize("add", [False, True])
def test_groups_that_do_not_fit_in_memory_at_once(add: bool, on_threads: Callable[[int], None]) -> None:
    """Of 5 groups of 13 MiB 4 are computed at a time. Every sum is an integer, and exact."""
    on_threads(2)
    k = 17_000
    left, right = torch.arange(2_000) % 3, torch.arange(1_700) % 5
    a = left[:, None].expand(-1, k).to(torch.bfloat16)
    b = right[:, None].to(torch.bfloat16).expand(-1, k).contiguous().t()
    out = torch.ones(2_000, 1_700)
    gemm_f32(a.contiguous(), b, out, add)
    assert torch.equal(out, (left[:, None] * right * k + add).float())


# ---- NaN and inf ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_reach_their_row_and_column_and_no_other(
    isa: str, dtype: torch.dtype, poison: float, layout: str
) -> None:
    for m, k, n in ((3, 5, 7), (31, 600, 75)):
        a, b = random_matrix(m, k, dtype, 1), random_matrix(k, n, dtype, 2)
        a[m // 2, k - 1] = b[k // 2, n - 1] = poison
        expected = (a.double() @ b.double()).float()
        got = product(lay_out(a, layout), lay_out(b, layout))
        for part in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(part(got), part(expected))


def test_overflow_is_infinite(isa: str) -> None:
    a = torch.full((2, 3), 2.0**100)
    assert product(a, a.t()).tolist() == [[math.inf] * 2] * 2
    assert product(a.bfloat16(), -a.t().bfloat16()).tolist() == [[-math.inf] * 2] * 2


# ---- shapes and strides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_dimensions(isa: str, dtype: torch.dtype) -> None:
    ones = torch.ones(3, 4)
    for m, k, n in ((0, 5, 4), (3, 5, 0), (0, 0, 0)):
        assert product(torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)).shape == (m, n)
    a, b = torch.ones(3, 0, dtype=dtype), torch.ones(0, 4, dtype=dtype)
    assert torch.equal(product(a, b), 0 * ones)  # fresh memory is filled with NaN here
    assert torch.equal(product(a, b, ones), ones)


def test_the_stride_of_one_row_or_column_does_not_matter(isa: str) -> None:
    x = torch.arange(1.0, 100)
    row, column = x.as_strided((1, 3), (17, 5)), x.as_strided((3, 1), (5, 17))
    assert product(row, column).tolist() == [[1 + 36 + 121]]
    assert torch.equal(product(column, row), column @ row)
    out = torch.zeros(3).as_strided((3, 1), (1, 9))
    gemm_f32(column, torch.ones(1, 1), out, False)
    assert torch.equal(out, column)


def test_expanded_operands(isa: str) -> None:
    a, b = torch.arange(5.0).expand(3, 5), torch.arange(4.0).expand(5, 4)
    assert torch.equal(product(a, b), a.contiguous() @ b.contiguous())
    assert torch.equal(product(b.t(), a.t()), b.t().contiguous() @ a.t().contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_2_to_the_31(isa: str, dtype: torch.dtype) -> None:
    """Rows 2^30 elements apart; only the pages that are touched take memory."""
    apart = 2**30 + 8
    storage = np.zeros(2 * apart + 64, dtype=np.float32 if dtype == torch.float32 else np.int16)
    far = torch.from_numpy(storage).view(dtype).as_strided((3, 40), (apart, 1))
    values = torch.randint(-8, 9, (3, 40), generator=testing.generator(1)).to(dtype)
    far.copy_(values)
    expected = values.float() @ values.float().t()
    assert torch.equal(product(far, values.t()), expected)
    assert torch.equal(product(values, far.t()), expected)
    assert torch.equal(product(far.t(), values), values.float().t() @ values.float())
    out = torch.from_numpy(np.zeros(2 * apart + 64, dtype=np.float32)).as_strided((3, 3), (apart, 1))
    gemm_f32(values, values.t(), out, False)
    assert torch.equal(out, expected)


# ---- errors and the operator ------------------------------------------------------------------------------

A, B, OUT = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (A[0], B, OUT, "must be matrices, got 1, 2 and 2"),
        (A, B[:3], OUT, r"a is \(3, 4\), b is \(3, 5\)"),
        (A, B, OUT[:2], r"out is \(2, 5\), expected \(M, K\), \(K, N\) and \(M, N\)"),
        (A.half(), B.bfloat16(), OUT, "a and b are bfloat16 and float16, expected one dtype, or float32 beside"),
        (A.double(), B.double(), OUT, "a must be float32, bfloat16 or float16"),
        (A, B.double(), OUT, "b must be float32, bfloat16 or float16"),
        (A, B, OUT.double(), "out must be float32"),
        (torch.zeros(6, 8)[::2, ::2], B, OUT, r"a has strides \(16, 2\), expected one of them to be 1"),
        (A, torch.zeros(8, 10)[::2, ::2], OUT, r"b has strides \(20, 2\), expected one of them to be 1"),
        (A, B, torch.zeros(5, 3).t(), r"out has strides \(1, 3\), expected columns of stride 1"),
        (A, B, torch.zeros(5).expand(3, 5), r"out has strides \(0, 1\), expected .* rows that do not overlap"),
    ],
)
def test_errors_name_what_is_wrong(a: Tensor, b: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _library.call(gemm_f32, a, b, out, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [True, False])
def test_opcheck(dtype: torch.dtype, accumulate: bool) -> None:
    a, b = random_matrix(5, 7, dtype, 1), random_matrix(6, 7, dtype, 2).t()
    torch.library.opcheck(gemm_f32, (a, b, torch.zeros(5, 6), accumulate))


def test_fake_tensors_need_no_memory() -> None:
    with FakeTensorMode():
        a = torch.empty(10**6, 10**6, dtype=torch.bfloat16)
        assert gemm_f32(a, a, torch.empty(10**6, 10**6), True) is None


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no other source says what the processor has")
def test_bfloat16_instructions_are_used_where_they_are() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert ("avx512_bf16" in ISAS) == ("avx512_bf16" in flags)
    assert ("amx_bf16" in ISAS) == ({"avx512_bf16", "amx_tile", "amx_bf16"} <= set(flags))


# ---- matrix tiles, emulated -------------------------------------------------------------------------------

@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 1, 1), (16, 32, 16), (17, 33, 15), (32, 64, 32), (33, 1, 47), (5, 1025, 3), (130, 31, 20), (3, 40, 530)],
)
@pytest.mark.parametrize("layouts", [(x, y) for x in LAYOUTS for y in LAYOUTS])
def test_emulated_tiles(m: int, k: int, n: int, layouts: tuple[str, str]) -> None:
    a = lay_out(random_matrix(m, k, torch.bfloat16, 1), layouts[0])
    b = lay_out(random_matrix(k, n, torch.bfloat16, 2), layouts[1])
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for out in (None, random_matrix(m, n, torch.float32, 3)):
        got = emulated_product(a, b, out)
        extra = 0 if out is None else out.double()
        testing.assert_within(
            got, exact + extra, (k + 2) * testing.EPS32 / 2 * (terms + abs(extra)) + k * TINY
        )
        same_on_tiles(a, b, out, got)


@pytest.mark.parametrize("exponent", [-70, -63, 60])
def test_emulated_tiles_flush_denormals_and_overflow_as_tiles_do(exponent: int) -> None:
    a = (random_matrix(20, 100, torch.bfloat16, 1) * 2.0**exponent).bfloat16()
    b = (random_matrix(100, 20, torch.bfloat16, 2) * 2.0**exponent).bfloat16()
    a[3] *= 2.0**-60  # denormal inputs where a is small
    same_on_tiles(a, b, None, emulated_product(a, b))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_tiles_keep_nan_and_inf_in_their_row_and_column(poison: float, layout: str) -> None:
    a, b = random_matrix(19, 70, torch.bfloat16, 1), random_matrix(70, 35, torch.bfloat16, 2)
    a[9, 69] = b[35, 34] = poison
    expected = (a.double() @ b.double()).float()
    a, b = lay_out(a, layout), lay_out(b, layout)
    got = emulated_product(a, b)
    for part in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(part(got), part(expected))
    same_on_tiles(a, b, None, got)


def test_a_device_without_wide_results_is_slow_and_says_so() -> None:
    gemm._keeps_accumulators.cache_clear()  # torch on the CPU has none
    with pytest.warns(UserWarning, match="multiplies float32 copies on cpu, which is slow: torch .* has no 16-bit"):
        assert not gemm._keeps_accumulators(torch.device("cpu"))
    gemm._keeps_accumulators.cache_clear()
