"""GRPO loss forward and backward from bfloat16 hidden states: what it costs beside its three matrix products."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, BusyProcess, quietly
from torch import Tensor

import r1kernels


class HeadShape(NamedTuple):
    """B sequences of T tokens, hidden size H, vocabulary V."""

    sequences: int
    tokens: int
    hidden: int
    vocab: int


HEADS = {"small head": HeadShape(4, 64, 128, 4_096)} if SMALL else {
    "2048 tokens, H 1024, V 32768": HeadShape(4, 512, 1024, 32_768),
    "2048 tokens, H 1024, V 151936": HeadShape(4, 512, 1024, 151_936),
}
# Dense logits in float32, twice, and their gradients: beyond this they are left out.
EAGER_BYTES = 1 << 30
ACTIVE = 0.4


class HeadBatch(NamedTuple):
    """`old_logprobs` are near: no token is clipped. `clipping` ones are so far off that all but `ACTIVE` are, and
    `sparse_advantages` are 0 where those clip."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    clipping: Tensor
    sparse_advantages: Tensor


def make_batch(shape: HeadShape) -> HeadBatch:
    generator = torch.Generator().manual_seed(0)
    b, t, h, v = shape
    hidden = torch.randn(b, t, h, generator=generator).bfloat16()
    weight = (torch.randn(v, h, generator=generator) * 2 / h**0.5).bfloat16()
    token_ids = torch.randint(v, (b, t), generator=generator)
    advantages = torch.tensor([1.0, -1.0]).repeat(b)[:b] * (1 + torch.rand(b, generator=generator))
    logprobs = r1kernels.linear_token_logprobs(hidden, weight, token_ids)
    near = logprobs + 0.02 * torch.randn(b, t, generator=generator)
    idle = (torch.randperm(b * t, generator=generator) >= ACTIVE * b * t).reshape(b, t)
    per_token = advantages[:, None].expand(b, t)
    return HeadBatch(
        hidden.requires_grad_(), weight.requires_grad_(), token_ids, advantages, near,
        torch.where(idle, logprobs - 0.5 * per_token.sign(), near), torch.where(idle, 0.0, per_token),
    )


def ours(batch: HeadBatch, **options: Any) -> Tensor:
    return r1kernels.linear_grpo_loss(
        batch.hidden, batch.weight, batch.token_ids, batch.advantages, old_logprobs=batch.old_logprobs, **options
    ).loss


def eager(batch: HeadBatch) -> Tensor:
    """What a trainer writes by hand."""
    log_p = F.linear(batch.hidden, batch.weight).float().log_softmax(-1)
    return of_logprobs(log_p.gather(-1, batch.token_ids.unsqueeze(-1)).squeeze(-1), batch)


def of_logprobs(logprobs: Tensor, batch: HeadBatch) -> Tensor:
    ratio = (logprobs - batch.old_logprobs).exp()
    advantages = batch.advantages.reshape(len(ratio), -1)
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(1).mean()


def trl() -> Callable[[HeadBatch], Tensor] | None:
    """The head of TRL's trainers: log-probs and entropy of tiles of the logits, which backward computes again."""
    kernels = quietly(lambda: __import__("trl.kernels", fromlist=["kernels"]))
    if kernels is None:
        return None

    def loss(batch: HeadBatch) -> Tensor:
        logprobs, *_ = kernels.ChunkedLogProbFunction.apply(
            batch.hidden.flatten(0, 1), batch.weight, None, batch.token_ids.flatten(), 1.0, 32_768, None, 1.0,
            ("entropy",),
        )
        return of_logprobs(logprobs.view_as(batch.token_ids), batch)

    return loss


def liger() -> Callable[[HeadBatch], Tensor] | None:
    module = quietly(lambda: __import__("liger_kernel.chunked_loss", fromlist=["chunked_loss"]))
    if module is None:
        return None
    head = module.LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")

    def loss(batch: HeadBatch) -> Tensor:
        mask = torch.ones_like(batch.old_logprobs)
        return head(
            batch.hidden, batch.weight, batch.token_ids, mask, batch.advantages, old_per_token_logps=batch.old_logprobs
        )[0]

    return loss


def step(loss: Callable[[HeadBatch], Tensor], batch: HeadBatch) -> Callable[[], None]:
    def run() -> None:
        batch.hidden.grad = batch.weight.grad = None
        loss(batch).backward()

    return run


def gradients(loss: Callable[[HeadBatch], Tensor], batch: HeadBatch) -> tuple[Tensor, Tensor, Tensor]:
    step(loss, batch)()
    grads = batch.hidden.grad.float(), batch.weight.grad.float()
    batch.hidden.grad = batch.weight.grad = None
    return loss(batch).detach(), *grads


def variants(batch: HeadBatch) -> dict[str, HeadBatch]:
    """Batches of which `ACTIVE` of the tokens have a gradient."""
    return {
        "r1kernels, 60 % clipped": batch._replace(old_logprobs=batch.clipping),
        "r1kernels, 60 % of advantage 0": batch._replace(advantages=batch.sparse_advantages),
    }


def check(loss: Callable[[HeadBatch], Tensor], batch: HeadBatch) -> None:
    """No number without the equality check: a few tokens against float32, within what bfloat16 gradients allow."""
    few = batch._replace(**{
        name: getattr(batch, name)[:, :8].detach().clone() for name in ("hidden", "token_ids", "old_logprobs")
    })
    if batch.advantages.dim() == 2:
        few = few._replace(advantages=batch.advantages[:, :8])
    few.hidden.requires_grad_()
    exact = few._replace(
        hidden=few.hidden.detach().float().requires_grad_(), weight=few.weight.detach().float().requires_grad_()
    )
    (expected, *grads), (found, *found_grads) = gradients(eager, exact), gradients(loss, few)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    for found_grad, grad in zip(found_grads, grads, strict=True):
        error = (found_grad - grad).norm() / grad.norm()
        assert error < 0.03, f"the gradient is off by {error:.2g}"


def check_active(batch: HeadBatch) -> None:
    """The share of active tokens is what is said of it, and only advantages of 0 spare the logits too."""
    clipped, known = (
        r1kernels.linear_grpo_loss(
            part.hidden.detach(), part.weight.detach(), part.token_ids, part.advantages, old_logprobs=part.old_logprobs
        ).metrics
        for part in variants(batch).values()
    )
    for metrics in (clipped, known):
        assert abs(float(metrics["active_fraction"]) - ACTIVE) < 0.005
    assert known["measured_tokens"] < clipped["measured_tokens"] == batch.token_ids.numel()


def products(batch: HeadBatch) -> Callable[[], None]:
    """Three products of bfloat16 into memory that is already mapped: the least that any exact head does."""
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    return run


@pytest.mark.parametrize("shape", HEADS)
def bench_linear_grpo_loss(shape: str, in_turns: Callable[..., object]) -> None:
    batch = make_batch(HEADS[shape])
    check_active(batch)
    pairs: dict[str, tuple[Callable[[HeadBatch], Tensor], HeadBatch]] = {
        "r1kernels": (ours, batch),
        "r1kernels, bfloat16 logits": (lambda batch: ours(batch, logits_dtype=torch.bfloat16), batch),
        **{name: (ours, part) for name, part in variants(batch).items()},
    }
    if batch.token_ids.numel() * batch.weight.shape[0] * 4 <= EAGER_BYTES:
        pairs["torch eager"] = (eager, batch)
        pairs["torch.compile"] = (torch.compile(eager), batch)
    if (peer := trl()) is not None:
        pairs["TRL 1.16, chunked head"] = (peer, batch)
    if (peer := liger()) is not None:
        pairs["Liger 0.8.5, not compiled"] = (peer, batch)
    candidates: dict[str, Callable[[], object]] = {}
    for name, (loss, part) in pairs.items():
        check(loss, part)
        candidates[name] = step(loss, part)
    candidates["three bare bfloat16 products"] = products(batch)
    slow = {name: 2 for name in ("TRL 1.16, chunked head", "Liger 0.8.5, not compiled")}
    in_turns(candidates, op="linear_grpo_loss", shape=shape, rounds=7, slow=slow)


def bench_linear_cross_entropy(in_turns: Callable[..., object]) -> None:
    """Supervised fine-tuning: PyTorch's own head is the peer."""
    shape = next(iter(HEADS))
    batch = make_batch(HEADS[shape])

    def eager_loss(batch: HeadBatch) -> Tensor:
        return F.cross_entropy(F.linear(batch.hidden, batch.weight).float().flatten(0, 1), batch.token_ids.flatten())

    losses: dict[str, Callable[[HeadBatch], Tensor]] = {
        "r1kernels": lambda batch: r1kernels.linear_cross_entropy(batch.hidden, batch.weight, batch.token_ids),
        "torch eager": eager_loss,
        "torch.compile": torch.compile(eager_loss),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["torch linear_cross_entropy"] = lambda batch: F.linear_cross_entropy(
            batch.hidden.flatten(0, 1), batch.weight, batch.token_ids.flatten()
        )
    exact = gradients(eager_loss, batch)
    for loss in losses.values():
        for found, expected in zip(gradients(loss, batch), exact, strict=True):
            assert (found - expected).norm() <= 0.03 * expected.norm()
    candidates = {name: step(loss, batch) for name, loss in losses.items()}
    in_turns(candidates, op="linear_cross_entropy", shape=shape, rounds=7)


def bench_with_a_busy_process(in_turns: Callable[..., object]) -> None:
    """One other process computes on one of the cores: how much longer does a step take?"""
    name, shape = next(iter(HEADS.items()))
    batch = make_batch(shape)
    with BusyProcess() as busy:
        candidates = {}
        for label, loss in {"r1kernels": ours, "torch eager": eager}.items():
            candidates[label] = step(loss, batch)
            candidates[f"{label}, with another process busy"] = busy.beside(step(loss, batch))
        in_turns(candidates, op="linear_grpo_loss_busy", shape=name, rounds=7)


def bench_growth(in_turns: Callable[..., list[dict[str, Any]]], benchmark: Any) -> None:
    """Time is a straight line in the number of tokens, and memory beyond the gradients does not depend on it.

    R1KERNELS_BENCH_LARGE=1 goes on to 64k tokens.
    """
    counts = [256, 512, 1024] if SMALL else [1024 * 2**i for i in range(7 if os.environ.get("R1KERNELS_BENCH_LARGE")
                                                                        else 5)]
    width, vocab = (64, 512) if SMALL else (512, 8_192)
    batches = {n: make_batch(HeadShape(1, n, width, vocab)) for n in counts}
    chunk_bytes = 256 * vocab * 4 if SMALL else 32 << 20

    def run(n: int) -> Callable[[], None]:
        return step(lambda batch: ours(batch, chunk_bytes=chunk_bytes), batches[n])

    rows = in_turns(
        {f"{n} tokens": run(n) for n in counts},
        op="linear_grpo_loss_growth", shape=f"H {width}, V {vocab}, chunks of {chunk_bytes >> 20} MiB", rounds=7,
    )
    x = torch.tensor(counts, dtype=torch.float64)
    y = torch.tensor([row["median_s"] for row in rows], dtype=torch.float64)
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    residual = y - design @ torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    r_squared = 1 - float(residual.square().sum() / (y - y.mean()).square().sum())
    for n, row in zip(counts, rows, strict=True):
        row.update(tokens=n, r_squared=r_squared)
        if row["peak_extra_bytes"] is not None:  # beyond the gradient of hidden
            row["beyond_gradients_bytes"] = row["peak_extra_bytes"] - n * width * 2
