"""The gradient with a shift of the row: float64 oracle, opcheck, memory of the logits, rows, soft cap, bits."""

from typing import Any

import pytest
import torch
from backends import registration_only, without_cuda_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1kernels import backend, testing
from r1kernels.ops import token_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]

pytestmark = without_cuda_kernels


def slopes(count: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    g, shift = torch.randn(2, count, generator=testing.generator(seed))
    return g, shift / 50


def expected(logits: Tensor, ids: Tensor, g: Tensor, shift: Tensor, t: Tensor | float, cap: float) -> testing.Expected:
    """(g (1[j = y] - p_j) + shift) / T, times the slope of the soft cap; with the terms of both parts."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)
    of_g = testing.token_stats_gradient(logits.double() / t, ids, g)
    through = (1 - (logits.double() / cap).square()) if cap else 1
    value = (of_g.value + shift.double()[:, None]) * through / t
    # The slope of the soft cap has two roundings of its own.
    terms = (of_g.terms + shift.double().abs()[:, None]) / t * (1 if not cap else through + 2)
    return testing.Expected(value, terms)


def gradient(logits: Tensor, ids: Tensor, g: Tensor, shift: Tensor, out: Tensor, **how: Any) -> Tensor:
    options = {"temperature": 1.0, "temperatures": None, "softcap": 0.0, "rows": None} | how
    t = options["temperature"]
    temperatures = options["temperatures"]
    t = t if temperatures is None else t * temperatures.double()[:, None]
    lse = (logits.double() / t).logsumexp(-1)
    return token_stats.gradient_into(out, logits, ids, lse, lse, g, None, shift=shift, **options)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("cap", [0.0, 20.0])
@pytest.mark.parametrize("own", [False, True])
def test_against_float64(
    pair: tuple[torch.dtype, torch.dtype], cap: float, own: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """own: a temperature for each token."""
    dtype, narrow = pair
    logits, ids = testing.random_logits(5, 1111, dtype=dtype), testing.random_ids(5, vocab=1111)
    logits = logits.clamp(-18, 18)
    g, shift = slopes(5)
    g[1], shift[2] = 0, 0
    g[3], shift[3] = 0, 0
    temperatures = torch.rand(5, generator=testing.generator(1)) + 0.5 if own else None
    t = 0.7 if temperatures is None else 0.7 * temperatures.double()
    exact = expected(logits, ids, g, shift, t, cap)
    logits[3] = torch.nan  # without a gradient, the row is not read
    got = gradient(
        logits, ids, g, shift, torch.empty(5, 1111, dtype=narrow), temperature=0.7, temperatures=temperatures,
        softcap=cap,
    )
    testing.assert_within(got[[0, 1, 2, 4]], testing.Expected(exact.value[[0, 1, 2, 4]], exact.terms[[0, 1, 2, 4]]))
    assert not got[3].any()


def test_the_reference_agrees() -> None:
    logits, ids = testing.random_logits(4, 60), testing.random_ids(4, vocab=60)
    g, shift = slopes(4)
    with backend("reference"):
        got = gradient(logits, ids, g, shift, torch.empty(4, 60), temperature=0.7, softcap=30.0)
    testing.assert_within(got, expected(logits, ids, g, shift, 0.7, 30.0))


@pytest.mark.not_on("triton", reason="a GPU has other memory for the rows of a gradient")
@pytest.mark.parametrize("pair", PAIRS)
def test_rows_in_the_memory_of_the_logits(pair: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, narrow = pair
    logits, ids = testing.random_logits(6, 300, dtype=dtype), testing.random_ids(6, vocab=300)
    g, shift = slopes(6)
    rows = torch.tensor([0, 2, 5])
    whole = gradient(logits, ids, g, shift, torch.empty(6, 300, dtype=narrow))
    memory = logits.clone()
    out = memory if narrow == dtype else memory.view(narrow)[:, :300]
    assert torch.equal(gradient(logits, ids, g, shift, torch.empty(6, 300, dtype=narrow), rows=rows), whole[rows])
    lse = logits.double().logsumexp(-1)
    got = token_stats.gradient_into(
        out, memory, ids, lse, lse, g, None, temperature=1.0, temperatures=None, softcap=0.0, rows=rows, shift=shift
    )
    assert torch.equal(got, whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_shift_it_is_the_gradient_of_the_log_prob(dtype: torch.dtype) -> None:
    logits, ids = testing.random_logits(4, 700, dtype=dtype), testing.random_ids(4, vocab=700)
    g, _ = slopes(4)
    plain = torch.empty_like(logits)
    lse = logits.double().logsumexp(-1)
    token_stats.gradient_into(
        plain, logits, ids, lse, lse, g, None, temperature=1.0, temperatures=None, softcap=0.0, rows=None
    )
    assert torch.equal(gradient(logits, ids, g, torch.zeros(4), torch.empty_like(logits)), plain)


@given(
    count=st.integers(0, 4), vocab=st.sampled_from([1, 2, 15, 16, 17, 63, 129, 1025]), seed=st.integers(0, 99),
    strided=st.booleans(),
)
def test_any_shape(count: int, vocab: int, seed: int, strided: bool) -> None:
    logits, ids = testing.random_logits(count, vocab, seed=seed), testing.random_ids(count, vocab=vocab, seed=seed)
    given_logits = torch.stack([logits, logits], -1)[..., 0] if strided else logits
    g, shift = slopes(count, seed)
    got = gradient(given_logits, ids, g, shift, torch.empty(count, vocab))
    testing.assert_within(got, expected(logits, ids, g, shift, 1.0, 0.0))


def test_entries_of_minus_infinity() -> None:
    logits, ids = testing.random_logits(3, 40), torch.tensor([5, 0, 7])
    logits[0, 3:9] = -torch.inf  # the token's own entry, too
    g, shift = slopes(3)
    got = gradient(logits, ids, g, shift, torch.empty(3, 40))
    testing.assert_within(got[0, [3, 4, 6, 7, 8]], shift[0].double().expand(5), 0)
    testing.assert_within(got[0, 5], (g[0] + shift[0]).double(), 2e-7)
    assert got[1:].isfinite().all()


@registration_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_opcheck(dtype: torch.dtype, rows: list[int] | None) -> None:
    logits, ids = testing.random_logits(5, 40, dtype=dtype), testing.random_ids(5, vocab=40)
    lse = logits.double().logsumexp(-1)
    index = None if rows is None else torch.tensor(rows)
    torch.library.opcheck(
        torch.ops.r1kernels.token_stats_backward_out,
        (
            logits, ids, lse, lse, torch.ones(5), None, 0.7, None, 5.0, index, torch.empty_like(logits), None, None,
            torch.ones(5),
        ),
    )
