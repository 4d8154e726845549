"""Importance weights of tokens and sequences: a float64 oracle, log-probs that are not finite, several ranks."""

import math
from typing import Any

import importance_ranks
import pytest
import torch
from backends import host_code
from importance_ranks import FIRST, policies
from ranks import run_ranks
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import importance_weights, policy_loss, testing

pytestmark = host_code
LEVELS = ["token", "sequence", "sequence_mean"]
MODES = ["truncate", "mask"]
BOUNDS = [(0.0, 2.0), (0.5, 1.5), (0.0, math.inf), (1.0, 1.0)]
ROWS, COLUMNS = policies()[0].shape


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("floor", "cap"), BOUNDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_against_the_oracle(level: str, mode: str, floor: float, cap: float, normalize: bool) -> None:
    old, sampler, mask = policies()
    old[4] = sampler[4]  # one sequence of weight 1
    options = {"level": level, "mode": mode, "floor": floor, "cap": cap, "normalize": normalize}
    sequences = [range(row * COLUMNS, (row + 1) * COLUMNS) for row in range(ROWS)]
    exact, metrics = testing.importance_weights(old, sampler, mask, sequences, **options)
    found = importance_weights(old, sampler, mask, **options)
    assert found.weights.shape == (old.shape if level == "token" else (ROWS,))
    assert found.weights.dtype == torch.float32 and not found.weights.requires_grad
    torch.testing.assert_close(found.weights.flatten().double(), torch.tensor(exact).double(), rtol=6e-8, atol=0)
    assert {name: value.item() for name, value in found.metrics.items()} == pytest.approx(metrics, rel=1e-6)

    keep = torch.arange(COLUMNS) < torch.tensor([COLUMNS, 0, *range(3, ROWS + 1)])[:, None]
    keep[1] = False
    lengths = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    flat = importance_weights(old[keep], sampler[keep], mask[keep], cu_seqlens=lengths.int(), **options)
    padded = importance_weights(old, sampler, mask & keep, **options)
    torch.testing.assert_close(flat.weights, padded.weights[keep] if level == "token" else padded.weights)
    torch.testing.assert_close(flat.metrics, padded.metrics)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_equal_log_probs_weigh_exactly_one(level: str, mode: str) -> None:
    old, _, mask = policies()
    old[0, 0] = -math.inf
    found = importance_weights(old, old.clone(), mask, level=level, mode=mode)
    expected = mask.float() if level == "token" else torch.ones(ROWS)
    assert torch.equal(found.weights, expected)
    values = {name: value.item() for name, value in found.metrics.items()}
    assert values == {name: float(name in ("importance_mean", "importance_ess")) for name in values}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_nothing_behind_the_mask_matters(level: str, mode: str, normalize: bool, junk: float) -> None:
    old, sampler, mask = policies()
    options = {"level": level, "mode": mode, "floor": 0.5, "normalize": normalize}
    clean = importance_weights(old, sampler, mask, **options)
    for a, b in ((junk, 1.0), (1.0, junk), (junk, junk)):
        dirty = importance_weights(old.masked_fill(~mask, a), sampler.masked_fill(~mask, b), mask.float(), **options)
        assert torch.equal(dirty.weights, clean.weights) and dirty.metrics == clean.metrics


# A token's log-probs by both policies, and its weights in the modes "truncate" and "mask" with the bounds 0.5 and 2.
ODD = [
    (-1.0, -1e4, 2.0, 0.0), (-1e4, -1.0, 0.5, 0.0), (-1.0, -math.inf, 2.0, 0.0), (-math.inf, -1.0, 0.5, 0.0),
    (-math.inf, -math.inf, 1.0, 1.0), (math.nan, -1.0, 0.0, 0.0), (-1.0, math.nan, 0.0, 0.0), (-3e38, -1.0, 0.5, 0.0),
    (-1.0, -3e38, 2.0, 0.0),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("old", "sampler", "truncated", "masked"), ODD)
def test_no_log_prob_gives_nan_or_inf(level: str, old: float, sampler: float, truncated: float, masked: float) -> None:
    olds, samplers = torch.tensor([[old], [-1.0]]), torch.tensor([[sampler], [-1.0]])
    for mode, expected in (("truncate", truncated), ("mask", masked)):
        found = importance_weights(olds, samplers, level=level, mode=mode, floor=0.5, cap=2.0)
        assert found.weights.flatten().tolist() == [expected, 1.0]
        assert not torch.stack(list(found.metrics.values())).isnan().any()
        assert found.metrics["nan_tokens"] == (math.isnan(old) or math.isnan(sampler))
    for normalize in (False, True):
        found = importance_weights(olds, samplers, level=level, cap=math.inf, normalize=normalize)
        assert found.weights.isfinite().all()
        together = importance_weights(olds.T, samplers.T, level=level, cap=math.inf, normalize=normalize)
        assert together.weights.isfinite().all() and found.metrics["importance_ess"].isfinite()


def test_a_sequence_with_one_impossible_token_is_impossible() -> None:
    """Whatever the other tokens are: the product of 0 and inf is 0."""
    old, sampler = torch.tensor([[-math.inf, -1.0]]), torch.tensor([[-1.0, -math.inf]])
    for level in LEVELS[1:]:
        assert importance_weights(old, sampler, level=level).weights.tolist() == [0.0]
        assert importance_weights(old[:, [0]], sampler[:, [1]] - math.inf, level=level).weights.tolist() == [1.0]


@pytest.mark.parametrize("level", LEVELS)
def test_a_log_prob_of_plus_infinity_weighs_nothing(level: str) -> None:
    old, sampler, mask = policies()
    expected = importance_weights(old, torch.where(torch.arange(COLUMNS) == 2, math.nan, sampler), mask, level=level)
    for place in (old, sampler):
        place[:, 2] = math.inf
        found = importance_weights(old, sampler, mask, level=level)
        assert torch.equal(found.weights, expected.weights) and found.metrics == expected.metrics


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_counts_or_nothing_is_kept(level: str) -> None:
    old, sampler, mask = policies()
    for counts, given in ((torch.zeros_like(mask), sampler), (mask, old - 30)):
        found = importance_weights(old, given, counts, level=level, mode="mask", normalize=True)
        empty = ~counts.any(1) if level != "token" else torch.zeros_like(mask)
        assert torch.equal(found.weights, empty.float())
        for name in ("importance_mean", "importance_ess"):
            assert found.metrics[name] == 0
    assert found.metrics["importance_cut"] == 1
    tiny = importance_weights(torch.tensor([-744.0]), torch.tensor([0.0]), normalize=True)
    assert tiny.weights.tolist() == [1.0]


@pytest.mark.parametrize("level", LEVELS)
def test_normalised_weights_have_mean_one(level: str) -> None:
    old, sampler, mask = policies()
    counted = mask if level == "token" else mask.any(1)
    found = importance_weights(old, sampler, mask, level=level, mode="mask", floor=0.5, cap=1.5, normalize=True)
    assert found.weights[counted].double().mean().item() == pytest.approx(1, rel=1e-6)
    plain = importance_weights(old, sampler, mask, level=level, mode="mask", floor=0.5, cap=1.5)
    assert plain.metrics == found.metrics and plain.metrics["importance_mean"] != 1


def test_weights_make_samples_of_one_policy_count_for_another() -> None:
    """The mean of a reward under pi, from samples of mu; and the estimates of their distance."""
    mu, pi = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(mu, 200_000, replacement=True, generator=testing.generator(0))
    found, reward = importance_weights(pi.log()[tokens], mu.log()[tokens]), torch.tensor([1.0, 5.0, -2.0])
    assert (found.weights * reward[tokens]).mean().item() == pytest.approx((pi * reward).sum().item(), abs=0.02)
    distance = (mu * (mu / pi).log()).sum().item()
    for name in ("rollout_kl_k1", "rollout_kl_k3"):
        assert found.metrics[name].item() == pytest.approx(distance, abs=2e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_a_policy_loss_takes_them(level: str) -> None:
    old, sampler, mask = policies()
    weights = importance_weights(old, sampler, mask, level=level, mode="mask", floor=0.5).weights
    arguments = {"old_logprobs": old, "mask": mask, "advantages": torch.linspace(-1, 1, ROWS)}
    per_token = (weights if level == "token" else weights[:, None]).expand_as(old)
    got = policy_loss(old.float(), importance_weights=weights, **arguments).loss
    torch.testing.assert_close(got, policy_loss(old.float(), importance_weights=per_token, **arguments).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_gradients(dtype: torch.dtype) -> None:
    old, sampler, mask = (value.to(dtype) if value.is_floating_point() else value for value in policies())
    found = importance_weights(old.clone().requires_grad_(), sampler.T.contiguous().T, mask)
    expected = (old.double() - sampler.double()).exp().clamp(max=2).masked_fill(~mask, 0)
    assert torch.equal(found.weights, expected.float()) and not found.weights.requires_grad
    assert all(value.shape == () and value.dtype == torch.float32 for value in found.metrics.values())


def test_it_compiles_fullgraph_and_has_fakes() -> None:
    old, sampler, mask = policies()

    def run(*arguments: Tensor) -> Tensor:
        return importance_weights(*arguments, level="sequence_mean", normalize=True).weights

    torch.testing.assert_close(testing.compiled(run)(old, sampler, mask), run(old, sampler, mask))
    with FakeTensorMode():
        found = importance_weights(torch.empty(9), torch.empty(9), level="sequence", cu_seqlens=torch.tensor([0, 4, 9]))
    assert found.weights.shape == (2,)


ONE = torch.zeros(2, 3)


@pytest.mark.parametrize(("arguments", "keywords", "error", "message"), [
    ((None, ONE), {}, TypeError, "old_logprobs is a NoneType"),
    ((ONE, ONE.long()), {}, TypeError, "sampler_logprobs has dtype torch.int64"),
    ((ONE, ONE[0]), {}, ValueError, r"sampler_logprobs has shape \(3,\), expected \(2, 3\)"),
    ((ONE, ONE.to("meta")), {}, ValueError, "sampler_logprobs is on meta, expected cpu"),
    ((ONE, ONE, ONE[0]), {}, ValueError, r"mask has shape \(3,\), expected \(2, 3\)"),
    ((ONE, ONE), {"level": "batch"}, ValueError, "level is 'batch', expected one of token, sequence, sequence_mean"),
    ((ONE, ONE), {"mode": "none"}, ValueError, "mode is 'none', expected one of truncate, mask"),
    ((ONE, ONE), {"floor": -0.1}, ValueError, "floor is -0.1, expected a finite number >= 0"),
    ((ONE, ONE), {"cap": 0}, ValueError, "cap is 0, expected a finite number > 0"),
    ((ONE, ONE), {"cap": math.nan}, ValueError, "cap is nan, expected"),
    ((ONE, ONE), {"floor": 3.0}, ValueError, "floor is 3.0, expected at most cap = 2.0"),
    ((ONE, ONE), {"floor": 1e35, "cap": math.inf}, ValueError, r"floor is 1e\+35, expected at most .* e\^80"),
    ((ONE, ONE), {"cap": torch.ones(2)}, TypeError, r"cap is tensor\(\[1., 1.\]\), expected a Python number"),
    ((ONE, ONE), {"level": torch.ones(2)}, ValueError, r"level is tensor\(\[1., 1.\]\), expected one of token"),
    ((ONE.sum(), ONE.sum()), {}, ValueError, r"old_logprobs is 0-d, expected \(B, T\) or \(N,\)"),
    ((ONE, ONE), {"normalize": 1}, TypeError, "normalize is 1, expected True or False"),
    ((ONE[0], ONE[0]), {"level": "sequence"}, ValueError, r"cu_seqlens is None for packed tokens of shape \(3,\)"),
    ((ONE, ONE), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"cu_seqlens was given with old_logprobs of shape"),
    ((ONE[0], ONE[0]), {"cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens runs from 0 to 2, expected 0 to"),
    ((ONE[0], ONE[0]), {"cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, r"cu_seqlens\[2\] is 3, expected no less"),
    ((ONE[0], ONE[0]), {"cu_seqlens": torch.zeros(2, 2).long()}, ValueError, r"cu_seqlens has shape \(2, 2\)"),
    ((ONE, ONE), {"process_group": 1}, TypeError, "process_group is 1, expected a torch.distributed.ProcessGroup"),
])
def test_bad_input(arguments: Any, keywords: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        importance_weights(*arguments, **keywords)


# ---- several ranks ----

@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(importance_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_ranks_normalise_together(level: str, mode: str, ranks: list[dict[str, Any]]) -> None:
    whole = importance_weights(*policies(), level=level, mode=mode, floor=0.5, normalize=True)
    parts = [results[f"{level}, {mode}"] for results in ranks]
    torch.testing.assert_close(torch.cat([part["weights"] for part in parts]), whole.weights)
    assert [len(part["weights"]) for part in parts] == [FIRST, ROWS - FIRST]
    for part in parts:
        torch.testing.assert_close(part["metrics"], whole.metrics)


def test_ranks_must_agree(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "cap is 2.0 on rank" in results["another cap"] or "cap is 3.0 on rank" in results["another cap"]
    assert "floor is -1" in ranks[0]["a refusal"] and "rank 0 of process_group raised an error" in ranks[1]["a refusal"]
