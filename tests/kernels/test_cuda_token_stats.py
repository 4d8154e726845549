"""The streaming CUDA kernels of token statistics, emulated: layouts, memory that is shared, every order of threads."""

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from r1kernels import _library, testing

pytestmark = pytest.mark.skipif(not _library.EMULATED, reason="for the emulated CUDA kernels")

DTYPES = _library.NATIVE_DTYPES
PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a == b or a == torch.float32]
VOCABS = [1, 7, 8, 4096, 8193, 33_001, 70_000]  # around a vector, a tile, a segment
ROWS, T = 3, 0.8
ops = torch.ops.r1kernels_cuda


def in_other_memory(x: Tensor, layout: str) -> Tensor:
    """The same numbers where NaN surrounds them."""
    n, vocab = x.shape
    if layout == "transposed":
        return torch.cat([x, x]).t().contiguous().t()[:n]
    step = 2 if layout == "every other" else 1
    wide = torch.full((n, step * vocab + 16), torch.nan, dtype=x.dtype)
    first = 0 if layout == "padded" else 1
    view = wide[:, first : first + step * vocab : step]
    view.copy_(x)
    return view


@pytest.fixture
def emulator() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(os.environ["R1KERNELS_CUDA_EMULATOR"])
    library.r1k_emulator_seed.argtypes = [ctypes.c_uint64]
    library.r1k_emulator_properties.argtypes = [ctypes.c_int] * 3 + [ctypes.c_size_t]
    yield library
    library.r1k_emulator_seed(1)
    library.r1k_emulator_properties(9, 0, 4, 227 * 1024)


class Case:
    """Three rows, the second without a gradient; temperatures of their own, or one; a softcap, or none."""

    def __init__(self, dtype: torch.dtype, vocab: int, softcap: float = 0.0, entropy: bool = True) -> None:
        self.softcap = softcap
        u = testing.random_logits(ROWS, vocab, scale=3, seed=vocab)
        self.logits = (softcap * torch.tanh(u / softcap) if softcap else u).to(dtype)
        self.ids = torch.tensor([vocab - 1, 0, vocab // 2])
        self.temperatures = torch.tensor([0.5, 2.0, 1.3]) if softcap else None
        self.g = torch.randn(ROWS, generator=testing.generator(1))
        self.eta = torch.randn(ROWS, generator=testing.generator(2)) if entropy else None
        for weights in (self.g, self.eta):
            if weights is not None:
                weights[1] = 0
        _, self.lse, self.entropy = ops.token_stats(self.logits, self.ids, None, T, self.temperatures)

    def expected(self) -> testing.Expected:
        t = T * (torch.ones(ROWS) if self.temperatures is None else self.temperatures).double()[:, None]
        eta = 0 * self.g if self.eta is None else self.eta
        exact = testing.token_stats_gradient(self.logits.double() / t, self.ids, self.g, eta)
        slope = 1 - (self.logits.double() / self.softcap) ** 2 if self.softcap else torch.ones(1, 1)
        return testing.Expected(exact.value * slope / t, exact.terms / t * (slope + 2 * bool(self.softcap)))

    def into(self, out: Tensor, logits: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        ops.token_stats_backward_out(
            self.logits if logits is None else logits, self.ids, self.lse, self.entropy, self.g, self.eta, T,
            self.temperatures, self.softcap, rows, out,
        )
        return out if rows is None else out[: len(rows)]


# ---- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_bits_do_not_depend_on_memory(dtype: torch.dtype, vocab: int) -> None:
    logits = testing.random_logits(ROWS, vocab, dtype=dtype, scale=8)
    ids = testing.random_ids(ROWS, vocab=vocab)
    results = ops.token_stats(logits, ids, None, T)
    exact, lse = testing.token_stats(logits, ids, T), (logits.double() / T).logsumexp(-1)
    for result, value in zip(results, (exact.logprobs, lse, exact.entropy), strict=True):
        testing.assert_within(result, value, 4e-6)
    for layout in ("padded", "misaligned", "every other", "transposed"):
        others = ops.token_stats(in_other_memory(logits, layout), ids, None, T)
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def test_temperatures_and_masked_rows() -> None:
    logits, ids = testing.random_logits(5, 9000, dtype=torch.bfloat16), testing.random_ids(5, vocab=9000)
    temperatures = torch.tensor([0.5, torch.nan, 1.0, 3.0, torch.nan])
    mask = torch.tensor([True, False, True, True, False])
    ids[1], ids[4] = -100, 9000
    results = ops.token_stats(logits, ids, mask, T, temperatures)
    for n in range(5):
        for result, alone in zip(results, ops.token_stats(
            logits[n : n + 1], ids[n : n + 1], mask[n : n + 1], T * temperatures[n].item() if mask[n] else 1.0
        ), strict=True):
            assert torch.equal(result[n : n + 1], alone) and (mask[n] or not alone.any())


def test_launches_that_do_not_overlap(emulator: ctypes.CDLL) -> None:
    logits, ids = testing.random_logits(ROWS, 33_001), testing.random_ids(ROWS, vocab=33_001)
    results = ops.token_stats(logits, ids, None, T)
    emulator.r1k_emulator_properties(8, 0, 4, 163 * 1024)
    assert all(torch.equal(a, b) for a, b in zip(results, ops.token_stats(logits, ids, None, T), strict=True))


# ---- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "narrow"), PAIRS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize(("softcap", "entropy"), [(0.0, False), (0.0, True), (7.0, True)])
def test_gradient_in_any_memory(
    dtype: torch.dtype, narrow: torch.dtype, vocab: int, softcap: float, entropy: bool, emulator: ctypes.CDLL
) -> None:
    """Fresh, padded, misaligned or the logits' own, in any order of threads: the same bits."""
    case = Case(dtype, vocab, softcap, entropy)
    fresh = case.into(torch.empty(ROWS, vocab, dtype=narrow))
    testing.assert_within(fresh, case.expected())
    assert not fresh[1].any()
    rows = torch.tensor([0, 2])
    assert torch.equal(case.into(torch.empty(ROWS, vocab, dtype=narrow), rows=rows), fresh[rows])
    for layout in ("padded", "misaligned", "every other", "transposed"):
        logits = in_other_memory(case.logits, layout)
        assert torch.equal(case.into(torch.empty(ROWS, vocab, dtype=narrow), logits), fresh)
    for layout in ("padded", "misaligned"):
        out = in_other_memory(torch.zeros(ROWS, vocab, dtype=narrow), layout)
        around = out._base.isnan().sum()
        assert torch.equal(case.into(out), fresh) and out._base.isnan().sum() == around
    for seed in range(3):
        emulator.r1k_emulator_seed(seed)
        for layout in ("contiguous", "padded", "misaligned"):
            memory = case.logits.clone() if layout == "contiguous" else in_other_memory(case.logits, layout)
            whole = memory if memory._base is None else memory._base
            skipped = (memory.data_ptr() - whole.data_ptr()) // narrow.itemsize
            out = memory if narrow == dtype else whole.view(narrow)[:, skipped : skipped + vocab]
            assert torch.equal(case.into(out, memory), fresh)


def test_one_gradient_alone_is_enough() -> None:
    case = Case(torch.float32, 5000)
    arguments = case.logits, case.ids, case.lse, case.entropy
    for g, eta in ((case.g, None), (None, case.eta)):
        zeros = torch.zeros(ROWS)
        result = ops.token_stats_backward(*arguments, g, eta, T)
        assert torch.equal(
            result, ops.token_stats_backward(*arguments, zeros if g is None else g, zeros if eta is None else eta, T)
        )


# ---- bad input ------------------------------------------------------------------------------------------------


def refused(message: str, function: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=f"r1kernels: {message}"):
        function()


def test_bad_memory_is_refused() -> None:
    case = Case(torch.float32, 40)
    memory = torch.zeros(ROWS + 1, 40)
    memory[:ROWS] = case.logits
    refused("out overlaps logits", lambda: case.into(memory[1:], memory[:ROWS]))
    refused("out overlaps logits", lambda: case.into(memory.view(torch.bfloat16)[:ROWS, 40:], memory[:ROWS]))
    refused("out must be", lambda: case.into(torch.empty(ROWS, 41)))
    refused("out must be", lambda: case.into(torch.empty(40, ROWS).t()))
    rows = torch.tensor([0, 2])
    refused("rows was given with an out in the memory", lambda: case.into(memory[:ROWS], memory[:ROWS], rows))
    refused("rows holds an index outside", lambda: case.into(torch.empty(ROWS, 40), rows=torch.tensor([0, ROWS])))
    narrow = Case(torch.bfloat16, 40)
    refused("out must have the dtype of logits", lambda: narrow.into(torch.empty(ROWS, 40)))
    refused("temperatures must be contiguous", lambda: ops.token_stats(case.logits, case.ids, None, T, torch.ones(2)))
    refused("mask must be contiguous", lambda: ops.token_stats(case.logits, case.ids, torch.ones(ROWS), T))


@pytest.mark.parametrize("vocab", [40, 40_000])
@pytest.mark.parametrize("bad", [-1, 40_000, 2**40])
def test_ids_outside_the_vocabulary(vocab: int, bad: int) -> None:
    case = Case(torch.float32, vocab)
    case.ids[2] = bad
    refused("token_ids holds an id outside", lambda: ops.token_stats(case.logits, case.ids, None, T))
    refused("token_ids holds an id outside", lambda: case.into(torch.empty(ROWS, vocab)))
    case.g[2] = case.eta[2] = 0
    assert not case.into(torch.empty(ROWS, vocab))[2].any()
