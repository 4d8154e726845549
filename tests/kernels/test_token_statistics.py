"""All statistics of tokens from logits: gradcheck, float64 oracle, opcheck, compile, edges."""

import math
from typing import Any

import pytest
import torch
from backends import checks_only, compiles, reference_only, registration_only, shapes_only, without_cuda_kernels
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import TokenStatistics, backend, testing, token_logprobs_and_entropy, token_statistics
from r1kernels.ops.row_statistics import WANTED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [1, 2, 17, 33, 2047, 2048, 2049, 6000, 32000]
if testing.KERNELS == "triton":  # interpreted, which takes its time
    VOCABS = [1, 7, 2049, 33000]
BAR = 4e-6  # the promise for |logit| <= 32 and temperature 1, whatever the dtype
DIFFERENTIABLE = ("logprobs", "lse", "entropy", "sum_sq_probs", "selected_logprobs")
KERNELS = testing.KERNELS

pytestmark = without_cuda_kernels
slow_reference = pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")


def slopes_of(*shape: int, k: int, names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    """Upstream gradients, float32."""
    return {
        name: torch.randn((*shape, k) if name == "selected_logprobs" else shape, generator=testing.generator(seed))
        for seed, name in enumerate(DIFFERENTIABLE, start=1) if name in names
    }


def gradient(logits: Tensor, ids: Tensor, slopes: dict[str, Tensor], **keywords: Any) -> tuple[TokenStatistics, Tensor]:
    logits = logits.detach().requires_grad_()
    result = token_statistics(logits, ids, **keywords)
    values = [getattr(result, name) for name in slopes]
    (grad,) = torch.autograd.grad(values, logits, [slope.to(result.logprobs.dtype) for slope in slopes.values()])
    return result, grad


def assert_values(result: TokenStatistics, exact: testing.StatisticsExpected, scale: Tensor | float = 1.0) -> None:
    """`scale`: what exceeds the range of the bar, as an absolute rounding of float32."""
    for name in ("logprobs", "lse", "entropy", "selected_logprobs"):
        value = getattr(exact, name)
        if value is not None:
            testing.assert_within(getattr(result, name), value, BAR * scale)
    # Each power has the relative error that its logarithm has absolutely.
    s = exact.sum_sq_probs
    testing.assert_within(result.sum_sq_probs, s, (testing.rounding(s, torch.float32) + 2 * BAR * s) * scale)
    assert torch.equal(result.is_top1, exact.is_top1)


def case(dtype: torch.dtype, vocab: int, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids of which the first is the largest, and selected ids: among them equal ones, and that of the token."""
    logits = testing.random_logits(6, vocab, dtype=dtype, scale=scale, seed=vocab)
    ids, selected = testing.random_ids(6, vocab=vocab), testing.random_ids(6, 3, vocab=vocab, seed=1)
    ids[0] = logits[0].argmax()
    selected[0, :2], selected[1, 1] = ids[0], selected[1, 0]
    return logits, ids, selected


# ---- 1. gradcheck -----------------------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_gradcheck(temperature: float, masked: bool) -> None:
    logits = testing.random_logits(3, 4, 9, scale=2).double().requires_grad_()
    ids, selected = testing.random_ids(3, 4, vocab=9), testing.random_ids(3, 4, 2, vocab=9)
    mask = testing.random_ids(3, 4, vocab=2) == 1 if masked else None

    def run(x: Tensor) -> tuple[Tensor, ...]:
        result = token_statistics(x, ids, selected_ids=selected, mask=mask, temperature=temperature)
        return tuple(getattr(result, name) for name in DIFFERENTIABLE)

    with backend("reference"):
        assert torch.autograd.gradcheck(run, logits)


@reference_only
@pytest.mark.parametrize("padded", [False, True])
def test_reference_in_float64_is_the_oracle(padded: bool) -> None:
    """With `vocab_size`, the gradient is that of the kernels' formula, in PyTorch."""
    logits, ids, selected = case(torch.float64, 501)
    slopes = slopes_of(6, k=3)
    given = torch.nn.functional.pad(logits, (0, 3), value=math.nan) if padded else logits
    with backend("reference"):
        result, grad = gradient(
            given, ids, slopes, selected_ids=selected, temperature=0.7, vocab_size=501 if padded else None
        )
    for value, exact in zip(result, testing.token_statistics(logits, ids, selected, 0.7), strict=True):
        testing.assert_within(value, exact, 1e-13)
    expected = testing.token_statistics_gradient(logits, ids, slopes, selected, 0.7)
    testing.assert_within(grad[:, :501], expected.value, 1e-14 * (1 + expected.terms))
    assert not grad[:, 501:].any()


# ---- 2. against the float64 oracle ------------------------------------------------------------------------


@slow_reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale", [0.1, 4.0, 16.0])
def test_values_and_gradients(dtype: torch.dtype, vocab: int, scale: float) -> None:
    logits, ids, selected = case(dtype, vocab, scale)
    exact = testing.token_statistics(logits, ids, selected)
    with backend(KERNELS):
        for names in (DIFFERENTIABLE, ("sum_sq_probs",), ("lse", "entropy"), ("logprobs", "selected_logprobs")):
            slopes = slopes_of(6, k=3, names=names)
            result, grad = gradient(logits, ids, slopes, selected_ids=selected)
            given = selected if "selected_logprobs" in names else None
            testing.assert_within(grad, testing.token_statistics_gradient(logits, ids, slopes, given))
            assert grad.dtype == dtype
    assert_values(result, exact)
    terms = logits.double().abs().mean(-1)
    testing.assert_within(result.mean_logit, testing.Expected(exact.mean_logit, terms))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [33, 5000])
@pytest.mark.parametrize(("offset", "temperature"), [(0.0, 0.3), (0.0, 1e3), (1e4, 1.0), (-1e30, 1.0)])
def test_every_instruction_set(dtype: torch.dtype, vocab: int, offset: float, temperature: float, isa: str) -> None:
    """Also a row whose maximum is far from 0, which takes another path. A common offset costs only its own rounding."""
    if dtype == torch.float16 and offset != 0:
        pytest.skip("beyond the range of float16")
    logits, ids, selected = case(dtype, vocab)
    logits = (logits.float() + offset).to(dtype)
    slopes = slopes_of(6, k=3)
    exact = testing.token_statistics(logits, ids, selected, temperature)
    result, grad = gradient(logits, ids, slopes, selected_ids=selected, temperature=temperature)
    far = 1 + abs(offset) * 2.0**-22 + exact.logprobs.abs().max() / 32
    testing.assert_within(result.logprobs, exact.logprobs, BAR * (1 + exact.logprobs.abs() / 32))
    testing.assert_within(result.sum_sq_probs, exact.sum_sq_probs, 2 * BAR * exact.sum_sq_probs * far.clamp(max=4))
    assert torch.equal(result.is_top1, exact.is_top1)
    terms = logits.double().abs().mean(-1) / temperature
    testing.assert_within(result.mean_logit, testing.Expected(exact.mean_logit, terms))
    if abs(offset) < 1e6:
        expected = testing.token_statistics_gradient(logits, ids, slopes, selected, temperature)
        testing.assert_within(grad, expected)


@slow_reference
@pytest.mark.parametrize("gap", [10.0, 30.0])
def test_a_nearly_certain_token_keeps_its_small_gradients(gap: float) -> None:
    """1 - p and 1 - S are 1e-13 at a gap of 30."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = gap
    ids, selected = torch.tensor([7]), torch.tensor([[7, 3]])
    slopes = {"logprobs": torch.ones(1), "sum_sq_probs": torch.ones(1), "selected_logprobs": torch.tensor([[1.0, 0.0]])}
    with backend(KERNELS):
        _, grad = gradient(logits, ids, slopes, selected_ids=selected)
    p, rest = 1 / (1 + 49 * math.exp(-gap)), math.exp(-gap) / (1 + 49 * math.exp(-gap))
    s = p * p + 49 * rest * rest
    others = -2 * rest + 2 * rest * (rest - s)
    relative = 2e-2 if gap > 20 else 1e-6  # log-probs of selected ids are differences of float64 numbers near `gap`
    assert grad[0, 7].item() == pytest.approx(-49 * others, rel=relative)
    assert grad[0, 3].item() == pytest.approx(others, rel=1e-6)


# ---- 3. what is asked for ---------------------------------------------------------------------------------


@slow_reference
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_and_entropy_have_the_bits_of_their_own_function(dtype: torch.dtype) -> None:
    logits, ids, _ = case(dtype, 5000)
    with backend(KERNELS):
        result = token_statistics(logits, ids)
        logprobs, entropy = token_logprobs_and_entropy(logits, ids)
    assert torch.equal(result.logprobs, logprobs) and torch.equal(result.entropy, entropy)


@slow_reference
@pytest.mark.parametrize("field", TokenStatistics._fields)
def test_a_field_alone_has_the_same_bits(field: str, implementation: str) -> None:
    logits, ids, selected = case(torch.bfloat16, 700)
    given = {"selected_ids": selected} if field == "selected_logprobs" else {}
    alone = token_statistics(logits, ids, fields=(field,), **given)
    assert [name for name, value in alone._asdict().items() if value is not None] == [field]
    assert torch.equal(getattr(alone, field), getattr(token_statistics(logits, ids, selected_ids=selected), field))


def test_what_is_not_wanted_is_not_computed() -> None:
    if testing.KERNELS != "cpu":
        pytest.skip("a GPU computes all of them together")
    logits, ids, _ = case(torch.float32, 300)
    computed = {"sum_sq_probs": [0], "mean_logit": [1], "is_top1": [2, 3]}
    for name, planes in computed.items():
        more = torch.ops.r1kernels.token_statistics(logits, ids, None, 1.0, None, True, WANTED[name])[3]
        assert [plane for plane in range(4) if more[plane].any()] == planes


@slow_reference
def test_constants_have_no_gradient_and_others_have(implementation: str) -> None:
    logits, ids, selected = case(torch.float32, 40)
    result = token_statistics(logits.requires_grad_(), ids, selected_ids=selected)
    assert {name for name, value in result._asdict().items() if value.requires_grad} == set(DIFFERENTIABLE)
    assert result.is_top1.dtype == torch.bool


# ---- 4. the largest logit ---------------------------------------------------------------------------------


@slow_reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 5000), (2047, 2048), (100, 140), (4095, 4990), (0, 5999)])
def test_of_equal_logits_the_first_is_the_largest(dtype: torch.dtype, first: int, second: int) -> None:
    logits = testing.random_logits(4, 6000, dtype=dtype).clamp(max=20)
    logits[:, first] = logits[:, second] = 21.0
    ids = torch.tensor([first, second, (first + second) // 2 if second - first > 1 else 3, 3000])
    with backend(KERNELS):
        is_top1 = token_statistics(logits, ids, fields=("is_top1",)).is_top1
    assert is_top1.tolist() == [True, False, False, False]
    assert torch.equal(is_top1, logits.float().argmax(-1) == ids)


@slow_reference
def test_many_equal_logits(implementation: str) -> None:
    """16-bit logits of a few values: most rows have several maxima."""
    logits = testing.random_ids(24, 3000, vocab=4).bfloat16()
    ids = logits.float().argmax(-1)
    ids[::2] = (logits[::2] == 3).float().cumsum(-1).argmax(-1)  # the last one
    is_top1 = token_statistics(logits, ids).is_top1
    assert torch.equal(is_top1, testing.token_statistics(logits, ids).is_top1)
    assert is_top1[1::2].all() and not is_top1[::2].any()


# ---- 5. edges ---------------------------------------------------------------------------------------------


@slow_reference
def test_infinite_and_nan_logits_are_as_in_log_prob_and_entropy(implementation: str) -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor([
        [0.0, -inf, 2.0, -inf], [-inf] * 4, [0.0, nan, 1.0, 2.0], [0.0, inf, 1.0, 2.0], [-inf, -inf, -inf, 1.0],
    ])
    ids = torch.tensor([2, 0, 3, 1, 0])
    selected = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1], [3, 0]])
    result = token_statistics(logits, ids, selected_ids=selected)
    logprobs, entropy = token_logprobs_and_entropy(logits, ids)
    for value, expected in ((result.logprobs, logprobs), (result.entropy, entropy)):
        assert torch.equal(value.nan_to_num(7.0), expected.nan_to_num(7.0))
    p = 1 / (1 + math.exp(-2))
    testing.assert_within(result.sum_sq_probs, torch.tensor([p * p + (1 - p) ** 2, nan, nan, nan, 1.0]), 1e-6)
    assert result.lse[1] == -inf and result.lse[2].isnan() and result.lse[3].isnan()
    assert result.mean_logit.tolist()[:2] == [-inf, -inf] and result.mean_logit[2].isnan()
    assert result.is_top1.tolist() == [True, False, False, False, False]
    assert result.selected_logprobs[0, 1] == -inf and result.selected_logprobs[4].tolist() == [0.0, -inf]


@slow_reference
def test_entries_of_minus_infinity_get_no_gradient(implementation: str) -> None:
    logits, ids, selected = case(torch.float32, 300)
    logits[:, 1::2], ids, selected = -math.inf, ids // 2 * 2, selected // 2 * 2
    slopes = slopes_of(6, k=3)
    _, grad = gradient(logits, ids, slopes, selected_ids=selected)
    assert not grad[:, 1::2].any()
    _, without = gradient(logits[:, ::2], ids // 2, slopes, selected_ids=selected // 2)
    testing.assert_within(grad[:, ::2], without.double(), 1e-6)


@slow_reference
def test_nothing_behind_the_mask_matters(implementation: str) -> None:
    logits, ids = testing.random_logits(3, 5, 40), testing.random_ids(3, 5, vocab=40)
    selected, mask = testing.random_ids(3, 5, 2, vocab=40), testing.random_ids(3, 5, vocab=3) > 0
    slopes = slopes_of(3, 5, k=2)
    clean = gradient(logits, ids, slopes, selected_ids=selected, mask=mask)
    dirty = gradient(
        testing.poisoned(logits, mask), testing.poisoned(ids, mask), slopes, mask=mask.int(),
        selected_ids=testing.poisoned(selected, mask),
    )
    for a, b in zip((*clean[0], clean[1]), (*dirty[0], dirty[1]), strict=True):
        assert torch.equal(a, b)
        assert not b[~mask].any()


@slow_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_logits(dtype: torch.dtype, implementation: str) -> None:
    whole = testing.random_logits(2, 3, 50, dtype=dtype)
    for logits in (whole[:, :-1], whole.transpose(0, 1), whole[..., ::2], whole.transpose(1, 2).contiguous().mT):
        ids = testing.random_ids(*logits.shape[:-1], vocab=logits.shape[-1])
        selected = testing.random_ids(*ids.shape, 2, vocab=logits.shape[-1])
        slopes = slopes_of(*ids.shape, k=2)
        results = [gradient(x, ids, slopes, selected_ids=selected) for x in (logits, logits.contiguous())]
        for value, expected in zip((*results[0][0], results[0][1]), (*results[1][0], results[1][1]), strict=True):
            if implementation == "reference":  # PyTorch adds up in another order
                testing.assert_within(value, expected.double(), 1e-6 + torch.finfo(dtype).eps * expected.double().abs())
            else:
                assert torch.equal(value, expected)


@slow_reference
@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 1, 3)])
@pytest.mark.parametrize("k", [0, 2])
def test_shapes(lead: tuple[int, ...], k: int, implementation: str) -> None:
    logits, ids = testing.random_logits(*lead, 7), testing.random_ids(*lead, vocab=7)
    selected = testing.random_ids(*lead, k, vocab=7).int()
    result, grad = gradient(logits, ids, slopes_of(*lead, k=k), selected_ids=selected)
    for name, value in result._asdict().items():
        assert value.shape == ((*lead, k) if name == "selected_logprobs" else lead), name
    assert grad.shape == logits.shape


@checks_only
def test_errors_name_the_argument() -> None:
    logits, ids = testing.random_logits(2, 3, 7), testing.random_ids(2, 3, vocab=7)
    for error, message, keywords in (
        (TypeError, "fields is 'lse'", {"fields": "lse"}),
        (ValueError, "fields has 'loss'", {"fields": ("lse", "loss")}),
        (ValueError, "fields is ()", {"fields": ()}),
        (ValueError, "selected_ids is None", {"fields": ("selected_logprobs",)}),
        (ValueError, "selected_ids has shape (2, 3), expected (2, 3, K): K ids", {"selected_ids": ids}),
        (ValueError, "selected_ids has shape (), expected (2, 3, K): K ids", {"selected_ids": torch.tensor(1)}),
        (TypeError, "selected_ids has dtype torch.float32", {"selected_ids": torch.zeros(2, 3, 1)}),
        (ValueError, "selected_ids[5] is 7", {"selected_ids": torch.arange(2, 8).reshape(2, 3, 1)}),
        (ValueError, "temperature is 0", {"temperature": 0}),
        (ValueError, "mask has shape (3,)", {"mask": torch.ones(3)}),
        (ValueError, "vocab_size is 8", {"vocab_size": 8}),
    ):
        for name in ("cpu", "reference"):
            with backend(name), pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)").replace(
                "[", r"\["
            )):
                token_statistics(logits, ids, **keywords)


def test_differentiable_once_only() -> None:
    if testing.KERNELS == "cuda":
        pytest.skip("the reference serves: plain PyTorch is differentiable twice")
    logits, ids, _ = case(torch.float32, 11)
    with backend(KERNELS):
        loss = token_statistics(logits.requires_grad_(), ids).sum_sq_probs.sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.sum().backward()


# ---- 6. opcheck, compile and fakes ------------------------------------------------------------------------


@pytest.mark.few(1)
@registration_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype: torch.dtype, masked: bool) -> None:
    logits = testing.random_logits(2, 4, 40, dtype=dtype)[:, :3]
    ids = testing.random_ids(2, 3, vocab=40)
    mask = testing.random_ids(2, 3, vocab=2) == 1 if masked else None
    torch.library.opcheck(torch.ops.r1kernels.token_statistics, (logits, ids, mask, 0.7, None, True, 7))
    _, lse, entropy, more = torch.ops.r1kernels.token_statistics(logits, ids, mask, 0.7, None, True, 7)
    g = torch.ones(2, 3) * (1 if mask is None else mask)
    arguments = (logits, ids, lse, entropy, g, g, 0.7, more[0].contiguous(), g, g)
    torch.library.opcheck(torch.ops.r1kernels.token_stats_backward, arguments)


@pytest.mark.few(1)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("masked", [False, True])
def test_compile_fullgraph(masked: bool, implementation: str) -> None:
    ids, selected = testing.random_ids(3, 4, vocab=33), testing.random_ids(3, 4, 2, vocab=33)
    mask = testing.random_ids(3, 4, vocab=3) > 0 if masked else None

    def run(logits: Tensor) -> Tensor:
        result = token_statistics(logits * 2, ids, selected_ids=selected, mask=mask, temperature=0.8)
        return sum(value.float().square().sum() for value in result)

    results = []
    for function in (run, testing.compiled(run)):
        logits = testing.random_logits(3, 4, 33).requires_grad_()
        loss = function(logits)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@shapes_only
@slow_reference
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fakes_have_the_shapes_and_dtypes_of_results(device: str) -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 4, 17, dtype=torch.bfloat16, device=device)
        ids = torch.zeros(2, 4, dtype=torch.int64, device=device)
        result = token_statistics(logits, ids, selected_ids=ids.new_zeros(2, 4, 3))
    for name, value in result._asdict().items():
        assert value.shape == ((2, 4, 3) if name == "selected_logprobs" else (2, 4)) and value.device.type == device
        assert value.dtype == (torch.bool if name == "is_top1" else torch.float32)
