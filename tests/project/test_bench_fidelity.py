"""The errors that `r1kernels bench` reports are those of a direct computation, and its inputs are what it says."""

from __future__ import annotations

import pytest
import torch
from bench_cases import SMALL, no_peer, small_engine

import r1kernels
from r1kernels import testing
from r1kernels.bench import fidelity, peers
from r1kernels.bench.tasks import OURS


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "load", no_peer)


def test_errors_are_those_of_a_direct_computation() -> None:
    rows = list(fidelity.measure(fidelity.of_logits(SMALL, torch.bfloat16), small_engine()))
    found = {(row["quantity"], row["implementation"]): row for row in rows}
    logits, ids = fidelity.language_logits(96, 4096, torch.bfloat16)
    exact = testing.token_stats(logits, ids)
    error = (r1kernels.token_logprobs(logits, ids).double() - exact.logprobs).abs()
    row = found["logprob", OURS]
    assert row["max"] == pytest.approx(float(error.max()), rel=1e-6, abs=1e-12)
    assert row["mean"] == pytest.approx(float(error.mean()), rel=1e-3, abs=1e-12)
    assert row["quantiles"]["0.5"] <= row["quantiles"]["0.9"] <= row["quantiles"]["0.999"] <= row["max"]
    gradient = testing.token_stats_gradient(logits, ids, torch.ones(96)).value
    leaf = logits.clone().requires_grad_()
    r1kernels.token_logprobs(leaf, ids).sum().backward()
    worst = float((leaf.grad.double() - gradient).abs().max() / gradient.abs().max())
    assert found["grad_logits", OURS]["max"] == pytest.approx(worst, rel=1e-3)
    assert all(row["nonfinite"] == 0 for row in rows)
    assert set(found) == {(q, i) for q in ("logprob", "entropy", "grad_logits") for i in (OURS, peers.EAGER)}


def test_advantages_of_equal_rewards_are_exact() -> None:
    quantity = fidelity.of_rewards(SMALL)
    equal = quantity.problem.inputs["rewards"].std(1) == 0
    assert equal.any() and not quantity.exact[0][equal].any()
    rows = {row["implementation"]: row for row in fidelity.measure(quantity, small_engine())}
    assert rows[OURS]["max"] < 1e-6


def test_entries_that_are_not_finite_are_counted() -> None:
    exact = torch.tensor([1.0, -torch.inf, 3.0, 4.0], dtype=torch.float64)
    row = fidelity.errors(torch.tensor([1.5, -torch.inf, torch.nan, torch.inf]), exact, relative=False)
    assert row["nonfinite"] == 2 and row["max"] == 0.5 and row["mean"] == 0.5
    nothing = fidelity.errors(torch.tensor([torch.nan]), torch.ones(1), relative=True)
    assert nothing["nonfinite"] == 1 and nothing["max"] is None


def test_logits_are_like_those_of_a_language_model() -> None:
    logits, ids = fidelity.language_logits(96, 4096, torch.float32)
    again, _ = fidelity.language_logits(96, 4096, torch.float32)
    assert torch.equal(logits, again)
    probability = logits.double().softmax(-1)
    of_token = probability.gather(1, ids[:, None])[:, 0]
    assert (of_token[::3] > 0.999).all() and (of_token[1::3] < 0.999).any()
    assert (logits == -torch.inf).sum() == 12 and (of_token > 0).all()
    assert logits.isfinite().any(1).all() and logits[logits.isfinite()].abs().max() > 20
