"""Distillation from the hidden states of a teacher and a narrower student: no tensor of logits of either model.

    python examples/distill_hidden_states.py                      # two tiny random models
    python examples/distill_hidden_states.py --teacher Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B --text FILE

Both models have the same vocabulary, and the loss compares all of it. Logits of a few rows at a time are in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from torch import Tensor

import r1kernels

VOCAB = 256


def tiny_model(width: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.1)
    return transformers.LlamaForCausalLM(config)


def distill(
    teacher: transformers.PreTrainedModel, student: transformers.PreTrainedModel, batches: list[dict[str, Tensor]],
    steps: int, divergence: str, learning_rate: float,
) -> list[float]:
    """The loss of each step, in nats a token."""
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    history = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            seen = teacher.base_model(**batch).last_hidden_state
        hidden = student.base_model(**batch).last_hidden_state
        loss, _ = r1kernels.linear_distillation_loss(
            hidden, student.lm_head.weight, seen, teacher.lm_head.weight, mask=batch.get("attention_mask"),
            divergence=divergence)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="a model of transformers; by default, a tiny random one")
    parser.add_argument("--student", help="a model with the teacher's vocabulary; by default, a tiny random one")
    parser.add_argument("--text", type=Path, help="a file with a text in each line, for models that you name")
    parser.add_argument("--divergence", default="forward_kl", choices=["forward_kl", "reverse_kl", "jsd"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.teacher:
        teacher, student = (transformers.AutoModelForCausalLM.from_pretrained(name).to(options.device)
                            for name in (options.teacher, options.student))
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.teacher)
        lines = options.text.read_text().splitlines()
        form = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 512}
        batches = [tokenizer(lines[i : i + 8], return_token_type_ids=False, **form).to(options.device)
                   for i in range(0, len(lines), 8)]
    else:
        teacher, student = tiny_model(48), tiny_model(24)
        batches = [{"input_ids": torch.randint(VOCAB, (8, 16))} for _ in range(8)]
    rate = 1e-5 if options.teacher else 1e-2
    history = distill(teacher, student, batches, options.steps, options.divergence, rate)
    for step, loss in enumerate(history, 1):
        print(f"step {step}: {options.divergence} {loss:.4f}")
