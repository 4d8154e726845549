"""Arithmetic of tokens (B, T) in float32: policy losses with their presets, KL estimates, importance weights, filters
and normalizers. Everything is checked against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels import Objective, objectives, testing
from r1kernels.bench import eager, peers
from r1kernels.bench.peers import Peer
from r1kernels.bench.tasks import BOTH, FORWARD, OURS, Problem, Setting, Task


def shape(setting: Setting) -> tuple[int, int]:
    return setting.pick((8, 64), (64, 2048), (512, 4096))


def size_of_oracle(setting: Setting) -> tuple[int, int]:
    """The oracle visits tokens in a loop, about 8,000 in a second."""
    return setting.pick((8, 64), (16, 512), (16, 512))


def make(setting: Setting, size: tuple[int, int], *names: str, leaves: tuple[str, ...] = ()) -> Problem:
    """The named tensors of a rollout. Log-ratios are so small that no token is near a bound: there, float64 and float32
    may decide differently."""
    b, t = size
    rng, device = setting.generator(), setting.device

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=rng, device=device)

    logprobs = -normal(b, t).abs() - 0.1
    every = {
        "logprobs": logprobs, "advantages": 1.5 + normal(b).clamp(-1, 1),
        "old_logprobs": logprobs + 0.02 * normal(b, t), "ref_logprobs": logprobs + 0.1 * normal(b, t),
        "entropy": normal(b, t).abs(),
        "mask": torch.arange(t, device=device) < torch.randint(t // 2, t, (b, 1), generator=rng, device=device),
    }
    return Problem({name: every[name] for name in names}, leaves)


def task(
    setting: Setting, op: str, names: tuple[str, ...], ours: Callable[..., Any], exact: Callable[..., Any],
    leaves: tuple[str, ...] = (), eager_too: bool = True, size: tuple[int, int] | None = None,
    **rest: Any,
) -> Task:
    b, t = size or shape(setting)
    passes = BOTH if leaves else FORWARD
    functions = {OURS: ours} | ({peers.EAGER: exact} if eager_too else {})
    return Task(
        case=op, op=op, shape={"B": b, "T": t}, dtype=torch.float32, passes=passes, functions=functions, exact=exact,
        make=partial(make, setting, (b, t), *names, leaves=leaves), input_bytes=4 * b * t * len(names),
        bytes={OURS: 640 * b * t, peers.EAGER: 128 * b * t}, bytes_moved=4 * b * t * (len(names) + len(leaves)),
        **rest,
    )


def oracle(objective: Objective, **inputs: Tensor) -> Tensor:
    """The oracle's loss, with the gradient that it writes out."""
    logprobs = inputs["logprobs"]
    exact = testing.policy_loss(objective, **inputs)
    grad = exact.grad_logprobs.value.to(logprobs)
    return exact.loss.value.to(logprobs) + (grad * (logprobs - logprobs.detach())).sum()


LOSS = ("logprobs", "advantages", "old_logprobs", "ref_logprobs", "mask")


def policy_loss(setting: Setting) -> Iterator[Task]:
    """Each preset with a mask, a reference and its own KL term, checked against the oracle of the tests, which shares
    no code with this library. Plain torch has the clipped loss alone."""
    presets: dict[str, Objective] = {
        "grpo": objectives.grpo(), "r1": objectives.r1(), "dr_grpo": objectives.dr_grpo(2048),
        "dapo": objectives.dapo(), "gspo": objectives.gspo(), "cispo": objectives.cispo(), "sapo": objectives.sapo(),
        "gmpo": objectives.gmpo(), "reinforce": objectives.reinforce(), "dppo": objectives.dppo(),
        "vespo": objectives.vespo(),
    }
    chosen = list(presets.items())[: setting.pick(3, None, None)]
    for name, objective in chosen:
        def ours(objective: Objective = objective, **inputs: Tensor) -> Tensor:
            return r1kernels.policy_loss(**inputs, objective=objective).loss

        if name == "grpo":
            yield task(setting, "policy_loss", ("logprobs", "advantages", "old_logprobs"), ours, eager.clipped_loss,
                       ("logprobs",), compiled=True)
        yield task(setting, "policy_loss", LOSS, ours, partial(oracle, objective), ("logprobs",), eager_too=False,
                   size=size_of_oracle(setting), variant=name)

    def clip(logprobs: Tensor, entropy: Tensor, tokens: r1kernels.PolicyBatch) -> Tensor:
        ratio = (logprobs - tokens.old_logprobs).exp()
        return -torch.min(ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages)

    own = Objective.token_local(clip, aggregate="sequence_mean")
    yield task(setting, "policy_loss", ("logprobs", "advantages", "old_logprobs"),
               lambda **inputs: r1kernels.policy_loss(**inputs, objective=own).loss, eager.clipped_loss, ("logprobs",),
               variant="a function of single tokens")


def kl_estimate(setting: Setting) -> Iterator[Task]:
    others = (Peer(peers.VERL, peers.verl_kl),)
    yield task(setting, "kl_estimate", ("logprobs", "ref_logprobs"), r1kernels.kl_estimate, eager.kl_estimate,
               ("logprobs",), peers=others, variant="k3")


def importance_weights(setting: Setting) -> Iterator[Task]:
    """Plain torch computes the weights alone, and this library its metrics, too."""

    def ours(old_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
        return r1kernels.importance_weights(logprobs, old_logprobs, mask.bool()).weights

    def exact(old_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.bool(), (logprobs - old_logprobs).exp().clamp(max=2.0), 0.0)

    yield task(setting, "importance_weights", ("old_logprobs", "logprobs", "mask"), ours, exact, variant="token")


def high_entropy_filter(setting: Setting) -> Iterator[Task]:
    def exact(entropy: Tensor) -> Tensor:
        return (entropy >= entropy.flatten().quantile(0.8)).to(entropy.dtype)

    # A token at the quantile may be kept in one precision and dropped in the other.
    yield task(setting, "high_entropy_filter", ("entropy",), r1kernels.high_entropy_filter, exact,
               tolerance=0.05)


def off_policy_filter(setting: Setting) -> Iterator[Task]:
    def ours(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        return r1kernels.off_policy_filter(logprobs, old_logprobs, 1.5 - advantages, threshold=0.01)

    def exact(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        kept = (1.5 - advantages >= 0) | ((old_logprobs - logprobs).mean(1) <= 0.01)
        return kept.to(logprobs.dtype)

    yield task(setting, "off_policy_filter", ("logprobs", "old_logprobs", "advantages"), ours, exact)


def clip_cov_filter(setting: Setting) -> Iterator[Task]:
    """The draw is random. The result is not where every candidate is dropped."""

    def per_token(logprobs: Tensor, advantages: Tensor) -> Tensor:
        return advantages[:, None].expand_as(logprobs)

    def ours(logprobs: Tensor, advantages: Tensor) -> Tensor:
        return r1kernels.clip_cov_filter(logprobs, per_token(logprobs, advantages), share=1.0)

    def exact(logprobs: Tensor, advantages: Tensor) -> Tensor:
        a = per_token(logprobs, advantages)
        covariance = (logprobs - logprobs.mean()) * (a - a.mean())
        return (~((covariance > 1) & (covariance < 5))).to(logprobs.dtype)

    yield task(setting, "clip_cov_filter", ("logprobs", "advantages"), ours, exact, tolerance=0.05)


def global_normalizer(setting: Setting) -> Iterator[Task]:
    objective = objectives.dapo()
    yield task(setting, "global_normalizer", ("mask",), lambda mask: r1kernels.global_normalizer(mask, objective),
               lambda mask: mask.sum().clamp(min=1).float())


CASES = {
    "policy_loss": policy_loss, "kl_estimate": kl_estimate, "importance_weights": importance_weights,
    "high_entropy_filter": high_entropy_filter, "off_policy_filter": off_policy_filter,
    "clip_cov_filter": clip_cov_filter, "global_normalizer": global_normalizer,
}
