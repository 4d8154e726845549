"""The gradient of a batch does not depend on how it is cut, packed, ordered or threaded."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import slow_interpreted
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import OBJECTIVES
from torch import Tensor

from r1kernels import Objective, backend, grpo_loss, policy_loss, testing

BATCH, STEPS, VOCAB, MAX_LENGTH = 6, 5, 40, 9
AGGREGATES = ["sequence_mean", "token_mean", "constant"]
SEQUENCES = st.permutations(range(BATCH))
LENGTHS = st.lists(st.integers(0, STEPS), min_size=BATCH, max_size=BATCH)
SEED = st.integers(0, 1000)


def make_batch(seed: int, lengths: list[int]) -> dict[str, Tensor]:
    """Arguments of `grpo_loss` for padded sequences of the given lengths."""
    inputs = testing.random_policy(BATCH, STEPS, seed)
    del inputs["entropy"]
    logits = testing.random_logits(BATCH, STEPS, VOCAB, scale=1, seed=seed)
    ids = testing.random_ids(BATCH, STEPS, vocab=VOCAB, seed=seed)
    logprobs = inputs.pop("logprobs")
    shift = testing.token_stats(logits, ids).logprobs.float() - logprobs
    inputs["old_logprobs"] += shift
    inputs["ref_logprobs"] += shift
    return inputs | {"logits": logits, "token_ids": ids, "mask": testing.length_mask(lengths, STEPS)}


def make_objective(name: str, aggregate: str) -> Objective:
    length = {"max_length": MAX_LENGTH} if aggregate == "constant" else {}
    return Objective(**OBJECTIVES[name], aggregate=aggregate, kl_coef=0.1, entropy_coef=0.01, **length)


def global_normalizer(aggregate: str, mask: Tensor) -> Tensor:
    counts = {"sequence_mean": BATCH, "token_mean": max(int(mask.sum()), 1), "constant": BATCH * MAX_LENGTH}
    return torch.tensor(float(counts[aggregate]))


def rows(batch: dict[str, Tensor], index: Any) -> dict[str, Tensor]:
    return {k: v[index] if v.dim() else v for k, v in batch.items()}


def pack(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch["mask"]
    flat = {k: v[mask] if v.shape[:2] == mask.shape else v for k, v in batch.items() if k != "mask"}
    return flat | {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])}


def gradient(
    batch: dict[str, Tensor], objective: Objective, reshape: Callable[[dict[str, Tensor]], list[dict[str, Tensor]]]
) -> tuple[Tensor, Tensor]:
    """Sums of the loss and of the logits' gradient over the pieces that `reshape` makes of a batch."""
    logits = batch["logits"].clone().requires_grad_()
    losses = [grpo_loss(**piece, objective=objective).loss for piece in reshape(batch | {"logits": logits})]
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach(), logits.grad


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    """To 1e-6 of each row's largest entry; the loss, a sum of terms of both signs, to 1e-6 of 1."""
    scale = a[1].abs().amax(-1, keepdim=True)
    testing.assert_within(b[1], a[1], 1e-6 * scale)
    testing.assert_within(b[0], a[0], 1e-6 * (1 + a[0].abs()))


@slow_interpreted
@pytest.mark.parametrize("aggregate", AGGREGATES)
@given(name=st.sampled_from(list(OBJECTIVES)), lengths=LENGTHS, seed=SEED, cuts=st.sets(st.integers(1, BATCH - 1)))
def test_micro_batches_with_the_global_normalizer(
    aggregate: str, name: str, lengths: list[int], seed: int, cuts: set[int]
) -> None:
    batch, objective = make_batch(seed, lengths), make_objective(name, aggregate)
    bounds = [0, *sorted(cuts), BATCH]
    normalizer = global_normalizer(aggregate, batch["mask"])

    def split(whole: dict[str, Tensor]) -> list[dict[str, Any]]:
        pieces = itertools.starmap(slice, itertools.pairwise(bounds))
        return [rows(whole, piece) | {"normalizer": normalizer} for piece in pieces]

    assert_same(gradient(batch, objective, lambda whole: [whole]), gradient(batch, objective, split))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@given(name=st.sampled_from(list(OBJECTIVES)), lengths=LENGTHS, seed=SEED, order=SEQUENCES)
@slow_interpreted
def test_row_order(aggregate: str, name: str, lengths: list[int], seed: int, order: list[int]) -> None:
    batch, objective = make_batch(seed, lengths), make_objective(name, aggregate)
    whole = gradient(batch, objective, lambda whole: [whole])
    assert_same(whole, gradient(batch, objective, lambda whole: [rows(whole, order)]))


@slow_interpreted
@pytest.mark.parametrize("aggregate", AGGREGATES)
@given(name=st.sampled_from(list(OBJECTIVES)), lengths=LENGTHS, seed=SEED, order=SEQUENCES, cut=st.integers(0, BATCH))
def test_packing(aggregate: str, name: str, lengths: list[int], seed: int, order: list[int], cut: int) -> None:
    """In any order, in one pack or in two."""
    batch, objective = make_batch(seed, lengths), make_objective(name, aggregate)
    normalizer = global_normalizer(aggregate, batch["mask"])

    def packs(whole: dict[str, Tensor]) -> list[dict[str, Any]]:
        return [pack(rows(whole, part)) | {"normalizer": normalizer} for part in (order[:cut], order[cut:])]

    assert_same(gradient(batch, objective, lambda whole: [whole]), gradient(batch, objective, packs))


@slow_interpreted
@given(name=st.sampled_from(list(OBJECTIVES)), lengths=LENGTHS, seed=SEED, more=st.integers(1, 9))
def test_padding(name: str, lengths: list[int], seed: int, more: int) -> None:
    """Longer rows of masked NaN change no bit."""
    batch, objective = make_batch(seed, lengths), make_objective(name, "token_mean")

    def pad(whole: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        def longer(value: Tensor) -> Tensor:
            if value.shape[:2] != (BATCH, STEPS):
                return value
            fill = {torch.bool: False, torch.int64: -100}.get(value.dtype, float("nan"))
            return torch.cat([value, torch.full((BATCH, more, *value.shape[2:]), fill)], 1)

        return [{k: longer(v) for k, v in whole.items()}]

    whole, padded = gradient(batch, objective, lambda whole: [whole]), gradient(batch, objective, pad)
    assert torch.equal(whole[0], padded[0]) and torch.equal(whole[1], padded[1])


@pytest.mark.not_on("triton", "cuda", reason="threads of a CPU")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_threads_change_no_bit(name: str, on_threads: Callable[[int], None]) -> None:
    """More tokens than a thread takes at once, in sequences of very different length."""
    inputs = testing.random_policy(64, 400)
    inputs["mask"] = testing.length_mask(testing.random_lengths(64, 400), 400)
    inputs["logprobs"].requires_grad_()
    results = []
    for threads in (1, 2, 3):
        on_threads(threads)
        with backend(testing.KERNELS):
            loss, metrics = policy_loss(**inputs, objective=make_objective(name, "token_mean"))
        (grad,) = torch.autograd.grad(loss, inputs["logprobs"])
        results.append((loss, grad, *metrics.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
@slow_interpreted
def test_a_sequence_does_not_depend_on_the_others(name: str, implementation: str) -> None:
    """Bit for bit, once the normalizer is given: also beside a sequence that is NaN."""
    batch, objective = make_batch(3, [5, 3, 5, 1, 4, 2]), make_objective(name, "sequence_mean")
    normalizer = {"normalizer": torch.tensor(6.0)}
    one_by_one = [slice(n, n + 1) for n in range(BATCH)]
    _, alone = gradient(batch, objective, lambda whole: [rows(whole, row) | normalizer for row in one_by_one])
    batch["old_logprobs"][2] = float("nan")
    batch["advantages"][2] = 1.0
    _, together = gradient(batch, objective, lambda whole: [whole | normalizer])
    others = [0, 1, 3, 4, 5]
    assert torch.equal(alone[others], together[others])
