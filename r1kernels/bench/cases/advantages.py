"""Advantages of answers from rewards (P, G) of P prompts, in float32. A quarter of the prompts has equal rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.bench import eager, peers
from r1kernels.bench.peers import Peer
from r1kernels.bench.tasks import FORWARD, OURS, Problem, Setting, Task

KINDS = 3  # rewards of an answer
K = 4  # of pass@k


def shape(setting: Setting) -> tuple[int, int]:
    return setting.pick((32, 8), (1024, 16), (4096, 16))


def make(setting: Setting, *more: int) -> Problem:
    prompts, answers = shape(setting)
    rng, device = setting.generator(), setting.device
    rewards = torch.randint(0, 9, (prompts, answers, *more), generator=rng, device=device) / 8
    rewards[: prompts // 4] = rewards[: prompts // 4, :1]
    return Problem({"rewards": rewards})


def task(
    setting: Setting, op: str, ours: Callable[..., Any], exact: Callable[..., Any], *more: int,
    in_torch: Callable[..., Any] | None = None, **rest: Any,
) -> Task:
    """`in_torch`: what plain torch is timed with, if that is not `exact`."""
    prompts, answers = shape(setting)
    size = prompts * answers
    return Task(
        case=op, op=op, shape={"P": prompts, "G": answers}, dtype=torch.float32, passes=FORWARD,
        make=lambda: make(setting, *more), functions={OURS: ours, peers.EAGER: in_torch or exact}, exact=exact,
        input_bytes=4 * size * max(more, default=1), bytes={OURS: 512 * size, peers.EAGER: 512 * size * K},
        bytes_moved=8 * size, **rest,
    )


def group_advantages(setting: Setting) -> Iterator[Task]:
    """float64 has rounding errors where all rewards are equal; (r - mean) is exactly 0 for these rewards of eighths."""
    yield task(setting, "group_advantages", r1kernels.group_advantages, eager.group_advantages,
               peers=(Peer(peers.VERL, peers.verl_advantages),))

    def leave_one_out(rewards: Tensor) -> Tensor:
        others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
        return rewards - others

    yield task(setting, "group_advantages", lambda rewards: r1kernels.group_advantages(
        rewards, baseline="leave_one_out", scale="none"), leave_one_out, variant="leave one out")


def multi_reward_advantages(setting: Setting) -> Iterator[Task]:
    def exact(rewards: Tensor) -> Tensor:
        total = sum(eager.group_advantages(column) for column in rewards.unbind(-1))
        return (total - total.mean()) / (total.std() + 1e-4)

    yield task(setting, "multi_reward_advantages", r1kernels.multi_reward_advantages, exact, KINDS,
               variant=f"{KINDS} rewards")


def pass_at_k_advantages(setting: Setting) -> Iterator[Task]:
    def exact(rewards: Tensor) -> Tensor:
        """Over all subsets of K answers, one by one."""
        answers = rewards.shape[1]
        subsets = torch.tensor(list(combinations(range(answers), K)), device=rewards.device)
        best = rewards[:, subsets].amax(-1)
        member = torch.zeros(len(subsets), answers, dtype=rewards.dtype, device=rewards.device)
        member.scatter_(1, subsets, 1)
        mean, std = best.mean(1, keepdim=True), best.std(1, correction=0, keepdim=True)
        return ((best @ member) / member.sum(0) - mean) / (std + 1e-4)

    yield task(setting, "pass_at_k_advantages", lambda rewards: r1kernels.pass_at_k_advantages(rewards, K), exact,
               in_torch=eager.pass_at_k_advantages(K), variant=f"k = {K}")


CASES = {
    "group_advantages": group_advantages, "multi_reward_advantages": multi_reward_advantages,
    "pass_at_k_advantages": pass_at_k_advantages,
}
