"""All statistics of tokens over a sharded vocabulary: calls of one process and of a rank alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import linear_cases as cases
import torch
from shard_cases import LEAD, OPTIONS, SPLITS, VOCAB, make, make_logits, mask, shard_of
from torch import Tensor

from r1kernels import TokenStatistics, linear_token_statistics, testing, token_statistics

DIFFERENTIABLE = ("logprobs", "lse", "entropy", "sum_sq_probs", "selected_logprobs")


def selected_ids() -> Tensor:
    """Ids of all shards, equal ones among them."""
    selected = testing.random_ids(*LEAD, 4, vocab=VOCAB, seed=8)
    selected[..., 3] = selected[..., 0]
    return selected


def _loss(result: TokenStatistics) -> Tensor:
    return sum(
        (torch.randn(value.shape, generator=testing.generator(k)).to(value.dtype) * value).sum()
        for k, value in enumerate(getattr(result, name) for name in DIFFERENTIABLE)
    )


def _values(result: TokenStatistics) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in result._asdict().items() if value is not None}


def from_hidden(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    result, grads = cases.gradients(
        linear_token_statistics, case, _loss, selected_ids=selected_ids(), mask=mask(), **options
    )
    return {**_values(result), **grads}


def from_logits(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    logits = case["logits"].detach().requires_grad_()
    result = token_statistics(
        logits, case["token_ids"], selected_ids=selected_ids(), temperature=0.7, mask=mask(), **options
    )
    _loss(result).backward()
    return {**_values(result), "logits": logits.grad}


def alone(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Fields that need no other field, without selected ids."""
    return _values(linear_token_statistics(**case, fields=("sum_sq_probs", "is_top1"), **options))


def ties() -> dict[str, Any]:
    """The largest logit of a row is that of an id in every shard of each split. The tokens are some of these ids."""
    case = make_logits(torch.bfloat16)
    largest = torch.tensor([5, 390, 410, 620, 700, 990])
    case["logits"][..., largest] = 30.0
    case["token_ids"] = largest.expand(LEAD).contiguous()
    case["logits"][0, :, :400], case["logits"][1, :, 400:] = -3.0, -3.0
    return case


def no_logits_in_a_shard() -> dict[str, Any]:
    case = make("bias")
    case["bias"][400:750] = -torch.inf
    return case | {"token_ids": case["token_ids"].clamp(max=399)}


def finite(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Without gradients of selected log-probs, some of which are -inf."""

    def loss(result: TokenStatistics) -> Tensor:
        return _loss(result._replace(selected_logprobs=result.logprobs[..., None]))

    result, grads = cases.gradients(linear_token_statistics, case, loss, selected_ids=selected_ids(), **options)
    return {**_values(result), **grads}


STATISTICS = {
    **{f"all statistics {head}, {dtypes}": (from_hidden, lambda h=head, d=dtypes: make(h, d), OPTIONS)
       for head, dtypes in (("plain", "float32"), ("everything", "bfloat16"))},
    "some statistics": (alone, lambda: make("plain"), OPTIONS),
    "all statistics capacity": (from_hidden, lambda: make("bias"), OPTIONS | {"capacity": 22}),
    "all statistics of logits": (from_logits, lambda: make_logits(torch.float32), {}),
    "all statistics of ties": (from_logits, ties, {}),
    "all statistics, no logits in a shard": (finite, no_logits_in_a_shard, {}),
}


def bad_calls(rank: int, group: Any) -> Iterator[tuple[str, Any]]:
    """Calls on which two ranks disagree."""
    part = shard_of(make("plain"), SPLITS[2], rank)
    ids = selected_ids()
    logits = shard_of(make_logits(torch.float32), SPLITS[2], rank)
    for name, keywords in (
        ("selected ids", {"selected_ids": ids.roll(rank, 0)}), ("fields", {"fields": ("lse", "entropy")[: 1 + rank]}),
        ("refused fields", {"fields": ("loss",) if rank else ("lse",)}),
    ):
        yield f"{name} of hidden", lambda k=keywords: linear_token_statistics(**part, process_group=group, **k)
        yield f"{name} of logits", lambda k=keywords: token_statistics(**logits, process_group=group, **k)
