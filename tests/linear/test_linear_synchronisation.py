"""How often the host waits for a device: counted here as if values were not free to look at.

The one-pass walk is called past its operator, under a mode that sees every torch operator. Those that hand a value, or
a shape that depends on values, to the host are the ones that would wait.
"""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from r1kernels import _library, backend, linear_cross_entropy, linear_grpo_loss, objectives, testing
from r1kernels.ops.linear.grpo_loss import TokenObjective
from r1kernels.ops.linear.head import Head, Needs
from r1kernels.ops.linear.passes import run_one_pass

WAITS = {"aten::nonzero", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::masked_select",
         "aten::unique_dim", "aten::_unique2"}


class Waits(TorchDispatchMode):
    """Names of the operators that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITS:
            self.seen.append(name)
        # A boolean mask as an index is a nonzero in disguise.
        if name.startswith("aten::index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in (args[1] if isinstance(args[1], list) else [])
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def walk(operator: Any, hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """What the operator does, in sight of the mode."""
    assert operator is torch.ops.r1kernels.linear_policy_gradient.default
    fields = len(Head._fields)
    tokens = TokenObjective.from_arguments(*args[fields + 1 : -1])
    return run_one_pass(
        Head(*args[:fields]), hidden, args[fields], tokens.slopes, Needs(*args[-1]), sparse=tokens.sparse
    )


def waits(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[str]:
    monkeypatch.setattr(_library, "call", walk)
    for name, module in list(sys.modules.items()):
        if name.startswith("r1kernels.ops") and hasattr(module, "values_are_free"):
            monkeypatch.setattr(module, "values_are_free", lambda _: False)
    with backend("reference"), Waits() as mode:
        loss = run()
        loss.backward()
    assert loss.isfinite()
    return mode.seen


def case(packed: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 8), torch.randn(11, 8)
    given: dict[str, Any] = {
        "hidden": hidden, "weight": weight, "token_ids": testing.random_ids(4, 6, vocab=11),
        "advantages": torch.tensor([1.0, -1.0, 0.0, 0.5]), "old_logprobs": torch.full((4, 6), -2.4),
    }
    if packed:
        for name in ("hidden", "token_ids", "old_logprobs"):
            given[name] = given[name].flatten(0, 1)
        given["cu_seqlens"] = torch.tensor([0, 6, 12, 18, 24])
    else:
        given["mask"] = torch.rand(4, 6) < 0.8
    for name in ("hidden", "weight"):
        given[name].requires_grad_()
    return given


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective", [objectives.grpo(), objectives.grpo(entropy_coef=0.1), objectives.dapo()])
@pytest.mark.parametrize("chunk_bytes", [None, 700])
def test_one_wait_more_a_chunk_of_a_clipped_objective_and_none_with_a_capacity(
    packed: bool, objective: objectives.Objective, chunk_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**keywords: Any) -> list[str]:
        given = case(packed)
        keywords |= {"objective": objective, "chunk_bytes": chunk_bytes}
        return waits(monkeypatch, lambda: linear_grpo_loss(**given, **keywords).loss)

    chunks = 4 if chunk_bytes == 700 else 1
    assert len(run()) <= 1 + chunks * (objective.entropy_coef == 0)
    assert run(capacity=24) == []


def test_cross_entropy_waits_once_and_not_with_a_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(False)
    given["mask"][-1, -1] = False  # its row stands in for the padding of a capacity
    targets = torch.where(given["mask"], given["token_ids"], -100)
    run = lambda **keywords: waits(  # noqa: E731
        monkeypatch, lambda: linear_cross_entropy(given["hidden"], given["weight"], targets, **keywords)
    )
    assert len(run()) == 1
    assert run(capacity=24) == []
