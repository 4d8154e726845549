"""Your own reward, objective, data set and corpus, each a function that a recipe names by import path."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from r1kernels.rewards import EndpointError, Judge
from r1kernels.rewards.text import final_summary


def brevity(completions: list[str], *, answer: list[str], **columns: Any) -> list[float | None]:
    """A reward: 1 for a completion that is no longer than twice its reference, less for a longer one.

    It is called with lists, as in TRL. None means that a completion cannot be scored.
    """
    return [
        min(1.0, 2 * len(reference) / max(1, len(text))) if reference else None
        for text, reference in zip(completions, answer, strict=True)
    ]


def preferred(completions: list[str], *, question: list[str], answer: list[str], kind: list[str], prompts: list[str],
              **columns: Any) -> list[float | None]:
    """A reward for open problems: a language model compares each completion with the reference, from 0 to 1.

    The server is named by the environment: JUDGE_URL, JUDGE_MODEL. Other problems get 0, because a rule checks them.
    """
    judge = Judge(os.environ["JUDGE_URL"], os.environ["JUDGE_MODEL"])

    def score(kind: str, question: str, prompt: str, completion: str, reference: str) -> float | None:
        summary = final_summary(prompt, completion)
        if kind != "open" or not summary:
            return 0.0
        try:
            return (judge.compare(question, summary, reference) + 1) / 2
        except EndpointError:
            return None

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(score, kind, question, prompts, completions, answer))


def soft_clip(width: float = 0.2) -> Callable[[Tensor, Any], Tensor]:
    """An objective: a tanh bounds the ratio, so that its gradient becomes small but not 0.

    The callable that it returns gives a loss per token; autograd does the rest.
    """

    def loss(logprobs: Tensor, batch: Any) -> Tensor:
        ratio = (logprobs - batch.old_logprobs).exp()
        return -(1 + width * ((ratio - 1) / width).tanh()) * batch.advantages

    return loss


def products(split: str, count: int | None, seed: int, *, most: int = 12) -> list[dict[str, str]]:
    """A data set: products of two numbers. Rows are like the lines of a JSONL file; no product is in both splits."""
    pairs = [(a, b) for a in range(2, most + 1) for b in range(2, most + 1) if (a + b) % 4 == 0]
    if split == "train":
        pairs = [(a, b) for a in range(2, most + 1) for b in range(2, most + 1) if (a + b) % 4 != 0]
    random.Random(f"{seed} {split}").shuffle(pairs)
    return [{"question": f"What is {a} times {b}?", "answer": str(a * b)} for a, b in pairs[:count]]


def humaneval(split: str, count: int | None, seed: int, *, path: str) -> list[dict[str, Any]]:
    """A data set from a file in another form: HumanEval.jsonl.gz, whose rows have a prompt and a test."""
    ask = "Complete this Python function. Answer with the whole function in a ```python block."
    with gzip.open(path) as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count)]
    return [{"id": row["task_id"], "question": f"{ask}\n\n```python\n{row['prompt'].strip()}\n```", "kind": "code",
             "answer": {key: row[key] for key in ("prompt", "entry_point", "test")}} for row in rows]


def tables(seed: int, step: int, *, most: int = 12) -> Iterator[tuple[str, str]]:
    """A corpus: lines of multiplication tables. The documents of a step depend only on the seed and the step."""
    rng = random.Random(f"{seed} {step}")
    while True:
        a, b = rng.randint(2, most), rng.randint(2, most)
        yield f"{a} times {b}", f" is {a * b}."
