"""Two accumulators of the product: `flush` steps in the first, then it is added to the second.

The results are checked under the interpreter (test_triton_interpreter.py), what the tile compiles to without it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from r1kernels import _library

pytest.importorskip("triton", reason="the kernels are Triton's, which is not installed")

from r1kernels.triton import aot, linear_statistics

interpreted = pytest.mark.skipif(not _library.INTERPRETED, reason="runs the kernels under Triton's interpreter")
compiled = pytest.mark.not_on("triton", "cuda", reason="compiles the kernels of Triton, once is enough")

TOKENS, VOCAB = 5, 40  # three tiles of words, two in the first program
STEP = 16
WIDTHS = {"whole steps": 6 * STEP, "a tail": 5 * STEP + 8, "an odd tail": 5 * STEP + 3}  # six steps each
FLUSHES = (1, 2, 3, 4, 5)  # 4 and 5 do not divide six


def statistics(hidden: Tensor, weight: Tensor, flush: int, block_m: int, bias: Tensor | None = None) -> Any:
    """Of tokens 0, 1, ..., with small tiles. block_m: 128 takes the kernel of heads without bias."""
    def config(shape: Any, dtype: Any, device: Any, batch_invariant: bool, aligned: bool, plain: bool) -> Any:
        return linear_statistics.Config(block_m, 16, STEP, 4, 1, aligned, aligned, tiles=2, flush=flush)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_statistics, "config", config)
        ids = torch.arange(len(hidden)) * 7
        return linear_statistics.linear_statistics(hidden, weight, bias, ids, None, 1.0, None, 1.0, 0.0, False)


@interpreted
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_m", [16, 128])
def test_exact_sums_have_the_same_bits(block_m: int, width: str) -> None:
    """Of integers, which no order of additions rounds."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randint(-3, 4, (rows, WIDTHS[width]), generator=rng).bfloat16() for rows in (TOKENS, VOCAB)
    )
    expected = statistics(hidden, weight, 0, block_m)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(TOKENS), torch.arange(TOKENS) * 7]
    torch.testing.assert_close(expected[0].double(), exact, rtol=1e-6, atol=1e-6)
    for flush in FLUSHES:
        for found, each in zip(statistics(hidden, weight, flush, block_m), expected, strict=True):
            assert torch.equal(found, each), flush


@interpreted
@pytest.mark.parametrize("flush", FLUSHES)
def test_every_interval_is_summed_by_itself(flush: int) -> None:
    """2^24, and ones that a sum that large loses: two of an interval are kept where they meet before they join it."""
    steps, width = 6, 6 * STEP
    hidden, weight = torch.zeros(TOKENS, width), torch.zeros(VOCAB, width)
    hidden[:, ::STEP] = torch.tensor([4096.0, 1, 1, 1, 1, 1])
    weight[:, ::STEP] = torch.randint(0, 2, (VOCAB, steps), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0] = 4096
    sums = torch.zeros(VOCAB)
    for begin in range(0, steps, flush):
        interval = torch.zeros(VOCAB)
        for step in range(begin, min(begin + flush, steps)):
            interval += hidden[0, step * STEP] * weight[:, step * STEP]
        sums += interval
    expected = sums.double().log_softmax(-1)[torch.arange(TOKENS) * 7]
    found = statistics(hidden.bfloat16(), weight.bfloat16(), flush, 128, torch.zeros(VOCAB).bfloat16())[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@interpreted
def test_random_products_are_as_close_to_float64() -> None:
    rng = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, WIDTHS["a tail"], generator=rng).bfloat16()
    weight = torch.randn(VOCAB, WIDTHS["a tail"], generator=rng).bfloat16()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(TOKENS), torch.arange(TOKENS) * 7]
    errors = {flush: (statistics(hidden, weight, flush, 128)[0] - exact).abs().max() for flush in (0, *FLUSHES)}
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert max(errors.values()) <= 2 * (errors[0] + rounding), errors


@compiled
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.slow(reason="compiles large tiles")
def test_the_tile_compiles_with_few_spills(arch: str) -> None:
    """None on sm_90. Triton 3.9 spills some on sm_100, once a tile."""
    device = aot.DEVICES[arch]
    tile = linear_statistics.flushed_tile(device)
    assert tile is not None and tile.flush > 0
    for plain in (True, False):
        found = aot.compile_variant(linear_statistics.tile_variant(tile, plain, torch.bfloat16), device)
        most = 0 if arch == "sm_90" else 512
        assert max(found.spills.values()) <= most and found.instructions["matrix"]
        assert found.shared <= aot.SHARED_LIMIT[arch]


def test_both_tiles_are_tried_and_the_fast_one_is_the_default() -> None:
    device = aot.DEVICES["sm_90"]
    space = linear_statistics.search_space(device)
    assert {tile.flush for tile in space} == {0, 4}
    assert linear_statistics.config((8192, 151_936, 4096), torch.bfloat16, device, False) == space[0]


def test_a_table_can_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many aligned rows, of its dtype alone."""
    device = aot.DEVICES["sm_90"]
    chosen = linear_statistics.search_space(device)[1]

    def tuned(op: str, name: str, dtype: torch.dtype, size: int) -> dict[str, int] | None:
        return chosen._asdict() if dtype == torch.bfloat16 and size > 100_000 else None

    def flush_of(count: int, dtype: torch.dtype = torch.bfloat16, invariant: bool = False, aligned: bool = True) -> int:
        return linear_statistics.config((count, 151_936, 4096), dtype, device, invariant, aligned).flush

    before = list(linear_statistics.variants(device))
    monkeypatch.setattr(linear_statistics, "tuned", tuned)
    monkeypatch.setattr(linear_statistics, "SIZES", (1000, 151_936))
    assert linear_statistics.config((8192, 151_936, 4096), torch.bfloat16, device, False) == chosen
    assert flush_of(8192) == flush_of(16, invariant=True) == chosen.flush
    assert flush_of(8192, torch.float16) == flush_of(16) == flush_of(8192, aligned=False) == 0
    added = [each for each in linear_statistics.variants(device) if each not in before]
    assert [each.constants["FLUSH"] for each in added] == [chosen.flush] * 2
