"""Four ranks, which compute heads whose vocabulary, or whose batch, is split over two, three and four of them.

    python shard_ranks.py DIRECTORY

saves the results of each as DIRECTORY/RANK.pt; the tests compare them with one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import linear_cases as cases
import torch
from ranks import Traffic, error_of, fork_ranks
from shard_cases import DTYPES, LEAD, OPTIONS, SPLITS, VOCAB, WIDTH, batch, make, make_logits, mask, shard_of
from shard_distillation import DISTILLED, distilled, with_listed, with_teacher
from shard_statistics import STATISTICS
from shard_statistics import bad_calls as bad_statistics
from target_cases import TERMS
from torch import Tensor

from r1kernels import (
    cross_entropy,
    global_normalizer,
    grpo_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_multi_target,
    linear_token_logprobs_and_entropy,
    objectives,
    token_logprobs,
    token_logprobs_and_entropy,
)
from r1kernels.ops import shards

WORLD = 4


# ---- the calls, of one process and of a rank alike --------------------------------------------------------


def statistics(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    g, eta = cases.weights_of(*LEAD)
    (logprobs, entropy), grads = cases.gradients(
        linear_token_logprobs_and_entropy, case,
        lambda result: (g.to(result[0].dtype) * result[0] + eta.to(result[1].dtype) * result[1]).sum(),
        mask=mask(), **options,
    )
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **grads}


def policy(case: dict[str, Any], objective: objectives.Objective, **options: Any) -> dict[str, Tensor]:
    result, grads = cases.gradients(
        linear_grpo_loss, case, lambda result: 2 * result.loss, objective=objective, **batch(), **options
    )
    return {"loss": result.loss.detach(), **{f"metric {k}": v for k, v in result.metrics.items()}, **grads}


def linear_nll(case: dict[str, Any], reduction: str, **options: Any) -> dict[str, Tensor]:
    case = case | {"targets": torch.where(mask(), case["token_ids"], -100)}
    del case["token_ids"]
    loss, grads = cases.gradients(
        linear_cross_entropy, case, lambda loss: loss.square().sum(), reduction=reduction, **options
    )
    return {"loss": loss.detach(), **grads}


def multi_target(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Two targets of the same hidden states."""
    ids = torch.stack([case["token_ids"], case["token_ids"].roll(1, -1)])
    losses, grads = cases.gradients(
        linear_multi_target, case | {"token_ids": ids}, lambda losses: losses.sum(), masks=torch.stack([mask()] * 2),
        **options,
    )
    return {"loss": losses.detach(), **grads}


def padded(sizes: tuple[int, ...], rank: int | None) -> dict[str, Any]:
    """Rows from 790 on are padding that must not be read."""
    case = make("everything", vocab=sum(sizes))
    case["token_ids"] = case["token_ids"] % 790
    for value in (case["weight"], case["bias"], case["lora"][1].t()):
        value[790:] = torch.nan
    return case if rank is None else shard_of(case, sizes, rank)


def no_logits_in_a_shard() -> dict[str, Any]:
    """All logits of one shard of three are -inf, and one token has nearly all of the probability."""
    case = make("bias")
    case["bias"][400:750] = -torch.inf
    case["bias"][7] = 30
    case["token_ids"][0] = 7
    case["token_ids"][1] = case["token_ids"][1].clamp(max=399)
    return case


def accumulated(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    weight = case["weight"].detach().requires_grad_()
    into = torch.ones(weight.shape)
    case = case | {"weight": weight, "grad_accumulation_into": into}
    linear_cross_entropy(**{"targets" if k == "token_ids" else k: v for k, v in case.items()}, **options).backward()
    assert weight.grad is None
    return {"weight": into}


def padded_logits(sizes: tuple[int, ...]) -> dict[str, Any]:
    """The entries from VOCAB on are padding."""
    case = make_logits(torch.bfloat16)
    return case | {"logits": torch.nn.functional.pad(case["logits"], (0, sum(sizes) - VOCAB), value=torch.nan)}


def from_logits(case: dict[str, Any], what: str, **options: Any) -> dict[str, Tensor]:
    logits = case["logits"].detach().requires_grad_()
    ids = case["token_ids"]
    if what == "statistics":
        g, eta = (value.float() for value in cases.weights_of(*LEAD))
        logprobs, entropy = token_logprobs_and_entropy(logits, ids, temperature=0.7, **options)
        results, loss = {"logprobs": logprobs, "entropy": entropy}, (g * logprobs + eta * entropy).sum()
    elif what == "policy":
        loss, metrics = grpo_loss(logits, ids, objective=objectives.grpo(entropy_coef=0.1), **batch(), **options)
        results = {"loss": loss, **{f"metric {name}": value for name, value in metrics.items()}}
    else:
        loss = cross_entropy(logits, torch.where(mask(), ids, -100), **options)
        results = {"loss": loss}
    loss.backward()
    return {**{name: value.detach() for name, value in results.items()}, "logits": logits.grad}


CALLS: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[], dict[str, Any]], dict[str, Any]]] = {
    **{f"statistics {head}, {dtypes}": (statistics, lambda h=head, d=dtypes: make(h, d), OPTIONS)
       for head in ("plain", "everything") for dtypes in DTYPES},
    **{f"policy {name}, {dtypes}": (policy, lambda d=dtypes: make("scale and temperatures", d),
                                    OPTIONS | {"objective": objective})
       for dtypes in ("float32", "bfloat16")
       for name, objective in {
           "one pass": objectives.grpo(kl_coef=0.1, entropy_coef=0.02), "sparse": objectives.dapo(),
           "two phases": objectives.gspo(),
       }.items()},
    "policy capacity": (policy, lambda: make("plain"), OPTIONS | {"objective": objectives.dapo(), "capacity": 22}),
    **{f"cross entropy {reduction}": (linear_nll, lambda: make("softcap"), OPTIONS | {"reduction": reduction})
       for reduction in ("mean", "none")},
    **{f"cross entropy {reduction} with other terms": (
        linear_nll, lambda: make("everything"), OPTIONS | {"reduction": reduction} | TERMS["both"])
       for reduction in ("mean", "none")},
    "logits cross entropy with other terms": (
        from_logits, lambda: make_logits(torch.float32), {"what": "cross entropy"} | TERMS["both"]),
    "several targets": (multi_target, lambda: make("scale and temperatures"), OPTIONS | TERMS["both"]),
    "rounded logits": (statistics, lambda: make("bias", "bfloat16"), OPTIONS | {"logits_dtype": torch.bfloat16}),
    "no logits in a shard": (statistics, no_logits_in_a_shard, {}),
    **{f"logits {what}, {name}": (from_logits, lambda d=dtype: make_logits(d), {"what": what})
       for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
       for what in ("statistics", "policy", "cross entropy")},
    "accumulated": (accumulated, lambda: make("plain", "float32"), {}),
    **STATISTICS,
}


# ---- data parallelism -------------------------------------------------------------------------------------

OBJECTIVES = {
    "token mean": objectives.dapo(kl_coef=0.1), "sequence mean": objectives.gspo(),
    "constant": objectives.dr_grpo(max_length=10),
}


def data_parallel(rank: int, world: int, group: Any, objective: objectives.Objective) -> dict[str, Tensor]:
    """Every rank has some sequences, and takes them one by one. The gradients are added up."""
    case, tokens = make("plain"), batch()
    mine = [slice(row, row + 1) for row in range(rank, LEAD[0], world)]
    normalizer = global_normalizer([tokens["mask"][rows] for rows in mine], objective, group)
    total = torch.zeros(())
    weight = case["weight"].requires_grad_()
    for rows in mine:
        loss = linear_grpo_loss(
            case["hidden"][rows], weight, case["token_ids"][rows], objective=objective, normalizer=normalizer,
            **{name: value[rows] for name, value in tokens.items()},
        ).loss
        loss.backward()
        total += loss.detach()
    for value in (weight.grad, total):
        if group is not None:
            torch.distributed.all_reduce(value, group=group)
    return {"loss": total, "weight": weight.grad, "normalizer": normalizer}


# ---- a rank -----------------------------------------------------------------------------------------------


def bad_calls(rank: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments of `statistics` on which rank 1 of two disagrees with rank 0."""
    good = shard_of(make("everything"), SPLITS[2], rank)
    yield "tokens", good | ({"hidden": good["hidden"][:3], "token_ids": good["token_ids"][:3],
                             "temperature": good["temperature"][:3]} if rank else {})
    yield "vocab_size", good | {"vocab_size": 990 + rank}
    yield "vocab_size too large", good | {"vocab_size": 1001}
    yield "temperature", good | {"temperature": 1.0 + rank}
    yield "ids", good | {"token_ids": good["token_ids"].roll(rank) // (1 + rank)}
    yield "softcap", good | {"softcap": 5.0 + rank}
    yield "refused", good | ({"softcap": -1.0} if rank else {})
    yield "width", good | ({"weight": good["weight"][:, 1:]} if rank else {})
    yield "id out of range", good | {"token_ids": torch.where(good["token_ids"] == good["token_ids"][0, 0], 1000,
                                                              good["token_ids"])}


def bad_distillations(rank: int, group: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    case = with_teacher(make("plain"))
    part = shard_of(case, SPLITS[2], rank)
    other = shard_of(case, (599, 401), rank)
    yield "teacher", lambda: distilled(part | {"teacher_weight": other["teacher_weight"]}, "jsd", process_group=group)
    yield "kind", lambda: distilled(part, "reverse_kl" if rank else "jsd", process_group=group)
    top = with_listed(make("plain"), 3 + rank)
    yield "top-k", lambda: distilled(shard_of(top, SPLITS[2], rank), "jsd", process_group=group)


def bad_supports(rank: int, group: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rank 1 gives sets of ids, which a sharded vocabulary does not take."""
    sets = (torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)) if rank else None
    logits, ids = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    yield "support", lambda: token_logprobs(logits, ids, process_group=group, support=sets)
    yield "support of a cross-entropy", lambda: cross_entropy(
        logits, ids, process_group=group, support=sets, z_loss_coef=0.1
    )


def bad_targets(rank: int, group: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Cross-entropies on which two ranks disagree about keywords that only these have."""
    part = shard_of(make("plain"), SPLITS[2], rank)
    hidden, weight, ids = part["hidden"], part["weight"], part["token_ids"]
    logits = shard_of(make_logits(torch.float32), SPLITS[2], rank)["logits"]
    calls = {
        "hidden": lambda **keywords: linear_cross_entropy(hidden, weight, ids, process_group=group, **keywords),
        "several targets": lambda **keywords: linear_multi_target(
            hidden, weight, torch.stack([ids, ids]), process_group=group, **keywords),
        "logits": lambda **keywords: cross_entropy(logits, ids, process_group=group, **keywords),
    }
    for name, keywords in (
        ("smoothing", {"label_smoothing": 0.1 * rank}), ("z-loss", {"z_loss_coef": 1e-3 * (1 + rank)}),
        ("normalizer", {"normalizer": 2.0 + rank}), ("tensor of normalizer", {"normalizer": torch.tensor(2.0 + rank)}),
        ("refused smoothing", {"label_smoothing": 3.0 if rank else 0.1}),
        ("refused normalizer", {"normalizer": 0.0 if rank else 2.0}),
    ):
        for what, call in calls.items():
            if what != "logits" or name.startswith("refused"):
                yield f"{name} of {what}", lambda c=call, k=keywords: c(**k)
    depths = torch.cat([ids] * 2)[:6].reshape(2 + rank, 3 - rank, -1)  # the same ids in the same order
    yield "depths of several targets", lambda: linear_multi_target(
        hidden[: 3 - rank], weight, depths, process_group=group)


def as_on_a_device(rank: int, part: dict[str, Any], group: Any) -> dict[str, Any]:
    """Where reading a tensor costs a synchronisation, only the first call reads. Later ones compare on the device."""
    shards.reads_are_free = lambda device: False
    results = {f"on a device {call}, 2": statistics(part, process_group=group) for call in ("first", "second")}
    one_less = part | ({"token_ids": part["token_ids"][1:], "hidden": part["hidden"][1:]} if rank else {})
    error = error_of(lambda: linear_token_logprobs_and_entropy(**one_less, process_group=group))
    return results | {"error on a device": error}


def results_of(rank: int, groups: dict[int, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for world, group in groups.items():
        if rank >= world:
            continue
        for name, (function, make_case, options) in (CALLS | DISTILLED).items():
            part = shard_of(make_case(), SPLITS[world], rank)
            results[f"{name}, {world}"] = function(part, process_group=group, **options)
        for name, objective in OBJECTIVES.items():
            results[f"data parallel {name}, {world}"] = data_parallel(rank, world, group, objective)
        rows = (400,) * world
        if sum(rows) > VOCAB:
            padding = shard_of(padded_logits(rows), rows, rank)
            results[f"padded logits, {world}"] = from_logits(
                padding, "statistics", process_group=group, vocab_size=VOCAB
            )
        results[f"padded, {world}"] = statistics(padded(rows, rank), process_group=group, vocab_size=790)
        for vocab in (40, VOCAB):
            sizes = (vocab - 8 * (world - 1), *(8,) * (world - 1))
            part = shard_of(make("lora", vocab=vocab), sizes, rank)
            for name, function in (("statistics", statistics), ("policy", policy)):
                options = {"objective": objectives.grpo(kl_coef=0.1)} if name == "policy" else {}
                chunks = cases.chunk_of(7, max(sizes), WIDTH)
                with Traffic() as sent:
                    function(part, process_group=group, chunk_bytes=chunks, **options)
                results[f"traffic {name}, {vocab}, {world}"] = sent
            whole = make("plain", vocab=vocab)
            part = shard_of(whole | {"teacher_hidden": whole["hidden"], "teacher_weight": whole["weight"]}, sizes, rank)
            listed = shard_of(with_listed(whole, 3), sizes, rank)
            for kind in ("forward_kl", "jsd", "top-k"):
                arguments = (listed, "jsd") if kind == "top-k" else (part, kind)
                with Traffic() as sent:
                    distilled(*arguments, process_group=group, chunk_bytes=2 * chunks)
                results[f"traffic {kind}, {vocab}, {world}"] = sent
    if rank < 2:
        for name, arguments in bad_calls(rank):
            call = linear_token_logprobs_and_entropy
            results[f"error {name}"] = error_of(lambda a=arguments, c=call: c(**a, process_group=groups[2]))
        bad = [*bad_distillations(rank, groups[2]), *bad_statistics(rank, groups[2]), *bad_supports(rank, groups[2]),
               *bad_targets(rank, groups[2])]
        for name, call in bad:
            results[f"error {name}"] = error_of(call)
        part = shard_of(make("plain"), SPLITS[2], rank)
        results["works after errors"] = statistics(part, process_group=groups[2])
        nothing = part | {"hidden": part["hidden"][:0], "token_ids": part["token_ids"][:0]}
        (logprobs, _), grads = cases.gradients(
            linear_token_logprobs_and_entropy, nothing, lambda result: result[0].sum(), process_group=groups[2]
        )
        results["no tokens"] = {"logprobs": logprobs.detach(), **grads}
        results |= as_on_a_device(rank, part, groups[2])
    return results


def main(rank: int) -> dict[str, Any]:
    return results_of(rank, {world: torch.distributed.new_group(list(range(world))) for world in SPLITS})


if __name__ == "__main__":
    fork_ranks(main, WORLD, Path(sys.argv[1]))
