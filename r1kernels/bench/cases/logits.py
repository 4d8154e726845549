"""Operations that start from bfloat16 logits (N, V)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.bench import ceilings, eager, peers
from r1kernels.bench.peers import Peer
from r1kernels.bench.tasks import BOTH, OURS, Problem, Setting, Task, in_both_passes

SMOOTHED = {"z_loss_coef": 1e-4, "label_smoothing": 0.1}
SET = 64


def shape(setting: Setting) -> tuple[int, int]:
    return setting.pick((64, 4096), (512, 65_536), (8192, 131_072))


def make(setting: Setting, tokens: int, vocab: int, name: str = "token_ids") -> Problem:
    rng, device = setting.generator(), setting.device
    logits = (torch.randn(tokens, vocab, generator=rng, device=device) * 3).bfloat16()
    ids = torch.randint(vocab, (tokens,), generator=rng, device=device)
    return Problem({"logits": logits, name: ids}, ("logits",))


def task(
    setting: Setting, op: str, ours: Callable[..., Any], exact: Callable[..., Any], passes: str = BOTH, *,
    reads: int = 3, make_inputs: Callable[[], Problem] | None = None, targets: str = "token_ids", **rest: Any,
) -> Task:
    """`reads`: how often the least traffic of forward and backward reads or writes the logits."""
    tokens, vocab = shape(setting)
    size = tokens * vocab
    return Task(
        case=op, op=op, shape={"N": tokens, "V": vocab}, dtype=torch.bfloat16, passes=passes,
        make=make_inputs or partial(make, setting, tokens, vocab, targets),
        functions={OURS: ours, peers.EAGER: exact}, exact=exact,
        ceilings={"ceiling: copy": lambda problem: ceilings.copy(problem.inputs["logits"])},
        input_bytes=2 * size, bytes={OURS: 2 * size + 128 * tokens, peers.EAGER: 20 * size, peers.COMPILED: 10 * size},
        bytes_moved=2 * size * (reads if passes == BOTH else 1),
        **{"compiled": passes == BOTH} | rest,
    )


def token_logprobs(setting: Setting) -> Iterator[Task]:
    others = (Peer(peers.TRL, peers.trl_logprobs), Peer(peers.VERL, peers.verl_logprobs))
    yield from in_both_passes(partial(
        task, setting, "token_logprobs", r1kernels.token_logprobs, eager.logprobs, peers=others))

    def with_sets() -> Problem:
        tokens, vocab = shape(setting)
        problem = make(setting, tokens, vocab)
        ids = problem.inputs["token_ids"]
        sets = (ids[:, None] + torch.arange(SET, device=ids.device) * 7) % vocab
        return problem._replace(inputs=problem.inputs | {"sets": sets})

    def over_sets(logits: Tensor, token_ids: Tensor, sets: Tensor) -> Tensor:
        offsets = torch.arange(len(sets) + 1, device=sets.device) * sets.shape[1]
        return r1kernels.token_logprobs(logits, token_ids, support=(sets.flatten(), offsets))

    def exact(logits: Tensor, token_ids: Tensor, sets: Tensor) -> Tensor:
        return eager.logprobs(eager.over_support(logits, sets), token_ids)

    yield task(setting, "token_logprobs", over_sets, exact, make_inputs=with_sets, reads=1, compiled=False,
               variant=f"support sets of {SET} ids")


def token_logprobs_and_entropy(setting: Setting) -> Iterator[Task]:
    """The gradient comes from both results."""
    others = (Peer(peers.TRL, peers.trl_logprobs_and_entropy), Peer(peers.VERL, peers.verl_entropy))
    return in_both_passes(partial(
        task, setting, "token_logprobs_and_entropy", r1kernels.token_logprobs_and_entropy, eager.logprobs_and_entropy,
        peers=others))


def token_statistics(setting: Setting) -> Iterator[Task]:
    return in_both_passes(partial(task, setting, "token_statistics", r1kernels.token_statistics, eager.statistics))


def cross_entropy(setting: Setting) -> Iterator[Task]:
    others = (Peer(peers.LIGER, peers.liger_cross_entropy, only_cuda=True),)
    yield task(setting, "cross_entropy", r1kernels.cross_entropy, eager.cross_entropy, reads=2, targets="targets",
               peers=(*others, Peer(peers.QUACK, peers.quack_cross_entropy, only_cuda=True)))
    yield task(setting, "cross_entropy", partial(r1kernels.cross_entropy, **SMOOTHED),
               partial(eager.cross_entropy, **SMOOTHED), reads=2, targets="targets",
               variant="label smoothing and z-loss")


def grpo_loss(setting: Setting) -> Iterator[Task]:
    tokens, vocab = shape(setting)
    b = 4

    def make_inputs() -> Problem:
        rng, device = setting.generator(1), setting.device
        logits, ids = (x.unflatten(0, (b, -1)) for x in make(setting, tokens, vocab).inputs.values())
        noise = torch.randn(ids.shape, generator=rng, device=device)
        old = r1kernels.token_logprobs(logits, ids) + 0.1 * noise
        advantages = torch.tensor([1.6, 0.9, 1.2, -0.7], device=device)
        inputs = {"logits": logits, "token_ids": ids, "advantages": advantages, "old_logprobs": old}
        return Problem(inputs, ("logits",))

    def ours(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        loss, metrics = r1kernels.grpo_loss(**inputs)
        return loss, metrics["entropy"]

    yield task(setting, "grpo_loss", ours, eager.grpo_loss_and_entropy, reads=2, make_inputs=make_inputs)


CASES = {
    "token_logprobs": token_logprobs, "token_logprobs_and_entropy": token_logprobs_and_entropy,
    "token_statistics": token_statistics, "cross_entropy": cross_entropy, "grpo_loss": grpo_loss,
}
