"""Top-p sampling: the ratio of policy and sampler is 1 if the policy is scored over the tokens that sampling kept.

    python examples/sampling_mask_replay.py                       # a tiny random model
    python examples/sampling_mask_replay.py --model Qwen/Qwen3-0.6B --top-p 0.9 --device cuda

Sampler and policy have the same weights, so every ratio should be 1. Scored over the whole vocabulary, the ratio is the
probability of the tokens that sampling kept, and the clipped loss starts with a bias. docs/sampling.md explains this.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import Tensor

import r1kernels


def tiny_model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0)
    return transformers.LlamaForCausalLM(config)


@torch.no_grad()
def sample(
    model: transformers.PreTrainedModel, ids: Tensor, length: int, top_p: float, temperature: float
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """(ids with `length` new tokens, log-probs (B, length) of the sampler, the ids that it kept for each new token)."""
    logprobs, kept = [], []
    for _ in range(length):
        hidden = model.base_model(ids).last_hidden_state[:, -1]
        logits = r1kernels.linear_logits(hidden, model.lm_head.weight, temperature=temperature)
        p, order = logits.softmax(-1).sort(descending=True)
        inside = p.cumsum(-1) - p < top_p  # the likeliest tokens, until their sum reaches top_p
        p = p * inside
        place = p.multinomial(1)
        logprobs.append((p.gather(-1, place)[:, 0] / p.sum(-1)).log())
        kept.append([row[mask] for row, mask in zip(order, inside, strict=True)])
        ids = torch.cat([ids, order.gather(-1, place)], 1)
    return ids, torch.stack(logprobs, 1), kept


def support_of(kept: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """The sets as `support` expects them: ids one after another, sequence by sequence, and where each set begins."""
    sets = [kept[step][row] for row in range(len(kept[0])) for step in range(len(kept))]
    sizes = torch.tensor([0, *map(len, sets)], device=sets[0].device)
    return torch.cat(sets), sizes.cumsum(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model of transformers; by default, a tiny random one")
    parser.add_argument("--top-p", type=float, default=0.7)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model) if options.model else tiny_model()
    model, prompts = model.to(options.device), torch.arange(1, 25, device=options.device).reshape(8, 3)
    ids, old_logprobs, kept = sample(model, prompts, 16, options.top_p, options.temperature)

    start, completions = prompts.shape[1], ids[:, prompts.shape[1]:]
    hidden = model.base_model(ids).last_hidden_state[:, start - 1 : -1]  # row t scores token t + 1
    advantages = torch.randn(len(ids), device=options.device)
    ratios = {}
    for name, sets in {"the whole vocabulary": None, "what sampling kept": support_of(kept)}.items():
        given = {"temperature": options.temperature, "support": sets}
        new = r1kernels.linear_token_logprobs(hidden, model.lm_head.weight, completions, **given).detach()
        ratios[name] = ratio = (new - old_logprobs).exp()
        loss, metrics = r1kernels.linear_grpo_loss(
            hidden, model.lm_head.weight, completions, advantages, old_logprobs=old_logprobs, **given)
        print(f"scored over {name}: ratio {ratio.min():.4f} to {ratio.max():.4f}, mean {ratio.mean():.4f}; "
              f"{metrics['clip_fraction']:.0%} of tokens are clipped before any update")
