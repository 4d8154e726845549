"""Three ranks that have other tokens: parts of each sequence, or other sequences with DDP and FSDP2.

    python token_ranks.py DIRECTORY

saves the results of each as DIRECTORY/RANK.pt; the tests compare them with one process.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import linear_cases as cases
import torch
from ranks import Traffic, error_of, fork_ranks
from torch import Tensor

from r1kernels import (
    Objective,
    global_normalizer,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    objectives,
    policy_loss,
    testing,
)

WORLD = 3
SEQUENCES, LENGTH, VOCAB, WIDTH = 5, 9, 50, 8
# The tokens of each sequence that a rank has: the second of three ranks has none.
PARTS = {2: (slice(0, 6), slice(6, 9)), 3: (slice(0, 4), slice(4, 4), slice(4, 9))}


def downweighted(logprobs: Tensor, batch: Any) -> Tensor:
    """A callable objective."""
    return -(logprobs - batch.old_logprobs).exp().sqrt() * batch.advantages


def of_tokens(logprobs: Tensor, entropies: Tensor, tokens: Any) -> Tensor:
    """A token-local objective, whose gradient reaches the entropy."""
    return downweighted(logprobs, tokens) * (1 + entropies)


OBJECTIVES: dict[str, Any] = {
    "grpo": objectives.grpo(), "r1": objectives.r1(), "bnpo": objectives.bnpo(),
    "dr_grpo": objectives.dr_grpo(max_length=10), "dapo": objectives.dapo(), "gspo": objectives.gspo(),
    "cispo": objectives.cispo(), "sapo": objectives.sapo(), "reinforce": objectives.reinforce(),
    "gspo, all terms": objectives.gspo(clip_low=0.6, clip_high=0.9, kl_coef=0.1, entropy_coef=0.02),
    "gspo, token mean": objectives.gspo(clip_low=0.6, clip_high=0.9, aggregate="token_mean"),
    "cispo of sequences": objectives.cispo(ratio="sequence", aggregate="sequence_mean"),
    "sapo of sequences": objectives.sapo(ratio="sequence"),
    "dr_grpo, entropy": objectives.dr_grpo(max_length=10, entropy_coef=0.3),
    "gmpo": objectives.gmpo(clip_low=0.1, clip_high=0.15, kl_coef=0.1),
    "KL times ratio": objectives.grpo(kl_coef=0.1, kl_ratio=True),
    "KL times ratio of sequences": objectives.gspo(clip_low=0.6, clip_high=0.9, kl_coef=0.1, kl="k1", kl_ratio=True),
    "a callable": downweighted,
    "a function of tokens": Objective.token_local(of_tokens, aggregate="sequence_mean"),
}
FUNCTIONS = ("policy_loss", "packed", "per token", "grpo_loss", "linear_grpo_loss", "measure_all")


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The first sequence is short, and the second has no tokens."""
    rng = testing.generator(5)
    mask = torch.rand(SEQUENCES, LENGTH, generator=rng) > 0.2
    mask[0, 3:] = False
    mask[1] = False
    old = -4 + torch.randn(SEQUENCES, LENGTH, generator=rng)
    weights = torch.rand(SEQUENCES, generator=rng) + 0.5
    advantages = torch.tensor([1.0, 2.0, -0.7, 0.0, 0.4])
    values = {"advantages": advantages, "old_logprobs": old, "ref_logprobs": old + 0.2, "importance_weights": weights}
    return {"mask": mask, **{name: value.to(dtype) for name, value in values.items()}}


def split(values: dict[str, Any], part: slice) -> dict[str, Any]:
    """What has one value per token, without the tokens of other ranks."""
    return {
        name: value[:, part] if isinstance(value, Tensor) and value.shape[:2] == (SEQUENCES, LENGTH) else value
        for name, value in values.items()
    }


def packed(values: dict[str, Any]) -> dict[str, Any]:
    """The counted tokens one after the other."""
    mask = values["mask"]
    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    flat = {name: value[mask] if value.shape == mask.shape else value for name, value in values.items()}
    return {**flat, "mask": None, "cu_seqlens": ends}


def loss_of(function: str, objective: Any, part: slice, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """(loss, metrics, gradients by name) of a part of the tokens."""
    values = batch(dtype)
    case = cases.make("plain", SEQUENCES, LENGTH, width=WIDTH, vocab=VOCAB, dtype=dtype)
    near = values["old_logprobs"] + 0.3 * torch.randn(SEQUENCES, LENGTH, generator=testing.generator(6)).to(dtype)
    leaves: dict[str, Tensor] = {}
    if function in ("policy_loss", "packed", "per token"):
        if function == "per token":
            values["advantages"] = values["advantages"][:, None] * near
            values["importance_weights"] = values["importance_weights"][:, None] * near.abs()
        leaves = split({"logprobs": near, "entropy": near.square()}, part)
        tokens = split(values, part)
    elif function == "grpo_loss":
        leaves = split({"logits": case["hidden"] @ case["weight"].T}, part)
        tokens = split({**values, "token_ids": case["token_ids"]}, part)
    else:
        leaves = {"weight": case["weight"], **split({"hidden": case["hidden"]}, part)}
        tokens = split({**values, "token_ids": case["token_ids"]}, part)
        options = options | {"measure_all": function == "measure_all"}
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    used = {**tokens, **leaves}
    if function == "packed":
        used = packed(used)
    call = {"grpo_loss": grpo_loss, "linear_grpo_loss": linear_grpo_loss, "measure_all": linear_grpo_loss}
    loss, metrics = call.get(function, policy_loss)(**used, objective=objective, **options)
    loss.backward()
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"loss": loss.detach(), "metrics": metrics, "grads": grads}


def disagreements(rank: int, group: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    def call(count: int = 2, **changes: Any) -> Callable[[], Any]:
        return lambda: policy_loss(torch.zeros(count, 3), **{"advantages": torch.ones(count), **changes},
                                   sequence_group=group)

    yield "sequences", call(2 + rank)
    yield "objective", call(objective=objectives.sapo() if rank else objectives.grpo())
    yield "refused", call(**({"mask": torch.ones(1)} if rank else {}))


# ---- DDP and FSDP2 with uneven accumulation ---------------------------------------------------------------


class Policy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        case = cases.make("plain", 1, width=WIDTH, vocab=VOCAB)
        self.layer.weight.data.copy_(torch.eye(WIDTH) + 0.1 * case["weight"][:WIDTH])
        self.head.weight.data.copy_(case["weight"])

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return linear_grpo_loss(self.layer(hidden), self.head.weight, **arguments).loss


# The micro-batches of each rank, and of one process.
MICRO_BATCHES = ([[0]], [[1, 2], [3]], [[4], [], [0]])
NORMALIZED = {"token mean": objectives.dapo(kl_coef=0.1), "sequence mean": objectives.gspo(clip_low=1, clip_high=1)}


def micro_batch(rows: list[int]) -> dict[str, Any]:
    case = cases.make("plain", SEQUENCES, LENGTH, width=WIDTH, vocab=VOCAB)
    return {"hidden": case["hidden"][rows], "token_ids": case["token_ids"][rows],
            **{name: value[rows] for name, value in batch().items()}}


def accumulated(objective: Any, kind: str | None, rank: int = 0) -> dict[str, Tensor]:
    """The gradients of a step. DDP and FSDP2 average over ranks, so the normalizer is divided by their number."""
    model: Any = Policy()
    if kind is None:
        normalizer = None
        mine = [list(itertools.chain(*itertools.chain(*MICRO_BATCHES)))]
    else:
        mine = MICRO_BATCHES[rank]
        masks = [micro_batch(rows)["mask"] for rows in mine]
        normalizer = global_normalizer(masks, objective) / WORLD
    if kind == "DDP":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        model.set_reshard_after_backward(False)  # ranks have different numbers of micro-batches
    for number, rows in enumerate(mine, start=1):
        last = number == len(mine)
        if kind == "FSDP2":
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
        with model.no_sync() if kind == "DDP" and not last else contextlib.nullcontext():
            model(**micro_batch(rows), objective=objective, normalizer=normalizer).backward()
    return {
        name.removeprefix("module."): getattr(value.grad, "full_tensor", lambda value=value: value.grad)()
        for name, value in model.named_parameters()
    }


# ---- a rank -----------------------------------------------------------------------------------------------


def missing_rank(rank: int) -> str:
    """Rank 1 makes no call."""
    group = torch.distributed.new_group([0, 1], timeout=datetime.timedelta(seconds=1))
    if rank != 0:
        return ""
    case = cases.make("plain", 5)
    return error_of(lambda: linear_token_logprobs(**case, process_group=group))


def results_of(rank: int) -> dict[str, Any]:
    groups = {world: torch.distributed.new_group(list(range(world))) for world in PARTS}
    alone = [torch.distributed.new_group([one]) for one in range(WORLD)]
    results: dict[str, Any] = {}
    for world, group in groups.items():
        if rank >= world:
            continue
        for function, (name, objective) in itertools.product(FUNCTIONS, OBJECTIVES.items()):
            with Traffic() as sent:
                found = loss_of(function, objective, PARTS[world][rank], sequence_group=group)
            results[f"{function}, {name}, {world}"] = found | {"sent": sent}
        mask = batch()["mask"][:, PARTS[world][rank]]
        results[f"normalizers, {world}"] = [
            float(global_normalizer(mask, objective, alone[rank], sequence_group=group))
            for objective in (objectives.dapo(), objectives.grpo())
        ]
    if rank < 2:
        for name, call in disagreements(rank, groups[2]):
            results[f"error {name}"] = error_of(call)
    for kind, (name, objective) in itertools.product(("DDP", "FSDP2"), NORMALIZED.items()):
        results[f"{kind}, {name}"] = accumulated(objective, kind, rank)
    results["missing"] = missing_rank(rank)
    return results


if __name__ == "__main__":
    fork_ranks(results_of, WORLD, Path(sys.argv[1]))
