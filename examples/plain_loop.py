"""GRPO in a plain PyTorch loop, with a model of transformers that computes no logits in training.

    python examples/plain_loop.py                        # a tiny random model
    python examples/plain_loop.py --model Qwen/Qwen3-0.6B --device cuda

The reward is a toy: the share of a completion that is one given token. Put your own in `reward`.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import Tensor

import r1kernels
from r1kernels.integrations.transformers import apply_to, token_logprobs_and_entropy

OBJECTIVE = r1kernels.objectives.grpo(kl_coef=0.0, entropy_coef=0.01)


def tiny_model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=None, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def reward(completions: Tensor) -> Tensor:
    return (completions == 7).float().mean(-1)


def train(
    model: transformers.PreTrainedModel, steps: int, *, group_size: int = 16, length: int = 12, updates: int = 2,
    learning_rate: float = 1e-2,
) -> list[float]:
    """The mean reward of each step."""
    apply_to(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]], device=model.device)
    ends = model.generation_config.eos_token_id  # an id, several, or None
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=model.device)
    history = []
    for _ in range(steps):
        with torch.no_grad():
            ids = model.generate(prompts.repeat_interleave(group_size, 0), do_sample=True, top_k=0,
                                 max_new_tokens=length, pad_token_id=0)
        completions = ids[:, prompts.shape[1]:]
        rewards = reward(completions)
        advantages = r1kernels.group_advantages(rewards, group_size)
        # Row t of the logits scores token t + 1. Not scored: the prompt, and padding after the end of a sequence.
        is_end = torch.isin(completions, ends).int()
        scored = completions.masked_fill(is_end.cumsum(-1) - is_end > 0, -100)
        targets = torch.nn.functional.pad(scored, (prompts.shape[1] - 1, 1), value=-100)
        old_logprobs = None
        for _ in range(updates):
            logprobs, entropy = token_logprobs_and_entropy(model, targets, input_ids=ids)
            old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
            loss, _ = r1kernels.policy_loss(logprobs, advantages, old_logprobs=old_logprobs, entropy=entropy,
                                            mask=targets != -100, objective=OBJECTIVE)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append(rewards.mean().item())
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model of transformers; by default, a tiny random one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    chosen = transformers.AutoModelForCausalLM.from_pretrained(options.model) if options.model else tiny_model()
    rates = {"learning_rate": 1e-6} if options.model else {}
    for step, mean in enumerate(train(chosen.to(options.device), options.steps, **rates), 1):
        print(f"step {step}: mean reward {mean:.3f}")
