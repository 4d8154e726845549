"""Token statistics at the edges: strides, -inf, masked rows, ids out of range, row independence, 2^31 elements."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backends import checks_only, slow_interpreted
from torch import Tensor

from r1kernels import _dispatch, backend, testing, token_logprobs, token_logprobs_and_entropy
from r1kernels.ops.token_stats import token_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> None:
    """Values and the gradient of random weights on both outputs, against the oracle; NaN and inf count as values."""
    g, eta = (torch.randn(ids.shape, generator=testing.generator(seed)) for seed in (1, 2))
    source = logits.detach().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(source, ids, temperature=temperature)
    (grad,) = torch.autograd.grad((logprobs, entropy), source, (g, eta))
    exact = testing.token_stats(logits, ids, temperature)
    slack = 2 * testing.EPS32 * torch.where(exact.log_p.isfinite(), exact.log_p.abs(), 0).amax(-1) + testing.EPS32
    testing.assert_within(logprobs, exact.logprobs, slack)
    testing.assert_within(entropy, exact.entropy, slack)
    expected = testing.token_stats_gradient(logits, ids, g, eta, temperature)
    if _dispatch._requested == "reference":  # autograd through fp32 probabilities
        budget = expected.budget(grad.dtype) + slack.unsqueeze(-1) * (1 + g.abs() + eta.abs()).unsqueeze(-1)
        testing.assert_within(grad, expected.value, budget)
    else:
        testing.assert_within(grad, expected)


# ---- every instruction set ------------------------------------------------------------------------------------


@pytest.mark.not_on("triton", "cuda", reason="instruction sets of a CPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 3, 8, 33, 2047, 2049, 5000])
@pytest.mark.parametrize("step", [1, 2])
def test_instruction_sets_keep_to_the_same_budget(isa: str, dtype: torch.dtype, vocab: int, step: int) -> None:
    logits = testing.random_logits(5, vocab * step, dtype=dtype, scale=8)[:, ::step]
    logits[1, vocab // 2] = -math.inf if vocab > 1 else 0
    check(logits, torch.full((5,), vocab - 1), temperature=0.7)


@slow_interpreted
@pytest.mark.parametrize("vocab", [17, 2049, 151_936])
def test_many_equal_terms_do_not_drift(isa: str, vocab: int) -> None:
    """One peak over a flat floor: every addition of the floor rounds the same way."""
    peaks = torch.arange(1.0, 17.0)
    logits = torch.zeros(len(peaks), vocab)
    logits[:, vocab // 3] = peaks
    ids = torch.full((len(peaks),), vocab // 3)
    exact = testing.token_stats(logits, ids)
    logprobs, entropy = token_logprobs_and_entropy(logits, ids)
    testing.assert_within(logprobs, exact.logprobs, 4e-6)
    testing.assert_within(entropy, exact.entropy, 4e-6)


@pytest.mark.slow_on("triton", "cuda", reason="a row for each 16-bit number")
def test_every_bfloat16_and_float16_is_read_exactly(isa: str) -> None:
    """One row holds every finite 16-bit number in turn as its only difference to a row of zeros."""
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        logits = torch.stack([numbers, torch.zeros_like(numbers)], -1)
        logprobs = token_logprobs(logits, torch.ones(len(numbers), dtype=torch.int64))
        exact = -torch.nn.functional.softplus(numbers.double(), threshold=700)
        slack = 2 * testing.EPS32 * exact.abs() + torch.finfo(torch.float64).eps
        testing.assert_within(logprobs, exact, testing.rounding(exact, torch.float32) + slack)


@pytest.mark.slow_on("cuda", reason="a row for each 16-bit number")
@pytest.mark.not_on("triton", reason="the interpreter truncates where a GPU rounds")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """dL/dx of two equal logits is g/2 exactly: every fp32 g must come back rounded as torch rounds it."""
    g = torch.randn(4000, generator=testing.generator(0)) * torch.logspace(-9, 4, 4000)
    g[:3] = torch.tensor([2 * (1 + torch.finfo(dtype).eps / 2), 2 * (1 + torch.finfo(dtype).eps * 3 / 2), 1e30])
    logits = torch.zeros(4000, 2, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(token_logprobs(logits, torch.zeros(4000, dtype=torch.int64)), logits, g)
    assert torch.equal(grad[:, 0], (g / 2).to(dtype))
    assert torch.equal(grad[:, 1], (-g / 2).to(dtype))


@pytest.mark.not_on("triton", "cuda", reason="subnormal numbers cost nothing on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [1.0, 1e-3])
def test_no_gradient_is_subnormal(isa: str, dtype: torch.dtype, slope: float) -> None:
    """A product that reads a subnormal number takes a hundred cycles. What is below 2^-126 becomes 0."""
    logits = torch.linspace(0, -140, 4001).to(dtype).expand(2, -1).requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0, 5]))
    (grad,) = torch.autograd.grad((logprobs, entropy), logits, (torch.tensor([slope, 0.0]), torch.tensor([0.0, slope])))
    tiny = torch.finfo(torch.float32).tiny
    assert ((grad == 0) | (grad.abs() >= tiny)).all()
    assert (grad[:, -300:] == 0).all() and (grad[:, 1:2000] != 0).all()
    assert torch.tensor([tiny]).mul(0.5).item() > 0  # outside the kernels subnormal numbers remain


@pytest.mark.not_on("triton", "cuda", reason="powers of two are taken apart on CPUs only")
def test_gradients_near_the_largest_float32(isa: str) -> None:
    """Within its range a gradient is finite, whatever the slope; beyond it is infinite, and never wraps around."""
    def gradient(logits: list[float], slope: float, temperature: float = 1.0) -> Tensor:
        source = torch.tensor([logits], requires_grad=True)
        logprobs = token_logprobs(source, torch.tensor([0]), temperature=temperature)
        return torch.autograd.grad(logprobs, source, torch.tensor([slope]))[0][0]

    largest = gradient([-10.0, 3.0, -3.0], 3e38)
    assert torch.allclose(largest.double(), 3e38 * torch.tensor([1.0, -0.997525, -0.002473]).double(), rtol=1e-3)
    assert gradient([3.0, -3.0, 3.0], 1e38, 1e-3).tolist()[2] == -math.inf


# ---- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (3, 0, 5)])
def test_no_tokens(shape: tuple[int, ...], implementation: str) -> None:
    logits = torch.empty(shape, requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.empty(shape[:-1], dtype=torch.int64))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == shape[:-1]
    assert logits.grad.shape == shape


def test_one_word_vocabulary_is_certain(implementation: str) -> None:
    logits = torch.tensor([[3.0], [-1e30], [0.1]], requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.zeros(3, dtype=torch.int64))
    (logprobs.sum() + entropy.sum()).backward()
    for value in (logprobs, entropy, logits.grad):
        assert not value.any()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 1, 3, 2)])
def test_leading_dimensions(lead: tuple[int, ...], implementation: str) -> None:
    check(testing.random_logits(*lead, 37), testing.random_ids(*lead, vocab=37))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integer_types_of_ids(dtype: torch.dtype, implementation: str) -> None:
    check(testing.random_logits(4, 37), testing.random_ids(4, vocab=37).to(dtype))


# ---- strides ----------------------------------------------------------------------------------------------

STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "without the last position": lambda x: x[:, :-1],
    "without the first position": lambda x: x[:, 1:],
    "vocabulary not last in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch and time swapped": lambda x: x.transpose(0, 1),
    "every other word": lambda x: x[..., ::2],
    "every other word, odd": lambda x: x[..., 1::2],
    "every other position": lambda x: x[:, ::2],
    "padded vocabulary cut off": lambda x: x[..., :-3],
    "unaligned rows": lambda x: x[..., 1:],
    "one row for all": lambda x: x[:1, :1].expand(2, 4, -1),
    "one logit for all": lambda x: x[..., :1].expand(-1, -1, 21),
    "reversed by index": lambda x: x.flip(1)[:, 1:],
}


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_logits_are_read_in_place(view: str, dtype: torch.dtype, implementation: str) -> None:
    logits = STRIDED[view](testing.random_logits(2, 4, 4099, dtype=dtype))
    check(logits, testing.random_ids(*logits.shape[:-1], vocab=logits.shape[-1]))


def test_strides_of_dimensions_of_one_say_nothing(implementation: str) -> None:
    x = testing.random_logits(3, 2, 4, 2, 50)
    views = x[:, :1, 0, 0], x[:, 1:, :, 0], x[:1, :, :1, :1], x[:, :1, :1, :1], x[:1, 1:, 1:2, 1:], x[:, 1, 1:2]
    for logits in views:
        check(logits, testing.random_ids(*logits.shape[:-1], vocab=50))


def test_strided_ids_and_incoming_gradient(implementation: str) -> None:
    logits = testing.random_logits(4, 6, 19, seed=3)
    ids = testing.random_ids(6, 4, vocab=19).t()
    weight = torch.randn(6, 8, generator=testing.generator(4))[:, ::2]
    results = []
    for given_ids, given_weight in ((ids, weight), (ids.contiguous(), weight.contiguous())):
        source = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(source, given_ids)
        torch.autograd.backward((logprobs.t(), entropy.t()), (given_weight, 2 * given_weight))
        results.append((logprobs, entropy, source.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- -inf, inf and NaN in a row ---------------------------------------------------------------------------


def some(x: Tensor) -> Tensor:
    return x.masked_fill(torch.rand(x.shape, generator=testing.generator(4)) < 0.5, -math.inf)


def first_block(x: Tensor) -> Tensor:
    x[..., :2500] = -math.inf
    return x


def last_block(x: Tensor) -> Tensor:
    x[..., 2048:] = -math.inf
    return x


def all_but_the_target(x: Tensor) -> Tensor:
    x[..., :-1] = -math.inf
    return x


@pytest.mark.parametrize("forbid", [some, first_block, last_block, all_but_the_target])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [-1, 2100, 0])
def test_forbidden_words(forbid: Callable, dtype: torch.dtype, target: int, implementation: str) -> None:
    """-inf has probability 0: its log-prob is -inf, it adds 0 to the entropy and receives gradient 0."""
    logits = forbid(testing.random_logits(2, 5000, dtype=dtype))
    check(logits, torch.full((2,), target % 5000))


def test_a_row_without_any_word_is_nan_and_harms_no_other(implementation: str) -> None:
    logits = testing.random_logits(3, 50)
    logits[1] = -math.inf
    logits.requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([1, 2, 3]))
    (logprobs + entropy).sum().backward()
    for value in (logprobs, entropy, logits.grad.sum(-1)):
        assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 2047, 2048, 4999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_never_hidden(poison: float, position: int, dtype: torch.dtype, implementation: str) -> None:
    logits = testing.random_logits(3, 5000, dtype=dtype)
    logits[1, position] = poison
    for token in (7, position):
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([7, token, 7]))
        assert entropy.isnan().tolist() == [False, True, False]
        assert logprobs.isfinite().tolist() == [True, False, True]


# ---- masked rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_behind_the_mask_matters(dtype: torch.dtype, implementation: str) -> None:
    logits, ids = testing.random_logits(4, 6, 300, dtype=dtype), testing.random_ids(4, 6, vocab=300)
    mask = testing.random_ids(4, 6, vocab=2) == 1
    results = []
    for inputs in ((logits, ids), (testing.poisoned(logits, mask), testing.poisoned(ids, mask))):
        source = inputs[0].clone().requires_grad_()
        logprobs, entropy = token_stats(source, inputs[1], mask)
        torch.where(mask, 2 * logprobs - entropy, 0).sum().backward()
        results.append((logprobs, entropy, source.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert not poisoned[~mask].any()


def test_all_masked(implementation: str) -> None:
    logits = torch.full((2, 3, 7), math.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    logprobs, entropy = token_stats(logits, torch.full((2, 3), -100), mask)
    torch.where(mask, logprobs + entropy, 0).sum().backward()
    for value in (logprobs, entropy, logits.grad):
        assert not value.any()


# ---- a row depends on itself alone --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 4099])
def test_rows_do_not_depend_on_their_batch(
    dtype: torch.dtype, vocab: int, on_threads: Callable[[int], None]
) -> None:
    """Bit for bit: alone, in a batch, in another order, padded, with another number of threads."""
    many = 24 if testing.KERNELS == "cpu" else 5
    logits, ids = testing.random_logits(many, vocab, dtype=dtype, scale=8), testing.random_ids(many, vocab=vocab)

    def run(rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        source = logits[rows].clone().requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(source, ids[rows])
        (grad,) = torch.autograd.grad((logprobs, entropy), source, (logprobs.detach(), entropy.detach()))
        return logprobs, entropy, grad

    whole = run(slice(None))
    order = torch.randperm(many, generator=testing.generator(5))
    one_by_one = [run(slice(n, n + 1)) for n in range(many)]
    reordered = run(order)
    for k, value in enumerate(whole):
        assert torch.equal(value[order], reordered[k])
        assert torch.equal(value, torch.cat([row[k] for row in one_by_one]))
    for threads in (2, 3):
        on_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(None)), strict=True))


# ---- more than 2^31 elements ------------------------------------------------------------------------------


def available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024


@pytest.mark.skipif(not os.environ.get("R1KERNELS_TEST_LARGE"), reason="10 GiB and a minute: R1KERNELS_TEST_LARGE=1")
def test_more_than_two_to_the_31_elements() -> None:
    if available_bytes() < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    vocab, rows = 151_936, 2**31 // 151_936 + 10
    pattern = testing.random_logits(7, vocab, dtype=torch.bfloat16)
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16)
    for begin in range(0, rows, 7):
        logits[begin : begin + 7] = pattern[: rows - begin]
    assert logits.numel() > 2**31
    ids = testing.random_ids(rows, vocab=vocab)
    probed = torch.tensor([0, 1, rows // 2, 2**31 // vocab - 1, 2**31 // vocab, 2**31 // vocab + 1, rows - 1])
    g = torch.zeros(rows)
    g[probed] = torch.randn(len(probed), generator=testing.generator(1))

    logits.requires_grad_()
    with backend(testing.KERNELS):
        logprobs = token_logprobs(logits, ids)
        (grad,) = torch.autograd.grad(logprobs, logits, g)
    rows_of_probes = pattern[probed % 7]
    testing.assert_within(logprobs[probed], testing.token_stats(rows_of_probes, ids[probed]).logprobs, 4e-6)
    testing.assert_within(grad[probed], testing.token_stats_gradient(rows_of_probes, ids[probed], g[probed]))


# ---- bad input ----------------------------------------------------------------------------------------------

OK_LOGITS, OK_IDS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


def at(value: int, *position: int) -> Tensor:
    ids = OK_IDS.clone()
    ids[position] = value
    return ids


@checks_only
def test_operators_called_directly_do_not_read_outside_a_row() -> None:
    logits, ids = torch.zeros(2, 5), torch.tensor([1, -100])
    stats, g = torch.zeros(2, dtype=torch.float64), torch.ones(2)
    with pytest.raises(RuntimeError, match=r"token_ids\[1\] is -100, expected an id in \[0, 5\)"):
        torch.ops.r1kernels.token_stats_backward(logits, ids, stats, stats, g, None, 1.0)
    g[1] = 0  # a row without a gradient is not looked up
    grad = torch.ops.r1kernels.token_stats_backward(logits, ids, stats, stats, g, None, 1.0)
    assert grad[1].eq(0).all()
    for group_size in (0, 3):
        with pytest.raises(RuntimeError, match=f"group_size is {group_size}, expected a positive integer that divides"):
            torch.ops.r1kernels.group_advantages(torch.ones(4), None, group_size, 0, 1, 1e-4)


BAD_INPUTS = {
    "id too large": (ValueError, OK_LOGITS, at(5, 1, 1), {}, r"token_ids\[4\] is 5, expected an id in \[0, 5\)"),
    "id negative": (ValueError, OK_LOGITS, at(-1, 0, 2), {}, r"token_ids\[2\] is -1, expected an id in \[0, 5\)"),
    "id beyond int32": (ValueError, OK_LOGITS, at(2**40, 0, 0), {}, r"token_ids\[0\] is 1099511627776, expected"),
    "ids of another shape": (ValueError, OK_LOGITS, OK_IDS[:, :2], {}, r"token_ids has shape \(2, 2\).*\(2, 3\)"),
    "ids with a vocabulary": (ValueError, OK_LOGITS, OK_LOGITS.long(), {}, r"token_ids has shape \(2, 3, 5\)"),
    "float ids": (TypeError, OK_LOGITS, OK_IDS.float(), {}, "token_ids has dtype torch.float32, expected int64"),
    "list of ids": (TypeError, OK_LOGITS, [[0]], {}, "token_ids is a list, expected a torch.Tensor"),
    "integer logits": (TypeError, OK_LOGITS.long(), OK_IDS, {}, "logits has dtype torch.int64, expected float32"),
    "no logits": (TypeError, None, OK_IDS, {}, "logits is a NoneType, expected a torch.Tensor"),
    "0-d logits": (ValueError, torch.tensor(1.0), OK_IDS, {}, r"logits has shape \(\), expected \(\.\.\., V\)"),
    "empty vocabulary": (ValueError, torch.zeros(2, 3, 0), OK_IDS, {}, r"logits has shape \(2, 3, 0\).*V >= 1"),
    "ids on another device": (ValueError, OK_LOGITS, OK_IDS.to("meta"), {}, "token_ids is on meta, expected cpu"),
    "temperature 0": (ValueError, OK_LOGITS, OK_IDS, {"temperature": 0}, "temperature is 0, expected .* > 0"),
    "temperature < 0": (ValueError, OK_LOGITS, OK_IDS, {"temperature": -1.0}, r"temperature is -1\.0, expected"),
    "temperature NaN": (ValueError, OK_LOGITS, OK_IDS, {"temperature": math.nan}, "temperature is nan, expected"),
    "temperature inf": (ValueError, OK_LOGITS, OK_IDS, {"temperature": math.inf}, "temperature is inf, expected"),
    "temperature huge": (ValueError, OK_LOGITS, OK_IDS, {"temperature": 1e37}, r"temperature is 1e\+37, expected"),
    "temperature tiny": (ValueError, OK_LOGITS, OK_IDS, {"temperature": 1e-39}, "temperature is 1e-39, expected"),
    "temperature str": (TypeError, OK_LOGITS, OK_IDS, {"temperature": "1"}, "temperature is '1', expected a Python"),
}


@checks_only
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_names_argument_value_and_expectation(case: str, implementation: str) -> None:
    error, logits, ids, keywords, message = BAD_INPUTS[case]
    for function in (token_logprobs, token_logprobs_and_entropy):
        with pytest.raises(error, match=message):
            function(logits, ids, **keywords)
