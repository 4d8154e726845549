"""Filters of tokens and sequences: oracles, what they do to a loss and to its cost, several ranks, errors."""

import math
from fractions import Fraction
from typing import Any

import filter_ranks
import linear_cases as cases
import pytest
import torch
from backends import host_code
from filter_ranks import CLIP_COV, FIRST, batch
from ranks import run_ranks
from torch import Tensor

from r1kernels import (
    clip_cov_filter,
    high_entropy_filter,
    linear_grpo_loss,
    linear_token_logprobs_and_entropy,
    objectives,
    off_policy_filter,
    testing,
)
from r1kernels.testing import token_filters as oracles

pytestmark = host_code
VALUES = batch()
PER_TOKEN = VALUES["advantages"][:, None].expand_as(VALUES["logprobs"])


def flat(value: Tensor) -> list[Any]:
    return value.flatten().tolist()


@pytest.mark.parametrize("top", [0.01, 0.2, 0.5, 0.9, 1.0])
def test_high_entropy_is_the_oracle(top: float) -> None:
    entropy, mask = VALUES["entropy"].clone(), VALUES["mask"]
    entropy[2:4, :4] = 1.5  # ties
    found = high_entropy_filter(testing.poisoned(entropy, mask), mask, top=top)
    assert flat(found) == oracles.high_entropy(flat(entropy), flat(mask), top)
    assert found.dtype == torch.float32 and (top < 1 or torch.equal(found, mask.float()))
    assert torch.equal(high_entropy_filter(entropy[mask], top=top), found[mask])


def test_high_entropy_is_torch_quantile() -> None:
    entropy = torch.rand(5, 200, generator=testing.generator(0))
    assert torch.equal(high_entropy_filter(entropy), (entropy >= entropy.quantile(0.8)).float())
    assert high_entropy_filter(entropy).mean() == 0.2
    for size in range(2, 60):  # places that are whole numbers, up to the rounding of 1 - top
        tens = torch.arange(float(10 * size + 1))
        assert high_entropy_filter(tens, top=0.1).sum() == size + 1


@pytest.mark.parametrize("top", ["0.1", "0.2", "0.3", "0.6", "0.7", "0.8", "0.9", "0.95"])
def test_high_entropy_counts_exactly(top: str) -> None:
    for size in (2, 11, 51, 101, 1001, 20_001):
        found = high_entropy_filter(torch.arange(float(size)), top=float(top)).sum()
        assert found == size - math.ceil((1 - Fraction(top)) * (size - 1))


def test_infinite_entropies_are_the_highest() -> None:
    entropy = torch.arange(100.0)
    entropy[40:] = math.inf
    assert torch.equal(high_entropy_filter(entropy), (entropy == math.inf).float())
    entropy[:80] = -math.inf
    assert torch.equal(high_entropy_filter(entropy), (entropy == math.inf).float())


def test_nothing_counts() -> None:
    none = torch.zeros(7, 9)
    assert not high_entropy_filter(VALUES["entropy"], none).any()
    assert not high_entropy_filter(torch.full((3,), math.nan)).any()
    assert high_entropy_filter(torch.empty(0, 4)).shape == (0, 4)
    assert clip_cov_filter(VALUES["logprobs"], PER_TOKEN, none).all()
    assert clip_cov_filter(torch.empty(0), torch.empty(0)).shape == (0,)
    assert off_policy_filter(VALUES["logprobs"], VALUES["old_logprobs"], VALUES["advantages"], none, threshold=0).all()


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
def test_off_policy_is_the_oracle(threshold: float) -> None:
    old, mask = VALUES["old_logprobs"].clone(), VALUES["mask"]
    old[0, 1], old[3, 0] = math.nan, math.inf
    inputs = [testing.poisoned(value, mask) for value in (VALUES["logprobs"], old)]
    gaps = [flat((o.double() - new.double())[m]) for o, new, m in zip(old, VALUES["logprobs"], mask, strict=True)]
    expected = oracles.off_policy(gaps, flat(VALUES["advantages"]), threshold)
    found = off_policy_filter(*inputs, VALUES["advantages"], mask, threshold=threshold)
    assert flat(found) == expected and 0 < sum(expected) < 7
    rows = off_policy_filter(*inputs, PER_TOKEN, mask, threshold=threshold)
    assert torch.equal(rows, found[:, None].expand_as(rows))
    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    packed = [value[mask] for value in inputs]
    assert flat(off_policy_filter(*packed, VALUES["advantages"], threshold=threshold, cu_seqlens=ends)) == expected


def test_clip_cov_drops_some_of_the_largest_covariances() -> None:
    logprobs, mask = VALUES["logprobs"], VALUES["mask"]
    covariances = oracles.covariances(flat(logprobs), flat(PER_TOKEN), flat(mask))
    candidates = torch.tensor([0.2 < value < 5 for value in covariances]).view(7, 9)
    count = int(0.1 * int(mask.sum()))
    drawn = []
    for seed in range(20):
        found = clip_cov_filter(testing.poisoned(logprobs, mask), PER_TOKEN, mask, **CLIP_COV,
                                generator=testing.generator(seed))
        drawn.append(found == 0)
        assert int((found == 0).sum()) == count < int(candidates.sum()) and not (drawn[-1] & ~candidates).any()
    assert torch.equal(torch.stack(drawn).any(0), candidates)  # each of them at some time
    all_of_them = clip_cov_filter(logprobs, PER_TOKEN, mask, share=1.0, low=0.2)
    assert torch.equal(all_of_them == 0, candidates)
    assert int((clip_cov_filter(logprobs, PER_TOKEN, mask, low=0.2) == 0).sum()) == 1  # at least one
    again = [clip_cov_filter(logprobs, PER_TOKEN, mask, **CLIP_COV, generator=testing.generator(3)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_clip_cov_leaves_out_what_is_not_finite(bad: float) -> None:
    logprobs, mask = VALUES["logprobs"].clone(), VALUES["mask"].clone()
    mask[2, :2] = True
    logprobs[2, 1] = bad
    without = mask.clone()
    without[2, 1] = False
    found = clip_cov_filter(logprobs, PER_TOKEN, mask, share=1.0, low=0.2)
    assert torch.equal(found, clip_cov_filter(VALUES["logprobs"], PER_TOKEN, without, share=1.0, low=0.2))
    assert found[2, 1] == 1 and not found.all()


def test_a_loss_of_the_kept_share_computes_only_that_share() -> None:
    """Statistics, a filter, and a loss: dropped tokens count in the denominator, and the loss never reads them."""
    case = cases.make("plain", 5, 7, width=12, vocab=37)
    with torch.no_grad():
        logprobs, entropy = linear_token_logprobs_and_entropy(**case)
    kept = high_entropy_filter(entropy, top=0.4)
    rest = {"advantages": torch.linspace(-1, 1.5, 5), "old_logprobs": logprobs + 0.1, "objective": objectives.dapo()}
    hidden = case["hidden"].clone().requires_grad_()
    given = linear_grpo_loss(**case | {"hidden": testing.poisoned(hidden, kept > 0)}, **rest, importance_weights=kept)
    whole = linear_grpo_loss(**case | {"hidden": hidden}, **rest, mask=kept > 0)
    assert given.metrics["measured_tokens"] == kept.sum() < given.metrics["tokens"] == 35
    torch.testing.assert_close(given.loss, whole.loss * kept.sum() / 35)
    (grad,) = torch.autograd.grad(given.loss, hidden)
    assert torch.equal(grad.any(-1), (kept > 0) & (grad != 0).any(-1)) and grad[kept > 0].any()


def test_they_compile() -> None:
    def run(entropy: Tensor, mask: Tensor) -> Tensor:
        return high_entropy_filter(entropy, mask) * off_policy_filter(entropy, entropy - 1, PER_TOKEN, threshold=0.1)

    arguments = VALUES["entropy"], VALUES["mask"]
    torch.testing.assert_close(testing.compiled(run)(*arguments), run(*arguments))


# ---- several ranks ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(filter_ranks, tmp_path_factory.mktemp("ranks"))


def test_ranks_decide_together(ranks: list[dict[str, Any]]) -> None:
    logprobs, mask = VALUES["logprobs"], VALUES["mask"]
    found = {name: torch.cat([results[name] for results in ranks]) for name in ("high entropy", "clip-cov")}
    assert torch.equal(found["high entropy"], high_entropy_filter(VALUES["entropy"], mask, top=0.3))
    dropped = found["clip-cov"] == 0
    candidates = clip_cov_filter(logprobs, PER_TOKEN, mask, **CLIP_COV | {"share": 1.0}) == 0
    assert int(dropped.sum()) == int(0.1 * int(mask.sum())) and not (dropped & ~candidates).any()
    assert [len(results["clip-cov"]) for results in ranks] == [FIRST, 7 - FIRST]
    whole = off_policy_filter(logprobs, VALUES["old_logprobs"], VALUES["advantages"], mask, threshold=0.05)
    for results in ranks:
        assert torch.equal(results["off policy"], whole) and 0 < whole.sum() < 7


def test_ranks_must_agree(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "top is 0.25 on rank" in results["another top"] or "top is 0.5 on rank" in results["another top"]
    assert "top is 0" in ranks[0]["a refusal"] and "rank 0 of process_group raised an error" in ranks[1]["a refusal"]


# ---- errors ----

ONE = torch.zeros(2, 3)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: high_entropy_filter(None), TypeError, "entropy is a NoneType"),
    (lambda: high_entropy_filter(ONE.sum()), ValueError, "entropy is 0-d"),
    (lambda: high_entropy_filter(ONE, top=0), ValueError, "top is 0, expected a finite number > 0"),
    (lambda: high_entropy_filter(ONE, top=1.5), ValueError, r"top is 1.5, expected a share in \(0, 1\]"),
    (lambda: high_entropy_filter(ONE, top=torch.ones(2)), TypeError, "top is tensor"),
    (lambda: high_entropy_filter(ONE, ONE[0]), ValueError, r"mask has shape \(3,\), expected \(2, 3\)"),
    (lambda: high_entropy_filter(ONE, process_group=1), TypeError, "process_group is 1"),
    (lambda: off_policy_filter(ONE, ONE[0], ONE[:, 0], threshold=1), ValueError, r"old_logprobs has shape \(3,\)"),
    (lambda: off_policy_filter(ONE, ONE, ONE[0], threshold=1), ValueError, r"advantages has shape \(3,\), expected"),
    (lambda: off_policy_filter(ONE, ONE, ONE.int(), threshold=1), TypeError, "advantages has dtype torch.int32"),
    (lambda: off_policy_filter(ONE, ONE, ONE, threshold=-1), ValueError, "threshold is -1, expected a finite number"),
    (lambda: off_policy_filter(ONE[0], ONE[0], ONE[0], threshold=1), ValueError, "cu_seqlens is None for packed"),
    (lambda: off_policy_filter(ONE, ONE, ONE, threshold=1, cu_seqlens=[0]), ValueError, "cu_seqlens was given"),
    (lambda: clip_cov_filter(ONE, ONE[:, 0]), ValueError, r"advantages has shape \(2,\), expected \(2, 3\)"),
    (lambda: clip_cov_filter(ONE, 1.0), TypeError, "advantages is a float"),
    (lambda: clip_cov_filter(ONE, ONE, share=2), ValueError, r"share is 2.0, expected one in \(0, 1\]"),
    (lambda: clip_cov_filter(ONE, ONE, low=5), ValueError, "high is 5.0, expected a number > low = 5.0"),
    (lambda: clip_cov_filter(ONE, ONE, generator=3), TypeError, "generator is 3, expected a torch.Generator"),
])
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
