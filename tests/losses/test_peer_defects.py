"""Twelve defects found in released libraries, D1 to D12: what they got wrong is right here.

Where a peer is installed and its path runs on a CPU, the test also shows that the peer fails it (liger-kernel 0.8.5,
trl 1.16.0); the other defects are of GPU kernels, whose inputs are given to ours.
"""

import importlib
import importlib.metadata
import warnings
from types import ModuleType

import pytest
import torch
from backends import slow_interpreted, slow_on_gpu_kernels
from torch import Tensor

from r1kernels import (
    Objective,
    group_advantages,
    grpo_loss,
    objectives,
    policy_loss,
    testing,
    token_logprobs,
    token_logprobs_and_entropy,
)


def peer(module: str, distribution: str, version: str) -> ModuleType | None:
    """The peer at the version in which the defect was found, or None: a later one may have mended it."""
    try:
        if importlib.metadata.version(distribution) != version:
            return None
    except importlib.metadata.PackageNotFoundError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not ours to mend
        return importlib.import_module(module)


def trl() -> ModuleType | None:
    return peer("trl.trainer.utils", "trl", "1.16.0")


def liger() -> ModuleType | None:
    return peer("liger_kernel.chunked_loss", "liger_kernel", "0.8.5")


def check_stats(logits: Tensor, ids: Tensor) -> None:
    """Log-probs and entropy within the promised 4e-6, and the gradients of both within their budget."""
    source = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(source, ids)
    exact = testing.token_stats(logits, ids)
    testing.assert_within(logprobs, exact.logprobs, 4e-6 + testing.rounding(exact.logprobs, torch.float32))
    testing.assert_within(entropy, exact.entropy, 4e-6)
    g, eta = torch.randn(2, *ids.shape, generator=testing.generator(9))
    (grad,) = torch.autograd.grad((logprobs, entropy), source, (g, eta))
    testing.assert_within(grad, testing.token_stats_gradient(logits, ids, g, eta))


def test_d1_a_column_is_never_read_as_a_matrix(implementation: str) -> None:
    """D1, Liger's Triton kernel: a (B, 1) tensor indexed as (B, L) reads out of bounds, gradients off by up to 4e13."""
    inputs = testing.random_policy()
    column = inputs["importance_weights"].unsqueeze(1)
    for name in ("advantages", "importance_weights", "old_logprobs", "ref_logprobs", "entropy"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(5, 1\), expected"):
            policy_loss(**(inputs | {name: column}))
    expanded = policy_loss(**(inputs | {"importance_weights": column.expand(5, 7)})).loss
    testing.assert_within(expanded, testing.policy_loss(objectives.grpo(), **inputs).loss)


@pytest.mark.parametrize("more", [1, 3, 100])
def test_d2_padding_does_not_change_a_sequence_level_loss(more: int, implementation: str) -> None:
    """D2, Liger: the mean log-ratio of a sequence is divided by the padded length."""
    inputs = testing.random_policy()
    objective = objectives.gspo(clip_low=0.5, clip_high=0.5)

    def padded(value: Tensor) -> Tensor:
        return torch.cat([value, torch.full((5, more), 7.0)], 1) if value.dim() == 2 else value

    longer = {k: padded(v) for k, v in inputs.items()} | {"mask": (torch.arange(7 + more) < 7).expand(5, -1)}
    expected = testing.policy_loss(objective, **inputs)
    source = longer.pop("logprobs").requires_grad_()
    loss = policy_loss(source, **longer, objective=objective).loss
    loss.backward()
    testing.assert_within(loss, expected.loss)
    testing.assert_within(source.grad[:, :7], expected.grad_logprobs)
    assert not source.grad[:, 7:].any()


def test_d3_gspo_with_kl_has_the_gradient_of_its_loss(implementation: str) -> None:
    """D3, Liger: off by 0.2 to 0.6 %. Ours is within fp32 rounding of the closed form and of finite differences."""
    inputs = testing.random_policy(spread=0.1)
    inputs["mask"] = testing.length_mask(testing.random_lengths(5, 7), 7)
    objective = objectives.gspo(clip_low=0.5, clip_high=0.5, kl_coef=0.5)
    logprobs = inputs.pop("logprobs")
    source = logprobs.clone().requires_grad_()
    policy_loss(source, **inputs, objective=objective).loss.backward()
    testing.assert_within(source.grad, testing.policy_loss(objective, logprobs=logprobs, **inputs).grad_logprobs)

    step, direction = 1e-6, torch.randn(5, 7, dtype=torch.float64, generator=testing.generator(3))
    up, down = (
        testing.policy_loss(objective, logprobs=logprobs + sign * step * direction, **inputs).loss.value
        for sign in (1, -1)
    )
    slope = (source.grad.double() * direction).sum()
    assert (slope - (up - down) / (2 * step)).abs() <= 1e-6 * (source.grad * direction).abs().sum()


def test_d4_a_masked_overflow_leaves_the_gradient_finite(implementation: str) -> None:
    """D4, Liger's chunked loss: a masked token with log-ratio > 88 gives a finite loss and NaN for every weight."""
    hidden, weight = testing.random_logits(2, 3, 4, scale=1), testing.random_logits(7, 4, scale=1, seed=1)
    ids, mask = testing.random_ids(2, 3, vocab=7), torch.ones(2, 3)
    mask[0, 2] = 0
    old_logprobs = token_logprobs(hidden @ weight.T, ids)
    old_logprobs[0, 2] -= 100

    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = grpo_loss(ours[0] @ ours[1].T, ids, torch.ones(2), old_logprobs=old_logprobs, mask=mask).loss
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() and x.grad.any() for x in ours)

    if chunked := liger():
        theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        fused = chunked.LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
        their_loss, _ = fused(*theirs, ids, mask, torch.ones(2), old_per_token_logps=old_logprobs)
        their_loss.backward()
        assert their_loss.isfinite() and theirs[1].grad.isnan().all()


@slow_interpreted
def test_d5_a_forbidden_word_leaves_entropy_and_gradient_finite(implementation: str) -> None:
    """D5, TRL: one -inf logit turns the entropy and the gradient of its row into NaN."""
    logits, ids = testing.random_logits(2, 3, 50), torch.full((2, 3), 7)
    logits[0, 1, 3] = -torch.inf
    if implementation != "reference":
        check_stats(logits, ids)
    source = logits.clone().requires_grad_()
    entropy = token_logprobs_and_entropy(source, ids)[1]
    entropy.sum().backward()
    assert entropy.isfinite().all() and source.grad.isfinite().all()

    if utilities := trl():
        theirs = logits.clone().requires_grad_()
        their_entropy = utilities.selective_log_softmax_and_entropy(theirs, ids)[1]
        their_entropy.sum().backward()
        assert their_entropy[0, 1].isnan() and theirs.grad[0, 1].isnan().any()


@pytest.mark.parametrize("first", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_d6_a_first_block_of_forbidden_words(first: int, dtype: torch.dtype) -> None:
    """D6, TRL and Liger kernels: (-inf) - (-inf) in the running maximum makes the log-prob NaN."""
    logits = testing.random_logits(2, 10_000, dtype=dtype)
    logits[:, :first] = -torch.inf
    check_stats(logits, torch.tensor([first, 9_999]))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_d7_a_common_offset_costs_no_precision(offset: float) -> None:
    """D7, TRL: sums that are not taken from the maximum lose 3e-3 at an offset of 1e4."""
    logits, ids = testing.random_logits(2, 3, 500) + offset, testing.random_ids(2, 3, vocab=500)
    check_stats(logits, ids)

    if utilities := trl():
        theirs = utilities.selective_log_softmax(logits, ids)
        assert (theirs - testing.token_stats(logits, ids).logprobs).abs().max() > 50 * 4e-6


@pytest.mark.parametrize("vocab", [1, 1000, 1023, 1025, 3000, 50_257])
@pytest.mark.parametrize("level", [-60.0, -20.0])
def test_d8_no_phantom_logits_past_the_vocabulary(vocab: int, level: float) -> None:
    """D8, verl: the tail of the last block counted as logits of 0, so log-probs came out positive."""
    logits, ids = testing.random_logits(2, vocab, scale=1) + level, testing.random_ids(2, vocab=vocab)
    check_stats(logits, ids)
    assert (token_logprobs(logits, ids) <= 0).all()


@pytest.mark.parametrize("level", [-105.0, -1e4, -1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_d9_rows_far_below_zero(level: float, dtype: torch.dtype) -> None:
    """D9, verl: a running maximum that starts at 0 underflows when all logits are below -104."""
    check_stats((torch.zeros(2, 3000) + level).to(dtype), torch.tensor([0, 2999]))


@slow_on_gpu_kernels
@pytest.mark.parametrize("length", [65_535, 65_536, 70_001])
def test_d10_any_completion_length(length: int) -> None:
    """D10, Liger: a grid of (B, L) programs fails at L >= 65,536, and every new length compiles the kernel again."""
    logits, ids = testing.random_logits(1, length, 3), testing.random_ids(1, length, vocab=3)
    source = logits.clone().requires_grad_()
    loss, metrics = grpo_loss(source, ids, torch.ones(1))
    loss.backward()
    assert metrics["tokens"] == length and loss == -1
    check = [0, length // 2, length - 1]
    g = torch.full((3,), -1 / length)
    testing.assert_within(source.grad[0, check], testing.token_stats_gradient(logits[0, check], ids[0, check], g))


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7])
def test_d11_a_constant_group_has_advantage_zero(reward: float, implementation: str) -> None:
    """D11, TRL, verl, OpenRLHF: the rounded mean of equal rewards, divided by a tiny eps, is up to 0.98."""
    rewards = torch.full((8,), reward)
    for eps in (1e-4, 1e-6, 1e-9, 0.0):
        assert not group_advantages(rewards, 8, eps=eps).any()

    if utilities := trl():
        grouped = rewards.view(-1, 8)
        centred = rewards - torch.nanmean(grouped, dim=1)
        assert (centred / (utilities.nanstd(grouped, dim=1) + 1e-4)).abs().max() > 5e-5


@pytest.mark.parametrize("preset", [objectives.grpo(), objectives.dapo(), objectives.dr_grpo(7)])
def test_d12_gradient_accumulation_does_not_scale_the_loss(preset: Objective, implementation: str) -> None:
    """D12, TRL and ms-swift: averaging the micro-batches' own means mis-scales the loss by 0.5 to 4."""
    inputs = testing.random_policy()
    mask = testing.length_mask([7, 1, 2, 1, 3], 7)
    logprobs = inputs.pop("logprobs").requires_grad_()
    whole = policy_loss(logprobs, **inputs, mask=mask, objective=preset).loss
    (expected,) = torch.autograd.grad(whole, logprobs)
    normalizer = {"sequence_mean": 5, "token_mean": 14, "constant": 35}[preset.aggregate]
    losses = [
        policy_loss(
            logprobs[part], **{k: v[part] for k, v in inputs.items()}, mask=mask[part],
            normalizer=normalizer, objective=preset,
        ).loss
        for part in (slice(0, 1), slice(1, 5))
    ]
    (accumulated,) = torch.autograd.grad(sum(losses), logprobs)
    torch.testing.assert_close(accumulated, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(losses).detach(), whole.detach(), rtol=1e-5, atol=0)
