"""Log-probs and entropy of tokens from logits: gradcheck, float64 oracle, opcheck, compile. Edges: next file."""

from collections.abc import Callable

import pytest
import torch
from backends import compiles, reference_only, registration_only, shapes_only, slow_interpreted
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import backend, testing, token_logprobs, token_logprobs_and_entropy
from r1kernels.ops import token_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the widths at which a kernel may change its path: vectors, pairs of vectors, blocks.
VOCABS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 127, 128, 129, 2047, 2048, 2049, 4095, 4097, 32000]
if testing.KERNELS == "triton":  # interpreted, which takes its time
    VOCABS = [1, 7, 2049, 4096, 33000]
BAR = 4e-6  # the promise for |logit| <= 32 and temperature 1, whatever the dtype


def gradients(
    logits: Tensor, ids: Tensor, g: Tensor, eta: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(logits, ids, temperature=temperature)
    (grad,) = torch.autograd.grad((logprobs, entropy), logits, (g.to(logprobs.dtype), eta.to(entropy.dtype)))
    return logprobs.detach(), entropy.detach(), grad


def weights(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, generator=testing.generator(1)), torch.randn(shape, generator=testing.generator(2))


# ---- 1. gradcheck -----------------------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_gradcheck(temperature: float, masked: bool) -> None:
    logits = testing.random_logits(3, 4, 9, scale=2).double().requires_grad_()
    ids = testing.random_ids(3, 4, vocab=9)
    mask = testing.random_ids(3, 4, vocab=2) == 1 if masked else None
    assert torch.autograd.gradcheck(lambda x: token_stats.reference(x, ids, mask, temperature), logits)


# ---- 2. against the float64 oracle ------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("vocab", [1, 2, 17, 2049])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_reference_in_float64_is_the_oracle(vocab: int, temperature: float) -> None:
    logits, ids = testing.random_logits(5, vocab, scale=8).double(), testing.random_ids(5, vocab=vocab)
    g, eta = weights(5)
    exact = testing.token_stats(logits, ids, temperature)
    expected = testing.token_stats_gradient(logits, ids, g, eta, temperature)
    with backend("reference"):
        logprobs, entropy, grad = gradients(logits, ids, g, eta, temperature)
    eps64 = torch.finfo(torch.float64).eps
    scale = logits.abs().max() / temperature + 1
    testing.assert_within(logprobs, exact.logprobs, 4 * eps64 * scale)
    testing.assert_within(entropy, exact.entropy, 4 * eps64 * scale)
    testing.assert_within(grad, expected.value, 4 * eps64 * scale * (1 + expected.terms))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale", [0.1, 4.0, 16.0])
def test_values_and_gradients(dtype: torch.dtype, vocab: int, scale: float) -> None:
    logits = testing.random_logits(6, vocab, dtype=dtype, scale=scale, seed=vocab)
    ids = testing.random_ids(6, vocab=vocab)
    ids[0] = logits[0].argmax()
    g, eta = weights(6)
    exact = testing.token_stats(logits, ids)
    with backend(testing.KERNELS):
        for g_used, eta_used in ((g, eta), (g, 0 * eta), (0 * g, eta)):
            logprobs, entropy, grad = gradients(logits, ids, g_used, eta_used)
            testing.assert_within(logprobs, exact.logprobs, BAR)
            testing.assert_within(entropy, exact.entropy, BAR)
            assert grad.dtype == dtype
            testing.assert_within(grad, testing.token_stats_gradient(logits, ids, g_used, eta_used))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale, offset", [(0.1, 0.0), (4.0, 0.0), (16.0, 0.0), (4.0, 1e4), (4.0, -1e7)])
def test_statistics_of_products_of_16_bit_operands(vocab: int, scale: float, offset: float) -> None:
    """Float32 logits with exact=False: one rounding a power, within the same bar."""
    logits = testing.random_logits(6, vocab, scale=scale, seed=vocab) + offset
    logits[1, : vocab // 2] = -torch.inf
    ids = testing.random_ids(6, vocab=vocab)
    ids[0], ids[1] = logits[0].argmax(), vocab - 1
    exact = testing.token_stats(logits, ids)
    with backend(testing.KERNELS):
        logprobs, lse, entropy = token_stats.statistics(logits, ids, None, 1.0, None, exact=False)
    testing.assert_within(logprobs, exact.logprobs, BAR)
    testing.assert_within(entropy.float(), exact.entropy, BAR)
    testing.assert_within(lse, logits.double().logsumexp(-1), BAR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 0.7, 2.5, 1e4])
def test_temperatures(dtype: torch.dtype, temperature: float) -> None:
    logits, ids = testing.random_logits(6, 1000, dtype=dtype, scale=8), testing.random_ids(6, vocab=1000)
    g, eta = weights(6)
    exact = testing.token_stats(logits, ids, temperature)
    with backend(testing.KERNELS):
        logprobs, entropy, grad = gradients(logits, ids, g, eta, temperature)
    # A log-prob beyond the bar's range cannot be closer than its own rounding.
    testing.assert_within(logprobs, exact.logprobs, BAR / 4 + testing.rounding(exact.logprobs, torch.float32))
    testing.assert_within(entropy, exact.entropy, BAR)
    testing.assert_within(grad, testing.token_stats_gradient(logits, ids, g, eta, temperature))


@slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vocabulary_of_a_real_model(dtype: torch.dtype) -> None:
    logits = testing.random_logits(4, 151_936, dtype=dtype, scale=8).clamp(-32, 32)
    logits[1, 777] = 32.0  # one token holds nearly all of the mass
    ids = torch.tensor([151_935, 777, 0, 75_000])
    g, eta = weights(4)
    exact = testing.token_stats(logits, ids)
    with backend(testing.KERNELS):
        logprobs, entropy, grad = gradients(logits, ids, g, eta)
    testing.assert_within(logprobs, exact.logprobs, BAR)
    testing.assert_within(entropy, exact.entropy, BAR)
    testing.assert_within(grad, testing.token_stats_gradient(logits, ids, g, eta))


@pytest.mark.parametrize("gap", [1.0, 10.0, 20.0, 30.0])
def test_a_nearly_certain_token_keeps_its_small_gradient(gap: float) -> None:
    """1 - p is 1e-13 at a gap of 30: as 1 - p it is 0 in fp32, but it is what moves the other logits."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = gap
    ids, g = torch.tensor([7]), torch.ones(1)
    exact = testing.token_stats(logits, ids)
    with backend(testing.KERNELS):
        logprobs, _, grad = gradients(logits, ids, g, 0 * g)
    relative = (logprobs - exact.logprobs).abs() / exact.logprobs.abs()
    assert relative.item() <= 2 * testing.EPS32 + torch.finfo(torch.float64).eps * gap / exact.logprobs.abs().item()
    testing.assert_within(grad, testing.token_stats_gradient(logits, ids, g))


@reference_only
def test_reference_in_fp32_keeps_to_its_own_roundings() -> None:
    logits, ids = testing.random_logits(6, 4097, scale=8), testing.random_ids(6, vocab=4097)
    exact = testing.token_stats(logits, ids)
    with backend("reference"):
        logprobs, entropy = token_logprobs_and_entropy(logits, ids)
    testing.assert_within(logprobs, exact.logprobs, 2 * testing.EPS32 * exact.log_p.abs().amax(-1))
    testing.assert_within(entropy, exact.entropy, 2 * testing.EPS32 * exact.log_p.abs().amax(-1))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e30])
def test_a_common_offset_costs_nothing(offset: float) -> None:
    logits, ids = testing.random_logits(4, 300) + offset, testing.random_ids(4, vocab=300)
    exact = testing.token_stats(logits, ids)
    with backend(testing.KERNELS):
        logprobs, entropy = token_logprobs_and_entropy(logits, ids)
    testing.assert_within(logprobs, exact.logprobs, BAR + torch.finfo(torch.float64).eps * abs(offset))
    testing.assert_within(entropy, exact.entropy, BAR)


def test_gradients_of_logits_of_any_size() -> None:
    """Each row has another offset, up to 1e8, where neighbours in float32 are 8 apart. The budget is that of the exact
    probabilities: how far the log-sum-exp is from the next float32 is not in it."""
    offsets = torch.tensor([0, 1e2, -1e3, 1e4, -1e4, 1e6, -1e7, 1e8]).unsqueeze(-1)
    ids, (g, eta) = testing.random_ids(8, vocab=300), weights(8)
    for dtype, temperature in ((torch.float32, 1.0), (torch.float32, 0.3), (torch.bfloat16, 0.3)):
        logits = (testing.random_logits(8, 300) * (1 + offsets.abs() / 1e7) + offsets).to(dtype)
        exact = testing.token_stats(logits, ids, temperature)
        with backend(testing.KERNELS):
            for g_used, eta_used in ((g, 0 * g), (g, eta)):
                logprobs, entropy, grad = gradients(logits, ids, g_used, eta_used, temperature)
                of_lse = 2 * torch.finfo(torch.float64).eps * offsets[:, 0].abs() / temperature
                of_size = testing.rounding(exact.logprobs, torch.float32)
                testing.assert_within(logprobs, exact.logprobs, BAR + of_size + of_lse)
                testing.assert_within(entropy, exact.entropy, BAR)
                testing.assert_within(grad, testing.token_stats_gradient(logits, ids, g_used, eta_used, temperature))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_common_offset_costs_no_gradient(offset: float) -> None:
    logits, ids, (g, eta) = testing.random_logits(4, 300) + offset, testing.random_ids(4, vocab=300), weights(4)
    with backend(testing.KERNELS):
        for g_used, eta_used in ((g, eta), (0 * g, eta)):
            *_, grad = gradients(logits, ids, g_used, eta_used)
            testing.assert_within(grad, testing.token_stats_gradient(logits, ids, g_used, eta_used))


@reference_only
def test_float64_logits_give_float64_results(recwarn: pytest.WarningsRecorder) -> None:
    with backend("reference"):
        logprobs, entropy = token_logprobs_and_entropy(torch.zeros(2, 4).double(), torch.tensor([0, 3]))
    assert logprobs.dtype == entropy.dtype == torch.float64


def test_token_logprobs_is_the_first_of_both(implementation: str) -> None:
    logits, ids = testing.random_logits(3, 5, 40), testing.random_ids(3, 5, vocab=40)
    assert torch.equal(token_logprobs(logits, ids), token_logprobs_and_entropy(logits, ids)[0])


def test_differentiable_once_only() -> None:
    logits = testing.random_logits(3, 11).requires_grad_()
    with backend(testing.KERNELS):
        loss = token_logprobs(logits, torch.tensor([1, 2, 3])).square().sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.sum().backward()


# ---- 3. opcheck -------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@registration_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(dtype: torch.dtype, masked: bool, strided: bool) -> None:
    logits = testing.random_logits(2, 4, 40, dtype=dtype)[:, : 3 if strided else 4]
    shape = logits.shape[:-1]
    ids = testing.random_ids(*shape, vocab=40)
    mask = testing.random_ids(*shape, vocab=2) == 1 if masked else None
    torch.library.opcheck(torch.ops.r1kernels.token_stats, (logits, ids, mask, 0.7))
    _, lse, entropy = torch.ops.r1kernels.token_stats(logits, ids, mask, 0.7)
    for g, eta in ((torch.ones(shape), None), (None, torch.ones(shape)), (torch.ones(shape), torch.ones(shape))):
        arguments = (logits, ids, lse, entropy, g, eta, 0.7)
        torch.library.opcheck(torch.ops.r1kernels.token_stats_backward, arguments)


# ---- 4. compile and fakes ---------------------------------------------------------------------------------


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("entry", [token_logprobs, lambda *a, **k: sum(token_logprobs_and_entropy(*a, **k))])
def test_compile_fullgraph(entry: Callable[..., Tensor], implementation: str) -> None:
    ids = testing.random_ids(3, 4, vocab=33)

    def run(logits: Tensor) -> Tensor:
        return entry(logits * 2, ids, temperature=0.8).square().sum()

    results = []
    for function in (run, testing.compiled(run)):
        logits = testing.random_logits(3, 4, 33).requires_grad_()
        loss = function(logits)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@shapes_only
@pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_fakes_have_the_shapes_and_dtypes_of_results(device: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 5, 17, dtype=dtype, device=device).narrow(1, 0, 4)
        ids = torch.zeros(2, 4, dtype=torch.int64, device=device)
        logits.requires_grad_(device != "cuda")  # torch without CUDA cannot start a backward there
        logprobs, entropy = token_logprobs_and_entropy(logits, ids)
        if logits.requires_grad:
            (grad,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
            assert (grad.shape, grad.dtype, grad.device) == (logits.shape, dtype, logits.device)
    assert logprobs.shape == entropy.shape == (2, 4)
    assert logprobs.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logprobs.device.type == device


def test_meta_tensors_without_a_fake_mode() -> None:
    logprobs = token_logprobs(torch.empty(2, 3, 11, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta"))
    assert logprobs.shape == (2, 3) and logprobs.device.type == "meta"
