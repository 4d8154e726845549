"""Supervised fine-tuning with the Trainer of transformers: one line, and the loss needs no tensor of logits.

    python examples/transformers_sft.py                           # a tiny random model learns to count
    python examples/transformers_sft.py --model Qwen/Qwen3-0.6B --text FILE --out runs/sft

FILE has one text in each line. Everything but `apply_to` is the Trainer as you know it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from r1kernels.integrations.transformers import apply_to

Rows = list[dict[str, list[int]]]


def tiny_model() -> tuple[transformers.PreTrainedModel, Rows]:
    """A model of 64 token ids, and sequences that count from each of them."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ids = [[(start + step) % 64 for step in range(12)] for start in range(64)]
    return transformers.LlamaForCausalLM(config), [{"input_ids": row, "labels": row} for row in ids]


def real_model(name: str, text: Path) -> tuple[transformers.PreTrainedModel, Rows]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    ids = [tokenizer(line, truncation=True, max_length=1024)["input_ids"] for line in text.read_text().splitlines()]
    return (transformers.AutoModelForCausalLM.from_pretrained(name),
            [{"input_ids": [*row, tokenizer.eos_token_id], "labels": [*row, tokenizer.eos_token_id]} for row in ids])


def pad(rows: Rows) -> dict[str, torch.Tensor]:
    """A batch. Labels of -100 are not scored, and the model shifts labels by itself."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
            for name, value in fill.items()}


def train(model: transformers.PreTrainedModel, rows: Rows, out: str, **settings: object) -> list[float]:
    """The losses that the Trainer logged."""
    apply_to(model)  # the line: model(..., labels=...).loss now comes from hidden states
    arguments = transformers.TrainingArguments(
        out, per_device_train_batch_size=8, gradient_accumulation_steps=2, save_strategy="no", report_to=[],
        logging_steps=0.1, **settings)  # ten times in the whole run
    trainer = transformers.Trainer(model, arguments, data_collator=pad, train_dataset=rows)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model of transformers; by default, a tiny random one")
    parser.add_argument("--text", type=Path, help="a file with a text in each line, for a model that you name")
    parser.add_argument("--out", default="runs/sft", help="the Trainer's directory")
    options = parser.parse_args()
    transformers.set_seed(0)
    model, rows = real_model(options.model, options.text) if options.model else tiny_model()
    settings = {"learning_rate": 1e-5} if options.model else {"learning_rate": 1e-2, "max_steps": 40, "use_cpu": True}
    losses = train(model, rows, options.out, **settings)
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at the end")
