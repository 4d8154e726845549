"""What two ranks tell each other: a script of `ranks.run_ranks`."""

import sys
from pathlib import Path
from typing import Any

import torch
from ranks import error_of, fork_ranks
from rl_cases import make_model, make_tokenizer, policy_of, take_gradient

from r1kernels.train.errors import ConfigError, Interrupt, Interrupted, TrainingError
from r1kernels.train.model import hidden_states
from r1kernels.train.parallel import add_up, agree, check, everywhere, first, mesh, share, shared
from r1kernels.train.policy import clip_gradient, share_out


class Odd(Exception):
    """An error that cannot be sent to another process."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(lambda: None)


def raised_on(culprit: int, rank: int, error: BaseException) -> str:
    def work() -> None:
        if rank == culprit:
            raise error

    try:
        everywhere(work)
    except BaseException as found:
        return f"{type(found).__name__}: {found}"
    return "no error"


def stopped(rank: int) -> str:
    interrupt = Interrupt()
    interrupt.requested = "SIGTERM" if rank == 1 else None
    try:
        check(interrupt)
    except Interrupted as found:
        return str(found)
    return "not stopped"


def given_out(rank: int) -> dict[str, Any]:
    """A model that the first rank makes: who made one, what came with it, weights, and whether tied ones still are."""
    made = []

    def make() -> Any:
        made.append(make_model(make_tokenizer(), seed=5 + rank))
        made[0].model.norm.weight.requires_grad_(False)
        return made[0], {"made by": rank}

    policy, other = share_out(make, mesh("cpu"), torch.float32)
    ids = torch.arange(3, 12)[None]
    return {"made": len(made), "other": other, "weights": dict(policy.weights()), "frozen": sorted(
        name for name, weight in policy.model.named_parameters() if not weight.requires_grad),
        "tied": policy.model.lm_head.weight is policy.model.model.embed_tokens.weight,
        "hidden": policy(hidden_states, input_ids=ids).detach()}


def results_of(rank: int) -> dict[str, Any]:
    policy = policy_of(make_model(make_tokenizer()))
    optimizer = torch.optim.SGD(policy.parameter_groups(), lr=0.1)
    for number in range(2):  # rank 1 has one micro-batch of two, the other is empty
        empty = rank == 1 and number == 1
        ids = torch.arange(3, 12)[None] + 10 * rank + 20 * number
        policy.sync_gradients(number == 1)
        (policy(hidden_states, input_ids=ids).square().sum() * (0.0 if empty else 1.0)).backward()
    gradient = take_gradient(policy)
    policy(hidden_states, input_ids=torch.arange(3, 12)[None] + 10 * rank).square().sum().backward()
    norm = clip_gradient(policy, 1.0)
    optimizer.step()
    return {
        "everywhere": everywhere(lambda: rank * 10), "first": first(lambda: rank + 7),
        "share": list(share(range(5))), "shared": shared(lambda rows: [10 * row for row in rows], range(5)),
        "sum": add_up(torch.tensor([1.0 + rank]), mesh("cpu")["data"].get_group()),
        "agree": error_of(lambda: agree("the colour", "red")),
        "disagree": error_of(lambda: agree("the colour", ["red", "blue"][rank])),
        "config": raised_on(1, rank, ConfigError("no such file")),
        "training": raised_on(0, rank, TrainingError("not finite")),
        "odd": raised_on(1, rank, Odd(1, 2)),
        "interrupt": raised_on(1, rank, Interrupted("SIGINT")),
        "stopped": stopped(rank),
        "tensor": error_of(lambda: mesh("cpu", 4)),
        "given out": given_out(rank),
        "gradient": gradient, "norm": norm, "clipped": take_gradient(policy), "weights": dict(policy.weights()),
    }


if __name__ == "__main__":
    fork_ranks(results_of, 2, Path(sys.argv[1]))
