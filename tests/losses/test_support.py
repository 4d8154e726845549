"""Log-probs over sets of ids from logits, against the float64 oracle of logits with -inf outside the sets."""

from typing import Any

import pytest
import torch
from backends import checks_only, compiles, reference_only
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1kernels import backend, cross_entropy, grpo_loss, testing, token_logprobs, token_logprobs_and_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(vocab: int = 50, dtype: torch.dtype = torch.float32, **sets: Any) -> tuple[Tensor, Tensor, Any]:
    """(3, 4, V) logits, their tokens and their sets."""
    token_ids = testing.random_ids(3, 4, vocab=vocab)
    logits = testing.random_logits(3, 4, vocab, dtype=dtype)
    return logits, token_ids, testing.random_support(token_ids, vocab, **{"most": 20, "whole": 0.2} | sets)


@reference_only
def test_reference_gradcheck() -> None:
    logits, token_ids, support = batch(7, most=4)
    leaf = logits.double().requires_grad_()
    with backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x: token_logprobs_and_entropy(x, token_ids, temperature=0.7, support=support), leaf
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("whole", [0.0, 0.3, 1.0])
def test_values_and_gradients(dtype: torch.dtype, temperature: float, whole: float, implementation: str) -> None:
    logits, token_ids, support = batch(dtype=dtype, whole=whole)
    g, eta = torch.randn(2, 3, 4, generator=testing.generator(1))
    g[0, 1] = eta[0, 1] = 0
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(leaf, token_ids, temperature=temperature, support=support)
    (g * logprobs + eta * entropy).sum().backward()
    over = testing.over_support(logits.double(), support)
    expected = testing.token_stats(over, token_ids, temperature)
    testing.assert_within(logprobs, expected.logprobs, 4e-6 / temperature)
    testing.assert_within(entropy, expected.entropy, 4e-6 / temperature)
    gradient = testing.token_stats_gradient(over, token_ids, g, eta, temperature)
    if implementation != "reference":
        testing.assert_within(leaf.grad, gradient)
    else:  # p is the power of a rounded log p of 32 / temperature at most
        testing.assert_within(leaf.grad, gradient.value, gradient.budget(dtype, roundings=150))
    assert leaf.grad.dtype == dtype
    assert not leaf.grad[over == -torch.inf].any() and not leaf.grad[0, 1].any()


@given(vocab=st.integers(1, 30), most=st.integers(1, 30), seed=st.integers(0, 1000), sliced=st.booleans())
def test_any_sets_behind_a_mask(vocab: int, most: int, seed: int, sliced: bool) -> None:
    """Through the loss, whose mask hides NaN, ids and sets."""
    token_ids = testing.random_ids(2, 4, vocab=vocab, seed=seed)
    ids, offsets = testing.random_support(token_ids, vocab, most, whole=0.2, seed=seed)
    mask = torch.rand(2, 4, generator=testing.generator(seed)) < 0.7
    behind = ~mask.reshape(-1).repeat_interleave(offsets.diff())
    logits = testing.random_logits(2, 4, vocab, seed=seed)
    over = testing.over_support(logits.double(), (ids, offsets)).requires_grad_()
    with backend("reference"):
        expected = grpo_loss(over, token_ids, torch.tensor([1.0, -2.0]).double(), mask=mask)
    expected.loss.backward()
    whole = torch.cat([testing.poisoned(logits, mask), torch.zeros(2, 1, vocab)], 1).requires_grad_()
    view = whole[:, :-1] if sliced else whole[:, :-1].contiguous()
    loss = grpo_loss(view, testing.poisoned(token_ids, mask), torch.tensor([1.0, -2.0]), mask=mask,
                     support=(torch.where(behind, 99, ids), offsets)).loss
    loss.backward()
    testing.assert_within(loss, expected.loss, 1e-5)
    testing.assert_within(whole.grad[:, :-1], torch.where(mask[..., None], over.grad, 0), 1e-6)


def test_an_id_that_is_there_twice_counts_once(implementation: str) -> None:
    logits, token_ids, (ids, offsets) = batch()
    doubled = torch.cat([s.repeat(2) for s in ids.split(offsets.diff().tolist())]), 2 * offsets
    results = []
    for support in ((ids, offsets), doubled):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(leaf, token_ids, support=support)
        (logprobs + entropy).sum().backward()
        results.append((logprobs, entropy, leaf.grad))
    for once, twice in zip(*results, strict=True):
        testing.assert_within(twice, once, 2e-6)


def test_the_first_ratio_is_exactly_1(implementation: str) -> None:
    logits, token_ids, support = batch()
    old = token_logprobs(logits, token_ids, support=support)
    _, metrics = grpo_loss(logits, token_ids, torch.ones(3), old_logprobs=old, support=support)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1


def test_cross_entropy_and_a_padded_vocabulary(implementation: str) -> None:
    logits, targets, support = batch()
    targets = torch.where(torch.arange(4) == 2, -100, targets)
    padded = torch.cat([logits, torch.full((3, 4, 6), torch.nan)], -1).requires_grad_()
    loss = cross_entropy(padded, targets, support=support, vocab_size=50)
    loss.backward()
    over = testing.over_support(logits.double(), support)
    expected = torch.nn.functional.cross_entropy(over.flatten(0, 1), targets.flatten())
    testing.assert_within(loss, expected, 4e-6)
    assert padded.grad[..., :50].any() and not padded.grad[..., 50:].any() and not padded.grad[:, 2].any()


@pytest.mark.few(2)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compile() -> None:
    logits, token_ids, support = batch()

    def loss(x: Tensor) -> Tensor:
        return grpo_loss(x, token_ids, torch.ones(3), support=support).loss

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((loss, testing.compiled(loss)), leaves, strict=True):
        function(leaf).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@checks_only
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_sets_that_are_wrong(implementation: str) -> None:
    logits, token_ids, (ids, offsets) = batch(whole=0)
    missing = ids.clone()
    missing[: offsets[1]] = (token_ids[0, 0] + 1) % 50
    with backend(implementation):
        with pytest.raises(ValueError, match=r"token_ids\[0\] is \d+, expected an id of its set"):
            token_logprobs(logits, token_ids, support=(missing, offsets))
        with pytest.raises(ValueError, match=r"targets\[0\] is \d+, expected an id of its set, support token_ids"):
            cross_entropy(logits, token_ids, support=(missing, offsets))
        with pytest.raises(ValueError, match=r"support token_ids\[0\] is -1, expected an id in \[0, 50\)"):
            token_logprobs(logits, token_ids, support=(torch.where(torch.arange(len(ids)) == 0, -1, ids), offsets))
        with pytest.raises(ValueError, match="support offsets has 12 entries, expected 13"):
            grpo_loss(logits, token_ids, torch.ones(3), support=(ids, offsets[1:]))
