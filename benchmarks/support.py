"""Forward and backward of the GRPO loss over sets of ids, against the dense head of this library in the same run.

    python benchmarks/support.py [--rounds 5] [--vocab 32768 151936] [--ids 64 512] [--dtype bfloat16]

Two kinds of sets: "shared" ones, whose ids are drawn by their rank in a Zipf law, so that tokens have many ids in
common, and "uniform" ones, which is the hardest case. The log-probs of 16 tokens are checked against float64 first.
Times are medians over rounds; in each round, every candidate runs twice, and the second run is timed. The results of
this device get a file support.json. `--crossover` measures where the walk over all
of the weight takes less time than gathered rows, which is the threshold SUPPORT_SHARE of `r1kernels._dispatch`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import saving
import torch
from torch import Tensor

import r1kernels
from r1kernels import _dispatch, testing
from r1kernels.bench.clock import HostClock
from r1kernels.bench.turns import times

TOKENS, WIDTH, CHECKED = 2048, 1024, 16
BARS = {64: 0.15, 512: 0.4}
Sets = tuple[Tensor, Tensor]


def sets_of(token_ids: Tensor, vocab: int, size: int, shared: bool) -> Sets:
    """`size` different ids for each token, its own among them."""
    rng = testing.generator(size)
    ranked = torch.randperm(vocab, generator=rng)
    # The k largest of log-weights plus Gumbel noise are a draw without replacement.
    weights = -torch.arange(1, vocab + 1).log() if shared else torch.zeros(vocab)
    rows = []
    for token in token_ids.tolist():
        noise = -torch.empty(vocab).exponential_(generator=rng).log()
        kept = ranked[(weights + noise).topk(size).indices]
        kept[0] = token if token not in kept.tolist() else kept[0]
        rows.append(kept[torch.randperm(size, generator=rng)])
    return torch.cat(rows), torch.arange(len(rows) + 1) * size


def check(hidden: Tensor, weight: Tensor, token_ids: Tensor, support: Sets) -> None:
    """The log-probs of the first tokens against float64."""
    ids, offsets = support
    some = ids[: offsets[CHECKED]], offsets[: CHECKED + 1]
    hidden, token_ids = hidden[:CHECKED].detach(), token_ids[:CHECKED]
    got = r1kernels.linear_token_logprobs(hidden, weight.detach(), token_ids, support=some)
    logits = testing.over_support(hidden.double() @ weight.detach().double().T, some)
    testing.assert_within(got, testing.token_stats(logits, token_ids).logprobs, 2e-5)


def measure(vocab: int, dtype: torch.dtype, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    rng = testing.generator(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=rng).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, WIDTH, generator=rng) / WIDTH**0.5).to(dtype).requires_grad_()
    token_ids, advantages = testing.random_ids(TOKENS, vocab=vocab), torch.randn(TOKENS, generator=rng)

    def step(support: Sets | None) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            r1kernels.linear_grpo_loss(hidden, weight, token_ids, advantages, cu_seqlens=torch.tensor([0, TOKENS]),
                                       support=support).loss.backward()

        return run

    candidates = {"dense": step(None)}
    for size in sizes:
        for kind in ("shared", "uniform"):
            support = sets_of(token_ids, vocab, size, kind == "shared")
            check(hidden, weight, token_ids, support)
            candidates[f"{size} {kind}"] = step(support)
    taken = times(candidates, dict.fromkeys(candidates, rounds), HostClock())
    medians = {name: statistics.median(values) for name, values in taken.items()}
    rows = []
    for name, seconds in medians.items():
        if name == "dense":
            continue
        size, kind = name.split()
        rows.append({
            "tokens": TOKENS, "width": WIDTH, "vocab": vocab, "dtype": str(dtype).removeprefix("torch."),
            "ids": int(size), "sets": kind, "seconds": seconds, "dense_seconds": medians["dense"],
            "ratio": seconds / medians["dense"], "bar": BARS.get(int(size)),
        })
    return rows


def crossover(vocab: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Both forms of the same sets, for sets of growing size."""
    rows = []
    for share in (64, 32, 16, 8, 4):
        results = {}
        for form, limit in (("gathered", 1), ("walk", vocab + 1)):
            before, _dispatch.SUPPORT_SHARE = _dispatch.SUPPORT_SHARE, limit
            [row] = [row for row in measure(vocab, dtype, [vocab // share], rounds) if row["sets"] == "uniform"]
            _dispatch.SUPPORT_SHARE = before
            results[form] = row["seconds"]
        rows.append({"vocab": vocab, "dtype": str(dtype).removeprefix("torch."), "share": share, **results})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_768, 151_936])
    parser.add_argument("--ids", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--crossover", action="store_true", help="measure the threshold between both forms instead")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.dtype:
        for vocab in arguments.vocab:
            dtype = getattr(torch, name)
            if arguments.crossover:
                found = crossover(vocab, dtype, arguments.rounds)
            else:
                found = measure(vocab, dtype, arguments.ids, arguments.rounds)
            rows += found
            for row in found:
                print(json.dumps(row), flush=True)
    op = "support_crossover" if arguments.crossover else "support"
    print(saving.save([{"op": op, **row} for row in rows]))


if __name__ == "__main__":
    main()
