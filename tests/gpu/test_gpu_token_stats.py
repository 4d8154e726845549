"""On a GPU: log-probs and entropy of tokens from logits, at the sizes of models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_cases import (
    DEVICE,
    KERNELS,
    LOGITS,
    assert_as_good,
    compare,
    ids_of,
    logits_of,
    needs_device,
    needs_gpu,
    on_device,
    ours,
    size,
)
from torch import Tensor

import r1kernels
from r1kernels import testing, token_logprobs, token_logprobs_and_entropy
from r1kernels.ops import token_stats
from r1kernels.testing.budget import GPU_ROUNDINGS

pytestmark = needs_gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL = size(151_936, 1_031)
BLOCK = 256  # rows compared at a time: their float64 numbers are 300 MB
BAR = 2e-6  # of log-probs and entropies, in nats, of logits within [-32, 32]


@pytest.fixture(autouse=True, params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with ours(request.param):
        yield


def both(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return token_logprobs_and_entropy(logits, token_ids, temperature=temperature)


# ---- 1, 2. against float64 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, vocab", [(size(2048, 5), REAL), (size(512, 3), size(32_001, 77)), (3, 1000)])
def test_values_and_gradients(dtype: torch.dtype, tokens: int, vocab: int) -> None:
    """Many rows and few, long and short, of a length that no tile divides."""
    inputs = {"logits": logits_of(tokens, vocab, dtype=dtype), "token_ids": ids_of(tokens, vocab=vocab)}
    logits = inputs["logits"].requires_grad_()
    values = both(logits, inputs["token_ids"], temperature=0.9)
    g, eta = on_device(tokens, seed=3), on_device(tokens, seed=4)
    (grad,) = torch.autograd.grad(values, logits, (g, eta))
    for rows in torch.arange(tokens, device=DEVICE).split(BLOCK):
        block, ids = logits.detach()[rows], inputs["token_ids"][rows]
        exact = testing.token_stats(block, ids, 0.9)
        testing.assert_within(values[0][rows], exact.logprobs, BAR)
        testing.assert_within(values[1][rows], exact.entropy, BAR)
        gradient = testing.token_stats_gradient(block, ids, g[rows], eta[rows], 0.9)
        testing.assert_within(grad[rows], gradient.value, gradient.budget(dtype, GPU_ROUNDINGS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_place_is_the_gradient(dtype: torch.dtype) -> None:
    logits, ids = logits_of(size(1024, 6), REAL, dtype=dtype), ids_of(size(1024, 6), vocab=REAL)
    _, lse, entropy = token_stats.statistics(logits, ids, None, 1.0, None)
    g, eta = on_device(len(ids), seed=3), on_device(len(ids), seed=4)
    given = {"temperature": 1.0, "temperatures": None, "softcap": 0.0, "rows": None}
    fresh = token_stats.gradient_into(torch.empty_like(logits), logits, ids, lse, entropy, g, eta, **given)
    kept = logits.clone()
    assert torch.equal(token_stats.gradient_into(kept, kept, ids, lse, entropy, g, eta, **given), fresh)


def test_gradient_in_place_narrows_a_float32_chunk_to_16_bits() -> None:
    """As the walk over a head's chunks does."""
    logits, ids = logits_of(size(1024, 6), REAL, dtype=torch.float32), ids_of(size(1024, 6), vocab=REAL)
    _, lse, entropy = token_stats.statistics(logits, ids, None, 0.7, None)
    g = on_device(len(ids), seed=3)
    given = {"temperature": 0.7, "temperatures": None, "softcap": 0.0, "rows": None}
    fresh = logits.new_empty(logits.shape, dtype=torch.bfloat16)
    expected = token_stats.gradient_into(fresh, logits, ids, lse, entropy, g, None, **given)
    work = logits.clone()
    narrow = work.view(torch.bfloat16)[:, :REAL]
    assert torch.equal(token_stats.gradient_into(narrow, work, ids, lse, entropy, g, None, **given), expected)
    rows = torch.arange(0, len(ids), 2, device=DEVICE)  # of chosen rows, moved to the top
    fresh = token_stats.gradient_into(torch.empty_like(fresh), logits, ids, lse, entropy, g, None,
                                      **(given | {"rows": rows}))
    assert torch.equal(fresh, expected[rows])


# ---- 3. opcheck, 4. compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, ids = logits_of(3, 40, dtype=dtype), ids_of(3, vocab=40)
    mask = torch.tensor([True, False, True], device=DEVICE)
    torch.library.opcheck(torch.ops.r1kernels.token_stats, (logits, ids, mask, 0.7))
    _, lse, entropy = torch.ops.r1kernels.token_stats(logits, ids, None, 0.7)
    arguments = (logits, ids, lse, entropy, on_device(3), on_device(3, seed=1), 0.7)
    torch.library.opcheck(torch.ops.r1kernels.token_stats_backward, arguments)


@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
def test_compile_fullgraph() -> None:
    logits, ids = logits_of(3, 4, 33, dtype=torch.float32).requires_grad_(), ids_of(3, 4, vocab=33)

    def run(logits: Tensor) -> Tensor:
        return sum(both(logits * 2, ids, temperature=0.8)).square().sum()

    values = [function(logits) for function in (run, testing.compiled(run))]
    grads = [torch.autograd.grad(value, logits)[0] for value in values]
    assert torch.equal(*(value.detach() for value in values)) and torch.equal(*grads)


# ---- 5. edges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, vocab", [(0, 100), (1, 1), (5, 1), (1, REAL), (2, 7)])
def test_no_rows_and_one_entry(tokens: int, vocab: int) -> None:
    inputs = {"logits": logits_of(tokens, vocab), "token_ids": ids_of(tokens, vocab=vocab)}
    compare(both, inputs, ("logits",), near=LOGITS)


def test_forbidden_tokens_have_log_prob_minus_infinity() -> None:
    logits = logits_of(6, REAL, dtype=torch.float32)
    logits[:, ::3] = -torch.inf
    logits[5, 1:] = -torch.inf
    ids = torch.tensor([1, 2, 3, 4, 5, 0], device=DEVICE)
    logits[5, 0] = 1.0
    got = compare(both, {"logits": logits, "token_ids": ids}, (), near=LOGITS)
    assert got[0][2] == -torch.inf and got[0][5] == 0


def _strided(kind: str) -> Tensor:
    vocab = size(32_003, 77)
    return {
        "columns": lambda: logits_of(vocab, 24).T,
        "every second": lambda: logits_of(24, 2 * vocab)[:, ::2],
        "slice of steps": lambda: logits_of(4, 7, vocab)[:, :-1],
        "transposed steps": lambda: logits_of(6, 4, vocab).transpose(0, 1),
        "unaligned": lambda: logits_of(24 * vocab + 1)[1:].view(24, vocab),
        "padded rows": lambda: logits_of(24, vocab + 3)[:, :vocab],
        "repeated": lambda: logits_of(1, vocab).expand(24, vocab),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["columns", "every second", "slice of steps", "transposed steps", "unaligned", "padded rows", "repeated"]
)
def test_strides_and_alignment_change_no_bit_of_the_values(kind: str) -> None:
    logits = _strided(kind)
    ids = ids_of(*logits.shape[:-1], vocab=logits.shape[-1])
    compare(both, {"logits": logits, "token_ids": ids}, ("logits",), near=LOGITS)
    vocab = logits.shape[-1]
    aligned = torch.empty(*logits.shape[:-1], -(-vocab // 16) * 16, dtype=logits.dtype, device=DEVICE)[..., :vocab]
    aligned.copy_(logits)
    for found, expected in zip(both(logits, ids), both(aligned, ids), strict=True):
        assert torch.equal(found, expected)


def test_a_row_alone_has_the_bits_of_a_row_among_others() -> None:
    """Only one row of eight starts at a multiple of 16 bytes, but one row alone does."""
    logits, ids = logits_of(9, size(32_001, 77)), ids_of(9, vocab=size(32_001, 77))
    whole = both(logits, ids)
    for n in range(9):
        for found, expected in zip(both(logits[n], ids[n]), whole, strict=True):
            assert torch.equal(found, expected[n])


def test_more_than_2_to_the_31_entries() -> None:
    tokens, few = size(16_384, 40), 4
    logits, ids = logits_of(tokens, REAL).requires_grad_(), ids_of(tokens, vocab=REAL)
    logprobs, entropy = both(logits, ids)
    g = on_device(tokens, seed=3)
    (grad,) = torch.autograd.grad(logprobs, logits, g)
    for rows in (slice(0, few), slice(tokens - few, tokens), slice(tokens // 2 - few, tokens // 2 + few)):
        with r1kernels.backend("reference"):
            plain, exact = (
                _statistics_and_gradient(x.requires_grad_(), ids[rows], g[rows])
                for x in (logits.detach()[rows].clone(), logits.detach()[rows].double())
            )
        for found, same_dtype, true, near in zip(
            (logprobs, entropy, grad), plain, exact, (LOGITS, LOGITS, 0.0), strict=True
        ):
            assert_as_good(found.detach()[rows], true, same_dtype, near)


def _statistics_and_gradient(logits: Tensor, ids: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    logprobs, entropy = both(logits, ids)
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(logprobs, logits, g.to(logprobs.dtype))


@needs_device
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: there is no other device")
    other = torch.device("cuda", 1)
    logits, ids = logits_of(64, REAL), ids_of(64, vocab=REAL)
    expected = both(logits, ids)
    assert torch.cuda.current_device() == 0
    for found, value in zip(both(logits.to(other), ids.to(other)), expected, strict=True):
        assert found.device == other and torch.equal(found.cpu(), value.cpu())


def test_the_number_of_other_rows_changes_no_bit() -> None:
    logits, ids = logits_of(size(300, 20), REAL), ids_of(size(300, 20), vocab=REAL)
    whole = token_logprobs(logits, ids)
    assert torch.equal(token_logprobs(logits[:3], ids[:3]), whole[:3])
    assert torch.equal(token_logprobs(logits[-1:], ids[-1:]), whole[-1:])
