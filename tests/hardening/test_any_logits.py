"""Every operation of logits on any shape, layout and dtype, and on extreme values, against the float64 oracles."""

import math
from typing import Any

import pytest
import torch
from backends import without_cuda_kernels
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, MASKS, VALUES, Rows, leaf, rows, tokens_mask
from torch import Tensor

from r1kernels import (
    cross_entropy,
    distillation_loss,
    testing,
    token_logprobs,
    token_logprobs_and_entropy,
    token_statistics,
)
from r1kernels.ops.divergence import KINDS

BAR = 4e-6  # of log-probs of logits within 32 at temperature 1
TEMPERATURES = st.sampled_from([1.0, 0.3, 2.5])
FINITE = tuple(name for name in VALUES if name not in ("huge", "one nan", "one inf", "-inf"))
HALF = ("normal", "small", "large", "ties")  # logits whose differences are as exact in float32 as the bars say
# Smoothing needs a statistic that has no CUDA kernel.
SMOOTHINGS = [0.0] if testing.KERNELS == "cuda" else [0.0, 0.3, 1.0]
STATISTICS = ("logprobs", "lse", "entropy", "sum_sq_probs", "selected_logprobs")


def in_float32(exact: Tensor) -> Tensor:
    """What the float64 value is once it is a float32: -6e38 is -inf."""
    return exact.float().double()


def rounded_statistics(exact: testing.TokenStats, rounded_z: Tensor) -> tuple[Tensor, Tensor]:
    """What one rounding of every number on the way does to a log-prob and to an entropy, in units of EPS32.

    A power e^{z_j - z_max} has an error of 1, and of 1 for each unit of its exponent. Where z is rounded, which is at
    most `rounded_z`, that is rounded_z / 2 more in z_j and in the token's own. An error of a power moves log S by p_j,
    and H by p_j |log p_j + H|. The two sums that H is made of move it by 1 and by H.
    """
    p, log_p, h = exact.log_p.exp(), exact.log_p, exact.entropy
    depth = torch.where(p == 0, 0, log_p.amax(-1, keepdim=True) - log_p)
    spread = torch.where(p == 0, 0, (log_p + h.unsqueeze(-1)).abs())
    of_logprob = (p * (1 + depth)).sum(-1) + rounded_z
    return of_logprob, 1 + h + (p * spread * (1 + depth + rounded_z.unsqueeze(-1))).sum(-1)


def slopes_of(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, *shape, generator=testing.generator(seed + 1))
    return both[0], both[1]


def usable(logits: Tensor, largest: float = 1e5) -> Tensor:
    """The rows that have a distribution, and whose logits are not so large that float32 differences are coarse."""
    magnitudes = torch.where(logits == -math.inf, 0, logits.double()).abs().amax(-1)
    return (logits > -math.inf).any(-1) & (magnitudes < largest)


@given(case=rows(), temperature=TEMPERATURES)
def test_log_probs_and_entropy(case: Rows, temperature: float, implementation: str) -> None:
    logits, ids = leaf(case.logits), case.token_ids
    g, eta = slopes_of(ids.shape, case.seed)
    logprobs, entropy = token_logprobs_and_entropy(logits, ids, temperature=temperature)
    (grad,) = torch.autograd.grad((logprobs, entropy), logits, (g, eta))
    assert logprobs.dtype == torch.float32 and logprobs.shape == entropy.shape == ids.shape
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    assert torch.equal(logprobs.isnan(), token_logprobs(logits, ids, temperature=temperature).isnan())
    exact = testing.token_stats(case.logits, ids, temperature)
    expected = testing.token_stats_gradient(case.logits, ids, g, eta, temperature)
    same = case.logits.double().abs().amax(-1) / temperature < 3e38 if implementation == "reference" else ids >= 0
    same |= ~case.logits.isfinite().any(-1)  # the reference divides in float32, which may overflow
    assert torch.equal(logprobs[same].isnan(), exact.logprobs[same].isnan())
    # Each row is computed by itself: what is not finite in one row is not seen in another.
    good = usable(case.logits)
    rounded_z = case.logits.double().nan_to_num(0, 0, 0).abs().amax(-1) / temperature * (implementation == "reference")
    of_logprob, of_entropy = rounded_statistics(exact, rounded_z)
    budget = testing.Expected(exact.logprobs, of_logprob).budget().nan_to_num(0)  # NaN where the log-prob is -inf
    testing.assert_within(logprobs[good], in_float32(exact.logprobs[good]), budget[good])
    testing.assert_within(entropy[good], testing.Expected(exact.entropy[good], of_entropy[good]))
    if implementation == "reference":  # autograd adds terms up that cancel
        own = torch.zeros_like(exact.log_p).scatter_(-1, ids.long().unsqueeze(-1), 1)
        p, surprise = exact.log_p.exp(), exact.log_p.abs().nan_to_num(posinf=0)
        g, eta, h, size = (v.double().unsqueeze(-1) for v in (g.abs(), eta.abs(), exact.entropy, 1 + rounded_z))
        terms = (g * (own + p) + eta * p * (surprise + h + 2)) * size / temperature
        expected = expected._replace(terms=expected.terms + terms)
    testing.assert_within(grad[good], testing.Expected(expected.value[good], expected.terms[good]))


@without_cuda_kernels
@pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")
@given(case=rows(values=FINITE), temperature=TEMPERATURES, kind=MASKS, data=st.data())
def test_all_statistics(case: Rows, temperature: float, kind: str, data: st.DataObject, implementation: str) -> None:
    ids, vocab = case.token_ids, case.logits.shape[-1]
    selected = testing.random_ids(*ids.shape, data.draw(st.integers(1, 3)), vocab=vocab, seed=case.seed + 1)
    mask = tokens_mask(ids.shape, kind, case.seed)
    counts = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask != 0
    logits = leaf(case.logits)
    result = token_statistics(logits, ids, selected_ids=selected, mask=mask, temperature=temperature)
    names = data.draw(st.sets(st.sampled_from(STATISTICS), min_size=1).map(sorted))
    slopes = {
        name: torch.randn(getattr(result, name).shape, generator=testing.generator(case.seed + place))
        for place, name in enumerate(names)
    }
    (grad,) = torch.autograd.grad([getattr(result, name) for name in names], logits, list(slopes.values()))
    exact = testing.token_statistics(case.logits, ids, selected, temperature)
    far = 1 + case.logits.double().abs().amax() / temperature / 32 if case.logits.numel() else 1.0
    far = far * (4 if implementation == "reference" else 1)  # its logits are rounded before the sums
    for name in ("logprobs", "lse", "entropy", "selected_logprobs"):
        wanted = getattr(exact, name)
        wanted = torch.where(counts[(..., *[None] * (wanted.dim() - counts.dim()))], wanted, 0)
        testing.assert_within(getattr(result, name), wanted, BAR * far)
    wanted = torch.where(counts, exact.sum_sq_probs, 0)
    testing.assert_within(result.sum_sq_probs, wanted, (testing.rounding(wanted, torch.float32) + 2 * BAR) * far)
    if implementation != "reference":  # the reference divides by the temperature first, which may make ties
        assert torch.equal(result.is_top1, exact.is_top1 & counts)
    given_ids = selected if "selected_logprobs" in names else None
    expected = testing.token_statistics_gradient(
        case.logits, ids, {k: v * (counts if v.dim() == counts.dim() else counts.unsqueeze(-1))
                           for k, v in slopes.items()}, given_ids, temperature,
    )
    if implementation == "reference":
        size = sum(v.abs().amax() for v in slopes.values()) if ids.numel() else 0
        on_the_way = 64 * testing.EPS32 * far * (1 + size) * (1 + 1 / temperature)
        slack = testing.rounding(expected.value, grad.dtype) + on_the_way
        testing.assert_within(grad, expected.value, slack)
    else:
        testing.assert_within(grad, expected)
    assert not grad[~counts].any()


@given(
    case=rows(values=HALF), smoothing=st.sampled_from(SMOOTHINGS), z_loss=st.sampled_from([0.0, 0.01]),
    reduction=st.sampled_from(["mean", "sum", "none"]), ignored=MASKS,
)
def test_cross_entropy(
    case: Rows, smoothing: float, z_loss: float, reduction: str, ignored: str, implementation: str
) -> None:
    mask = tokens_mask(case.token_ids.shape, ignored, case.seed)
    counts = torch.ones(case.token_ids.shape, dtype=torch.bool) if mask is None else mask != 0
    targets = torch.where(counts, case.token_ids, -100)
    logits, vocab = leaf(case.logits), case.logits.shape[-1]
    terms = {"label_smoothing": smoothing, "z_loss_coef": z_loss}
    loss = cross_entropy(logits, targets, reduction=reduction, **terms)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    flat, ids = case.logits.reshape(-1, vocab), case.token_ids.reshape(1, -1)
    weight = counts.reshape(1, -1).double() / (max(int(counts.sum()), 1) if reduction == "mean" else 1)
    losses = testing.target_losses(flat, ids, **terms)[0] * counts.reshape(-1)
    number = max(int(counts.sum()), 1)
    exact = {"none": losses.reshape(counts.shape), "sum": losses.sum(), "mean": losses.sum() / number}
    size = (1 + z_loss) * (1 + 32 + math.log(vocab)) ** 2 * (max(ids.numel(), 1) if reduction == "sum" else 1)
    testing.assert_within(loss, exact[reduction], 8 * testing.EPS32 * size)
    expected = testing.target_gradient(flat, ids, weight, **terms)
    slack = expected.budget(grad.dtype) + (64 * testing.EPS32 if implementation == "reference" else 0)
    testing.assert_within(grad.reshape(-1, vocab), expected.value, slack)
    assert not grad[~counts].any()


@without_cuda_kernels
@given(
    student=rows(values=HALF), teacher_layout=st.sampled_from(["contiguous", "transposed", "sliced", "padded"]),
    teacher_dtype=st.sampled_from(DTYPES), kind=st.sampled_from(list(KINDS)), beta=st.sampled_from([0.5, 0.05]),
    temperature=TEMPERATURES, masked=MASKS, k=st.integers(0, 4),
)
def test_distillation(
    student: Rows, teacher_layout: str, teacher_dtype: torch.dtype, kind: str, beta: float, temperature: float,
    masked: str, k: int, implementation: str,
) -> None:
    """The teacher's whole logits, or its K likeliest tokens."""
    shape, vocab = student.logits.shape, student.logits.shape[-1]
    noise = torch.randn(shape, generator=testing.generator(student.seed + 9))
    teacher = LAYOUTS[teacher_layout]((student.logits.float() + noise).to(teacher_dtype))
    mask = tokens_mask(shape[:-1], masked, student.seed)
    counts = torch.ones(shape[:-1], dtype=torch.float64) if mask is None else (mask != 0).double()
    total = counts.sum().clamp(min=1)
    given_teacher: dict[str, Any] = {"teacher_logits": teacher}
    if k:
        ids, logprobs = testing.random_topk(teacher, min(k, vocab), temperature)
        given_teacher = {"teacher_token_ids": ids, "teacher_logprobs": logprobs}
    exact = None
    if counts.numel():
        exact = testing.topk_divergence(student.logits, ids, logprobs, kind, beta, temperature) if k else \
            testing.divergence(student.logits, teacher, kind, beta, temperature)
    logits = leaf(student.logits)
    loss, metrics = distillation_loss(
        logits, **given_teacher, mask=mask, divergence=kind, beta=beta, temperature=temperature
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert metrics["tokens"] == counts.sum() and metrics["nonfinite_tokens"] == 0 and grad.dtype == logits.dtype
    if exact is None:
        assert loss == 0
        return
    value = (exact.value.value * counts).sum() / total
    slack = 64 * testing.EPS32 / min(temperature, 1) if implementation == "reference" else 8e-7
    testing.assert_within(loss, value, slack * (1 + value) + testing.EPS32 * (exact.value.terms * counts).sum() / total)
    weight = counts.unsqueeze(-1) / total
    rough = 0 if implementation != "reference" else 64 / temperature
    testing.assert_within(grad, testing.Expected(exact.grad.value * weight, (exact.grad.terms + rough) * weight))
    assert not grad[counts == 0].any()


@given(case=rows(values=HALF, leads=st.tuples(st.integers(1, 5))), most=st.integers(1, 30), temperature=TEMPERATURES,
       whole=st.sampled_from([0.0, 0.4]), ids_dtype=st.sampled_from([torch.int32, torch.int64]))
def test_support_sets(
    case: Rows, most: int, whole: float, temperature: float, ids_dtype: torch.dtype, implementation: str
) -> None:
    """Log-probs and entropy over the ids that sampling kept."""
    support = testing.random_support(
        case.token_ids, case.logits.shape[-1], most, whole=whole, seed=case.seed, dtype=ids_dtype
    )
    logits, (g, eta) = leaf(case.logits), slopes_of(case.token_ids.shape, case.seed)
    logprobs, entropy = token_logprobs_and_entropy(logits, case.token_ids, temperature=temperature, support=support)
    (grad,) = torch.autograd.grad((logprobs, entropy), logits, (g, eta))
    over = testing.over_support(case.logits.double(), support)
    exact = testing.token_stats(over, case.token_ids, temperature)
    testing.assert_within(logprobs, exact.logprobs, 8e-6 / min(temperature, 1))
    testing.assert_within(entropy, exact.entropy, 8e-6 / min(temperature, 1))
    expected = testing.token_stats_gradient(over, case.token_ids, g, eta, temperature)
    slack = expected.budget(grad.dtype)
    if implementation == "reference":  # 1 - p of a likely token is a difference of rounded numbers
        slack = slack + 300 * testing.EPS32 * ((g.abs() + eta.abs()).unsqueeze(-1) + expected.terms) / temperature
    testing.assert_within(grad, expected.value, slack)
    assert not grad[over == -math.inf].any()
