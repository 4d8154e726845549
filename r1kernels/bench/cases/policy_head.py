"""linear_grpo_loss forward and backward: the series of the pictures, over V, over N and over the share of active
tokens, and variants of this library alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.bench import ceilings, eager, peers
from r1kernels.bench.check import OTHERS
from r1kernels.bench.clock import Run
from r1kernels.bench.peers import Peer
from r1kernels.bench.tasks import OURS, Problem, Setting, Task

NAME = "linear_grpo_loss"
SEQUENCES = 4
SHARES = (0.1, 0.25, 0.5, 1.0)
SET = 64  # ids of a support set


def ours(**inputs: Any) -> Tensor:
    return r1kernels.linear_grpo_loss(**inputs).loss


def with_head(load: Callable[[], peers.Function]) -> Callable[[], peers.Function]:
    """A head that gives log-probs, with the clipped loss in plain torch."""

    def loaded() -> peers.Function:
        head = load()

        def loss(
            hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor
        ) -> Tensor:
            logprobs = head(hidden.flatten(0, 1), weight, token_ids.flatten())[0]
            return eager.clipped_loss(logprobs.view_as(token_ids), advantages, old_logprobs)

        return loss

    return loaded


PEERS = (
    Peer(peers.TRL, with_head(partial(peers.trl_head, ()))), peers.liger(peers.liger_grpo),
    Peer(peers.VERL, with_head(peers.verl_head)),
)


def make(setting: Setting, tokens: int, width: int, vocab: int, active: float = 1.0, how: str = "") -> Problem:
    """bfloat16 hidden states and a head whose logits have a standard deviation of 2. All but a share `active` of the
    tokens are "clipped", or have "advantage 0"."""
    rng, device = setting.generator(), setting.device
    b, t = SEQUENCES, tokens // SEQUENCES

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    hidden = normal(b, t, width).bfloat16()
    weight = (normal(vocab, width) * 2 / width**0.5).bfloat16()
    token_ids = torch.randint(vocab, (b, t), generator=rng, device=device)
    # Their mean is not near 0: the error of the loss is relative to it.
    advantages = torch.tensor([1.6, 0.9, 1.2, -0.7], device=device)
    logprobs = r1kernels.linear_token_logprobs(hidden, weight, token_ids)
    old = logprobs + 0.02 * normal(b, t)
    # Idle tokens are spread evenly.
    idle = (torch.arange(t, device=device) * (1 - active) % 1 + (1 - active) >= 1).expand(b, t)
    if how == "clipped":
        old = torch.where(idle, logprobs - 0.5 * advantages[:, None].sign(), old)
    elif how == "advantage 0":
        advantages = torch.where(idle, 0.0, advantages[:, None].expand(b, t))
    inputs = {"hidden": hidden, "weight": weight, "token_ids": token_ids, "advantages": advantages,
              "old_logprobs": old}
    return Problem(inputs, ("hidden", "weight"))


def products(problem: Problem) -> Run:
    """Those of bfloat16, or of float32 copies that exist before: on some CPUs these are faster."""
    hidden, weight = (problem.inputs[name].detach() for name in ("hidden", "weight"))
    dtypes = (torch.bfloat16, torch.float32) if hidden.device.type == "cpu" else (torch.bfloat16,)
    return min((ceilings.all_products(hidden.to(dtype), weight.to(dtype)) for dtype in dtypes), key=seconds_of)


def seconds_of(run: Run) -> float:
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def task(
    setting: Setting, tokens: int, width: int, vocab: int, series: str | None, *, active: float = 1.0, how: str = "",
    alone: bool = False, compiled: bool = False,
) -> Task:
    """`alone`: without peers and ceilings. `how`: why tokens are not active."""
    logits, head = tokens * vocab, vocab * width
    gradients = 2 * (head + tokens * width)
    masked_products = active if how == "advantage 0" else 1.0
    return Task(
        case=NAME, op=NAME, shape={"N": tokens, "V": vocab, "H": width}, dtype=torch.bfloat16,
        make=partial(make, setting, tokens, width, vocab, active, how),
        functions={OURS: ours} if alone else {OURS: ours, peers.EAGER: eager.linear_grpo_loss},
        exact=eager.linear_grpo_loss, peers=() if alone or series == "active" else PEERS,
        ceilings={} if alone or series == "active" else {"ceiling: products": products},
        input_bytes=2 * head,
        bytes={
            OURS: r1kernels.linear_loss_bytes(tokens, vocab, width, torch.bfloat16, device=setting.device.type),
            peers.EAGER: 16 * logits + gradients, peers.COMPILED: 12 * logits + gradients,
            peers.TRL: 8 * min(4096, tokens) * peers.TRL_TILE + 4 * head + gradients,
            peers.LIGER: 16 * logits // SEQUENCES + 3 * gradients, peers.VERL: 12 * min(512, tokens) * vocab + 6 * head,
        },
        compiled=compiled, series=series,
        variant=f"{100 * (1 - active):.0f} % {'of advantage 0' if how == 'advantage 0' else how}" if how else "",
        active_share=active, bytes_moved=2 * gradients,
        flops=round(2 * tokens * head * (masked_products + 2 * active)),
    )


def vocabulary(setting: Setting) -> Iterator[Task]:
    tokens, width = setting.pick((64, 128), (512, 512), (8192, 4096))
    for number, vocab in enumerate(setting.pick((1024, 4096), (8192, 32_768, 65_536, 131_072),
                                                (8192, 32_768, 65_536, 131_072))):
        yield task(setting, tokens, width, vocab, "vocabulary", compiled=setting.compiled or number == 0)


def number_of_tokens(setting: Setting) -> Iterator[Task]:
    vocab, width = setting.pick((2048, 128), (32_768, 512), (131_072, 4096))
    for tokens in setting.pick((64, 128), (128, 256, 512, 1024), (1024, 2048, 4096, 8192, 16_384)):
        yield task(setting, tokens, width, vocab, "tokens", compiled=setting.compiled)


def active(setting: Setting) -> Iterator[Task]:
    """Plain torch takes the same time whatever the share is. It is measured beside every clipped share."""
    tokens, width, vocab = setting.pick((128, 128, 2048), (1024, 512, 32_768), (8192, 4096, 131_072))
    for share in SHARES:
        for how in ("clipped", "advantage 0") if share < 1 else ("",):
            yield task(setting, tokens, width, vocab, "active", active=share, how=how, alone=how == "advantage 0")


def variants(setting: Setting) -> Iterator[Task]:
    """Logits in bfloat16, and support sets."""
    tokens, width, vocab = setting.pick((64, 128, 2048), (512, 512, 32_768), (8192, 4096, 131_072))
    base = task(setting, tokens, width, vocab, None, alone=True)
    common = {name: getattr(base, name) for name in (
        "case", "op", "shape", "dtype", "input_bytes", "bytes", "bytes_moved", "flops")}

    yield Task(**common, make=base.make, exact=eager.linear_grpo_loss, variant="bfloat16 logits",
               tolerance=OTHERS[torch.bfloat16], functions={OURS: partial(ours, logits_dtype=torch.bfloat16),
                                                  peers.EAGER: eager.linear_grpo_loss})

    def with_sets() -> Problem:
        problem = base.make()
        ids = problem.inputs["token_ids"]
        # Consecutive ids from the token on: different ones, the token among them.
        sets = (ids[..., None] + torch.arange(SET, device=ids.device) * 7) % vocab
        return problem._replace(inputs=problem.inputs | {"sets": sets})

    def over_sets(sets: Tensor, **inputs: Tensor) -> Tensor:
        flat = sets.flatten(0, 1)
        offsets = torch.arange(len(flat) + 1, device=flat.device) * flat.shape[1]
        return ours(**inputs, support=(flat.flatten(), offsets))

    def exact(hidden: Tensor, weight: Tensor, token_ids: Tensor, sets: Tensor, **inputs: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        return eager.grpo_loss(eager.over_support(logits, sets), token_ids, **inputs)

    common["flops"] = 6 * tokens * width * SET
    yield Task(**common, make=with_sets, functions={OURS: over_sets, peers.EAGER: exact}, exact=exact,
               variant=f"support sets of {SET} ids")


def case(setting: Setting) -> Iterator[Task]:
    for part in (vocabulary, number_of_tokens, active, variants):
        yield from part(setting)


CASES = {NAME: case}
