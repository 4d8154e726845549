"""Programs of tests/hardening/test_threads_and_processes.py: each ends with a line of JSON.

    python process_cases.py fork | spawn | fork_while_busy
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from r1kernels import (
    cross_entropy,
    distillation_loss,
    group_advantages,
    grpo_loss,
    importance_weights,
    kl_estimate,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_logprobs,
    objectives,
    policy_loss,
    testing,
    token_logprobs_and_entropy,
    token_statistics,
)

Call = Callable[[], tuple[Tensor, ...]]


def leaves(rows: int, vocab: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of all calls; those that get gradients are leaves."""
    rng = testing.generator(seed)
    logits = testing.random_logits(rows, vocab, seed=seed).requires_grad_()
    ids = testing.random_ids(rows, vocab=vocab, seed=seed)
    return {
        "logits": logits, "ids": ids, "teacher": testing.random_logits(rows, vocab, seed=seed + 1),
        "hidden": torch.randn(rows, width, generator=rng).bfloat16().requires_grad_(),
        "weight": torch.randn(vocab, width, generator=rng).bfloat16().requires_grad_(),
        "logprobs": (-torch.rand(1, rows, generator=rng)).requires_grad_(), "old": -torch.rand(1, rows, generator=rng),
        "advantages": torch.randn(1, generator=rng), "rewards": torch.randn(rows, generator=rng),
    }


def calls(given: dict[str, Tensor]) -> dict[str, Call]:
    """Operations forward and backward, as functions that return values and gradients."""
    logits, ids, hidden, weight = (given[name] for name in ("logits", "ids", "hidden", "weight"))
    row = {"advantages": given["advantages"], "old_logprobs": given["old"]}

    def grads(value: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        return (value.detach(), *torch.autograd.grad(value.sum(), sources))

    return {
        "token_logprobs_and_entropy": lambda: grads(sum(token_logprobs_and_entropy(logits, ids)), logits),
        "token_statistics": lambda: grads(token_statistics(logits, ids).sum_sq_probs, logits),
        "cross_entropy": lambda: grads(cross_entropy(logits, ids, label_smoothing=0.1), logits),
        "distillation_loss": lambda: grads(distillation_loss(logits, given["teacher"]).loss, logits),
        "distillation of top k": lambda: grads(
            distillation_loss(logits, given["teacher"], top_k=1, divergence="reverse_kl").loss, logits),
        "policy_loss": lambda: grads(policy_loss(given["logprobs"], **row).loss, given["logprobs"]),
        "kl_estimate": lambda: grads(kl_estimate(given["logprobs"], given["old"]), given["logprobs"]),
        "grpo_loss": lambda: grads(grpo_loss(logits[None], ids[None], **row).loss, logits),
        "linear_token_logprobs": lambda: grads(linear_token_logprobs(hidden, weight, ids), hidden, weight),
        "linear_cross_entropy": lambda: grads(linear_cross_entropy(hidden, weight, ids), hidden, weight),
        "linear_grpo_loss": lambda: grads(
            linear_grpo_loss(hidden[None], weight, ids[None], **row, objective=objectives.gspo()).loss, hidden, weight),
        "group_advantages": lambda: (group_advantages(given["rewards"], len(given["rewards"])),),
        "importance_weights": lambda: (importance_weights(given["logprobs"], given["old"]).weights,),
    }


def fingerprint(given: dict[str, Tensor]) -> str:
    """Of all bits of all results."""
    digest = hashlib.sha256()
    for call in calls(given).values():
        for value in call():
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _put(queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    queue.put(fingerprint(leaves(9, 300, 24)))


def in_processes(method: str, count: int) -> dict[str, object]:
    """Whether processes that are started after use compute the same bits."""
    torch.set_num_threads(1)
    mine, context = fingerprint(leaves(9, 300, 24)), multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=_put, args=(queue,)) for _ in range(count)]
    for child in children:
        child.start()
    theirs = [queue.get() for _ in children]
    for child in children:
        child.join()
    return {"same": [value == mine for value in theirs], "codes": [child.exitcode for child in children]}


def fork_while_busy(forks: int) -> dict[str, object]:
    """Forks while threads take memory for matrix products: a lock that one of them holds must not stop a child."""
    torch.set_num_threads(1)
    a, b, out = torch.randn(1, 1).bfloat16(), torch.randn(1, 1).bfloat16(), torch.empty(1, 1)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            torch.ops.r1kernels.gemm_f32.default(a, b, out, False)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(forks):
        if (child := os.fork()) == 0:
            signal.alarm(30)
            torch.ops.r1kernels.gemm_f32.default(a, b, out, False)
            os._exit(0)
        codes.append(os.waitpid(child, 0)[1])
    stop.set()
    for thread in threads:
        thread.join()
    return {"codes": codes}


PROGRAMS = {
    "fork": lambda: in_processes("fork", 2), "spawn": lambda: in_processes("spawn", 1),
    "fork_while_busy": lambda: fork_while_busy(30),
}

if __name__ == "__main__":
    started = time.monotonic()
    print(json.dumps(PROGRAMS[sys.argv[1]]()))
    print(f"{time.monotonic() - started:.1f} s", file=sys.stderr)
