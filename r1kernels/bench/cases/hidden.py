"""Operations that start from bfloat16 hidden states (N, H) and the weight (V, H) of a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels
from r1kernels.bench import eager, peers
from r1kernels.bench.peers import Peer
from r1kernels.bench.tasks import BOTH, FORWARD, OURS, Problem, Setting, Task, in_both_passes

DEPTHS = 2


def shape(setting: Setting) -> tuple[int, int, int]:
    """N, V, H."""
    return setting.pick((64, 2048, 128), (512, 32_768, 512), (8192, 131_072, 4096))


def make(setting: Setting, targets: str = "token_ids", depths: int = 0) -> Problem:
    tokens, vocab, width = shape(setting)
    rng, device = setting.generator(), setting.device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=device)

    ids = torch.randint(vocab, (tokens, depths) if depths else (tokens,), generator=rng, device=device)
    inputs = {"hidden": normal(tokens, width).bfloat16(),
              "weight": (normal(vocab, width) * 2 / width**0.5).bfloat16(), targets: ids}
    return Problem(inputs, ("hidden", "weight"))


def task(
    setting: Setting, op: str, ours: Callable[..., Any], of_logits: Callable[..., Any], passes: str = BOTH, *,
    make_inputs: Callable[[], Problem] | None = None, targets: str = "token_ids", compiled: bool = False, **rest: Any,
) -> Task:
    """`of_logits`: the same from logits, in plain torch. `compiled`: torch.compile takes part if there is a backward
    pass."""
    tokens, vocab, width = shape(setting)
    size, head = tokens * vocab, vocab * width
    gradients = 2 * (head + tokens * width)

    def exact(hidden: Tensor, weight: Tensor, **others: Tensor) -> Any:
        return of_logits(F.linear(hidden, weight), **others)

    needed = r1kernels.linear_loss_bytes(tokens, vocab, width, torch.bfloat16, device=setting.device.type,
                                         weight_gradient=passes == BOTH)
    return Task(
        case=op, op=op, shape={"N": tokens, "V": vocab, "H": width}, dtype=torch.bfloat16, passes=passes,
        make=make_inputs or partial(make, setting, targets), functions={OURS: ours, peers.EAGER: exact}, exact=exact,
        input_bytes=2 * (head + tokens * width),
        bytes={OURS: needed, peers.EAGER: 30 * size + gradients, peers.COMPILED: 14 * size + gradients},
        bytes_moved=gradients * (2 if passes == BOTH else 1),
        flops=2 * tokens * head * (3 if passes == BOTH else 1), compiled=compiled and passes == BOTH, **rest,
    )


def linear_token_logprobs(setting: Setting) -> Iterator[Task]:
    return in_both_passes(partial(
        task, setting, "linear_token_logprobs", r1kernels.linear_token_logprobs, eager.logprobs, compiled=True,
        peers=(Peer(peers.TRL, partial(peers.trl_head, ())),)))


def linear_token_logprobs_and_entropy(setting: Setting) -> Iterator[Task]:
    others = (Peer(peers.TRL, peers.trl_head), Peer(peers.VERL, peers.verl_head))
    return in_both_passes(partial(
        task, setting, "linear_token_logprobs_and_entropy", r1kernels.linear_token_logprobs_and_entropy,
        eager.logprobs_and_entropy, peers=others))


def linear_token_statistics(setting: Setting) -> Iterator[Task]:
    fields = ("logprobs", "lse", "entropy", "sum_sq_probs", "mean_logit")

    def of_logits(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        return eager.statistics(logits, token_ids)[: len(fields)]

    yield task(setting, "linear_token_statistics", partial(r1kernels.linear_token_statistics, fields=fields), of_logits)


def linear_cross_entropy(setting: Setting) -> Iterator[Task]:
    others = (
        Peer(peers.TORCH_HEAD, peers.torch_linear_cross_entropy), Peer(peers.TRL, peers.trl_linear_cross_entropy),
        Peer(peers.LIGER, peers.liger_linear_cross_entropy, only_cuda=True),
        Peer(peers.CCE, peers.cce_linear_cross_entropy, only_cuda=True),
        Peer(peers.QUACK, peers.quack_linear_cross_entropy, only_cuda=True),
    )
    yield task(setting, "linear_cross_entropy", r1kernels.linear_cross_entropy, eager.cross_entropy, targets="targets",
               compiled=True, peers=others)
    terms = {"z_loss_coef": 1e-4, "label_smoothing": 0.1}
    yield task(setting, "linear_cross_entropy", partial(r1kernels.linear_cross_entropy, **terms),
               partial(eager.cross_entropy, **terms), targets="targets", variant="label smoothing and z-loss")


def linear_multi_target(setting: Setting) -> Iterator[Task]:
    """Targets (N, D) here; the hidden states are those of all depths."""

    def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        return r1kernels.linear_multi_target(hidden, weight, token_ids.t()).sum()

    def of_logits(logits: Tensor, token_ids: Tensor) -> Tensor:
        return sum(eager.cross_entropy(logits, ids) for ids in token_ids.unbind(1))

    yield task(setting, "linear_multi_target", ours, of_logits, make_inputs=partial(make, setting, depths=DEPTHS),
               variant=f"{DEPTHS} targets a row")


def linear_logits(setting: Setting) -> Iterator[Task]:
    """Few rows, as a sampler has them."""
    tokens, vocab, width = shape(setting)
    few = min(tokens, 64)

    def make_inputs() -> Problem:
        problem = make(setting)
        inputs = {"hidden": problem.inputs["hidden"][:few].clone(), "weight": problem.inputs["weight"]}
        return Problem(inputs)

    base = task(setting, "linear_logits", r1kernels.linear_logits, lambda logits: logits.float(), FORWARD)

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        return eager.wide(F.linear(hidden, weight))

    yield Task(
        case="linear_logits", op="linear_logits", shape={"N": few, "V": vocab, "H": width}, dtype=torch.bfloat16,
        passes=FORWARD, make=make_inputs, functions={OURS: r1kernels.linear_logits, peers.EAGER: exact}, exact=exact,
        input_bytes=base.input_bytes, bytes={OURS: 8 * few * vocab, peers.EAGER: 8 * few * vocab},
        bytes_moved=2 * vocab * width + 4 * few * vocab, flops=2 * few * vocab * width,
    )


CASES = {
    "linear_token_logprobs": linear_token_logprobs,
    "linear_token_logprobs_and_entropy": linear_token_logprobs_and_entropy,
    "linear_token_statistics": linear_token_statistics, "linear_cross_entropy": linear_cross_entropy,
    "linear_multi_target": linear_multi_target, "linear_logits": linear_logits,
}
