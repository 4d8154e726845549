"""The ids of the largest entries of rows: every route gives those of a stable sort."""

from collections.abc import Callable

import pytest
import torch
from backends import host_code, registration_only, without_cuda_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1kernels import _library, backend, testing
from r1kernels.ops.topk_choice import chosen_ids, top_k_ids

pytestmark = without_cuda_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected_ids(logits: Tensor, k: int) -> Tensor:
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 64, 700, 33_000])
def test_ids_of_a_stable_sort(isa: str, vocab: int, dtype: torch.dtype) -> None:
    """16-bit logits have many equal entries."""
    logits = testing.random_logits(3, vocab, dtype=dtype)
    for k in sorted({1, min(5, vocab), min(64, vocab), vocab if vocab < 1000 else 600}):
        assert torch.equal(top_k_ids(logits, k), expected_ids(logits, k)), k


ROWS: dict[str, Callable[[], Tensor]] = {
    "ascending": lambda: torch.arange(3000.0),
    "descending": lambda: -torch.arange(3000.0),
    "all equal": lambda: torch.zeros(3000),
    "three values": lambda: torch.randint(0, 3, (3000,), generator=testing.generator(0)).float(),
    "zeros of both signs": lambda: torch.tensor([0.0, -0.0]).repeat(500),
    "nothing but -inf": lambda: torch.full((3000,), -torch.inf),
    "mostly -inf": lambda: torch.full((3000,), -torch.inf).index_fill_(0, torch.tensor([2999, 7, 1500]), 1.0),
    "one +inf": lambda: torch.zeros(3000).index_fill_(0, torch.tensor([1234]), torch.inf),
    "all large ones in a group": lambda: torch.zeros(3000).index_fill_(0, torch.arange(512, 640), 5.0),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_hard_to_select_from(isa: str, name: str) -> None:
    row = ROWS[name]()
    for k in (1, 3, 64, 900):
        assert torch.equal(top_k_ids(row, k), expected_ids(row, k)), k
        with backend("reference"):  # keys of torch
            assert torch.equal(top_k_ids(row, k), expected_ids(row, k)), k


def test_a_row_with_nan_gets_distinct_ids(implementation: str) -> None:
    logits = testing.random_logits(4, 300)
    logits[0] = torch.nan
    logits[1, ::3] = torch.nan
    logits[2, 7:] = torch.nan
    ids = top_k_ids(logits, 20)
    assert all(len(set(row)) == 20 and min(row) >= 0 and max(row) < 300 for row in ids.tolist())
    assert torch.equal(ids[3], expected_ids(logits[3], 20))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "without the last position": lambda x: x[:, :-1],
    "vocabulary not last in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other entry": lambda x: x[..., 1::2],
    "unaligned rows": lambda x: x[..., 1:],
    "one row": lambda x: x[0, 0],
    "no rows": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", STRIDED)
def test_strided_logits(implementation: str, view: str, dtype: torch.dtype) -> None:
    logits = STRIDED[view](testing.random_logits(2, 3, 200, dtype=dtype))
    assert torch.equal(top_k_ids(logits, 9), expected_ids(logits, 9))


@given(
    vocab=st.integers(1, 400), seed=st.integers(0, 1000), levels=st.integers(1, 50), k=st.integers(1, 400),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_all_routes_agree(vocab: int, seed: int, levels: int, k: int, dtype: torch.dtype) -> None:
    """Also of few different logits, so that most are equal."""
    levels_of = torch.randint(0, levels, (3, vocab), generator=testing.generator(seed)) - levels // 2
    logits, k = (levels_of / 3).to(dtype), min(k, vocab)
    for name in ("reference", testing.KERNELS if dtype != torch.float64 else "reference"):
        with backend(name):
            assert torch.equal(top_k_ids(logits, k), expected_ids(logits, k)), name


@host_code
@given(vocab=st.integers(1, 60), seed=st.integers(0, 1000), k=st.integers(1, 60))
def test_the_union_has_every_id_once(vocab: int, seed: int, k: int) -> None:
    k = min(k, vocab)
    pair = [torch.randint(0, 9, (4, vocab), generator=testing.generator(seed + n)).float() for n in range(2)]
    ids, present = chosen_ids(*pair, k, "union")
    for row, (listed, kept) in enumerate(zip(ids, present, strict=True)):
        both = [set(expected_ids(logits[row], k).tolist()) for logits in pair]
        assert sorted(listed[kept].tolist()) == sorted(both[0] | both[1])
        assert kept[:k].all() and (listed[~kept] == listed[0]).all()


@pytest.mark.not_on("triton", "cuda", reason="a kernel of the CPU")
@pytest.mark.skipif(_library.extension is None, reason="the compiled extension is missing")
@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(RuntimeError, match=f"k is {k}, expected a number from 1 to V = 5"):
        torch.ops.r1kernels.top_k_ids(torch.zeros(2, 5), k)


@registration_only
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.r1kernels.top_k_ids, (torch.randn(2, 3, 7), 3))
