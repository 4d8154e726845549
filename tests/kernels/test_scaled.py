"""A gradient times a factor of the device, and rows added to a sum."""

import pytest
import torch
from backends import registration_only

from r1kernels import _library, testing

PAIRS = [
    (grad, out) for grad in _library.NATIVE_DTYPES for out in _library.NATIVE_DTYPES
    if grad == torch.float32 or out in (grad, torch.float32)
]


@pytest.mark.parametrize(("dtype", "wanted"), PAIRS)
@pytest.mark.parametrize("count", [0, 1, 4099])
@pytest.mark.parametrize("factor", [0.37, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("accumulate", [False, True])
def test_one_rounding_and_zeros_stay(
    isa: str, dtype: torch.dtype, wanted: torch.dtype, count: int, factor: float, accumulate: bool
) -> None:
    grad = torch.randn(count, generator=testing.generator(0)).to(dtype)
    grad[::3] = 0
    out = torch.randn(count, generator=testing.generator(1)).to(wanted)
    product = torch.where(grad == 0, 0, grad.float() * factor)
    expected = (product + out.float() if accumulate else product).to(wanted)
    torch.ops.r1kernels.scaled(grad, torch.tensor(factor), out, accumulate)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_in_its_own_memory(isa: str) -> None:
    grad = torch.randn(33, 65, generator=testing.generator(0))
    expected = grad * 0.25
    torch.ops.r1kernels.scaled(grad, torch.tensor(0.25), grad, False)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", _library.NATIVE_DTYPES)
def test_a_factor_of_one_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**15), 2**15, (70_001,), generator=testing.generator(0), dtype=torch.int16)
    grad = bits[: 70_000 if dtype == torch.float32 else None].view(dtype)
    numbers = grad[grad.isfinite()]
    if _library.INTERPRETED:  # of subnormal 16-bit numbers Triton's interpreter makes others
        numbers = numbers[numbers.abs() >= torch.finfo(dtype).tiny]
    torch.ops.r1kernels.scaled(numbers, torch.tensor(1.0), out := numbers.clone(), False)
    assert torch.equal(out, numbers)
    if _library.EMULATED:  # not even those of a NaN: where nothing is to be done, nothing is read
        before = grad.clone()
        torch.ops.r1kernels.scaled(grad, torch.tensor(1.0), grad, False)
        assert torch.equal(grad.view(torch.int16), before.view(torch.int16))


def test_strided_memory_is_refused() -> None:
    grad = torch.randn(8, 8)
    message = "out must be contiguous|out has strides \\(1, 8\\), expected contiguous memory aligned to 16 bytes"
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.r1kernels.scaled(grad, torch.tensor(1.0), torch.empty(8, 8).t(), False)


@registration_only
def test_opcheck() -> None:
    arguments = torch.randn(5, 7), torch.tensor(2.0), torch.empty(5, 7), False
    torch.library.opcheck(torch.ops.r1kernels.scaled, arguments)


@pytest.mark.not_on("triton", "cuda", reason="a kernel of the CPU")
@pytest.mark.parametrize("dtype", _library.NATIVE_DTYPES)
@pytest.mark.parametrize("width", [1, 33, 600])
def test_rows_are_added_in_order(isa: str, dtype: torch.dtype, width: int) -> None:
    """Every sum is exact here, so that a lost or doubled addition shows; ids repeat."""
    ids = testing.random_ids(50, vocab=7)
    rows = torch.randint(-8, 8, (50, 2 * width), generator=testing.generator(0)).to(dtype)[:, ::2].contiguous()
    factors = torch.randint(-4, 4, (50,), generator=testing.generator(1)).float()
    out = torch.randint(-9, 9, (7, width), generator=testing.generator(2)).float()
    expected = out.index_put((ids,), factors[:, None] * rows.float(), accumulate=True)
    torch.ops.r1kernels.add_rows(out, ids, factors, rows)
    assert torch.equal(out, expected)


@pytest.mark.not_on("triton", "cuda", reason="a kernel of the CPU")
def test_an_id_out_of_range_is_refused() -> None:
    out, rows = torch.zeros(3, 4), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=r"ids\[1\] is 3, expected \[0, 3\)"):
        torch.ops.r1kernels.add_rows(out, torch.tensor([0, 3]), torch.ones(2), rows)
    assert not out.any()


@registration_only
def test_opcheck_of_rows() -> None:
    arguments = torch.zeros(3, 4), torch.tensor([0, 2]), torch.ones(2), torch.ones(2, 4)
    torch.library.opcheck(torch.ops.r1kernels.add_rows, arguments)
