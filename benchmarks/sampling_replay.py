"""The bias of importance ratios under top-p sampling, with and without sampling replay, on a real model.

    PYTHONPATH=.:benchmarks python benchmarks/sampling_replay.py MODEL [--top-p 0.8 0.95] [--completions 8]

The sampler and the policy have the same weights in bfloat16. The ratio of a token is the policy's probability over the
sampler's: with replay both are over the tokens that sampling kept, without it the policy's is over the whole
vocabulary. They are compared before any update and after one step of AdamW on these completions, whose advantages are
random. First, log-probs over the sets are checked against float64. Writes sampling_replay.json to the results of this
device; docs/make_numbers.py makes the table and the picture of docs/sampling.md from the committed file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import saving
import torch
import transformers
from torch import Tensor

import r1kernels
from r1kernels.train.model import head_of, load_model, load_tokenizer, round_parameters
from r1kernels.train.packing import micro_batches
from r1kernels.train.parallel import mesh
from r1kernels.train.policy import Policy, make_optimizer
from r1kernels.train.rollout import Completions, Sampling, TransformersSampler
from r1kernels.train.update import (
    Rollout,
    completion_hidden_states,
    completion_logprobs,
    minibatch_gradient,
    optimizer_step,
)

QUESTIONS = (
    "Why is the sky blue?", "What is 17 + 25?", "Write a short poem about the sea.", "How do vaccines work?",
    "Name three uses of copper.", "Explain recursion to a child.", "What causes tides?", "Give me a recipe for soup.",
    "Who was Ada Lovelace?", "How far away is the moon?", "Translate 'good morning' into French.",
    "What is a prime number?", "Why do leaves fall in autumn?", "Describe a day in Rome.", "How do bicycles stay up?",
    "What would you pack for a hike?")
TEMPERATURE, NEW_TOKENS, LEARNING_RATE, MICRO_BATCH_TOKENS = 1.0, 64, 1e-6, 4096
BINS = torch.linspace(0.4, 1.4, 101)


def summary(trained: Tensor, sampled: Tensor) -> dict[str, float]:
    """How the ratios of tokens (N,) are spread."""
    ratio = (trained.double() - sampled.double()).exp()
    outside = (ratio < 0.9) | (ratio > 1.1)
    return {"mean_ratio": ratio.mean().item(), "outside_0.9_1.1": outside.double().mean().item(),
            "lowest": ratio.min().item(), "highest": ratio.max().item(),
            "mean_abs_log_ratio": ratio.log().abs().mean().item()}


@torch.no_grad()
def largest_error(policy: Policy, done: Completions, rows: Tensor) -> float:
    """The largest error of log-probs over the sets, against float64 from the same hidden states."""
    batch = done.rows(rows)

    def errors(model: Any, batch: Completions) -> Tensor:
        hidden, head = completion_hidden_states(model, batch), head_of(model)
        tokens, (ids, offsets) = batch.token_ids[batch.mask], batch.support
        found = r1kernels.linear_token_logprobs(
            hidden, token_ids=tokens, temperature=TEMPERATURE, support=(ids, offsets), **head)
        logits = hidden.double() @ head["weight"].double().T / TEMPERATURE
        exact = [line[token] - line[kept.long()].logsumexp(-1)
                 for line, token, kept in zip(logits, tokens, ids.split(offsets.diff().tolist()), strict=True)]
        return (found.double() - torch.stack(exact)).abs().max()

    return policy(errors, batch).item()


def compare(model: Any, tokenizer: Any, prompts: list[str], top_p: float) -> dict[str, Any]:
    """The numbers of one top-p, with and without replay."""
    sampler = TransformersSampler(round_parameters(copy.deepcopy(model), torch.bfloat16), tokenizer)
    done = sampler.sample(prompts, Sampling(TEMPERATURE, NEW_TOKENS, top_p, batch_size=64, replay=True))
    sizes = torch.cat([counts for _, counts in done.supports]).double()
    result: dict[str, Any] = {
        "top_p": top_p, "temperature": TEMPERATURE, "tokens": int(done.mask.sum()), "mean_set": sizes.mean().item(),
        "largest_set": int(sizes.max())}
    order = torch.arange(len(prompts))
    places = micro_batches((done.prompt_mask.sum(-1) + done.mask.sum(-1)).tolist(), MICRO_BATCH_TOKENS, 1)[0]
    batches = [order[part] for part in places]
    advantages = torch.randn(len(prompts), generator=torch.Generator().manual_seed(0))
    for name, seen in (("replay", done), ("whole vocabulary", dataclasses.replace(done, supports=None))):
        policy = Policy(copy.deepcopy(model), mesh("cpu"), torch.bfloat16)
        if name == "replay":
            error = largest_error(policy, done, order[:8])
            if not error < 1e-3:
                raise SystemExit(f"log-probs over the sets differ from float64 by {error:.2g}, expected less than 1e-3")
            result["largest_error"] = error
        old = completion_logprobs(policy, seen, batches, TEMPERATURE, "packed")
        rollout = Rollout(seen.prompt_ids, seen.prompt_mask, seen.token_ids, seen.mask, advantages=advantages,
                          old_logprobs=old, ref_logprobs=None, importance_weights=None, supports=seen.supports)
        optimizer = make_optimizer(policy, "fp32", lr=LEARNING_RATE, weight_decay=0.0)
        metrics = minibatch_gradient(
            policy, rollout, order, batches, r1kernels.objectives.grpo(), TEMPERATURE, "packed")
        optimizer_step(policy, optimizer, metrics["loss"], LEARNING_RATE, 1.0, name)
        new = completion_logprobs(policy, seen, batches, TEMPERATURE, "packed")
        before, sampled, after = (part[done.mask] for part in (old, done.logprobs, new))
        ratio = (before - sampled).exp().clamp(BINS[0], BINS[-1])
        result[name] = {"first_ratio_deviation": metrics["ratio_deviation"], "before": summary(before, sampled),
                        "after one step": summary(after, sampled),
                        "tokens_by_ratio": torch.histogram(ratio, BINS)[0].int().tolist()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.8, 0.95])
    parser.add_argument("--completions", type=int, default=8, help="of each question")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                             add_generation_prompt=True)
               for question in QUESTIONS for _ in range(given.completions)]
    results = []
    for top_p in given.top_p:
        results.append(compare(model, tokenizer, prompts, top_p))
        print(json.dumps(results[-1]), flush=True)
    folder = saving.save([{"op": "sampling_replay", "model": Path(given.model).name, "dtype": "bfloat16",
                           "transformers": transformers.__version__,
                           "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), **result}
                          for result in results])
    print(f"{folder}/sampling_replay.json")


if __name__ == "__main__":
    main()
