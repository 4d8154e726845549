"""A LightningModule that fine-tunes a model of transformers without its logits.

    pip install lightning
    python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from r1kernels.integrations.transformers import apply_to, token_logprobs


class FineTuning(lightning.LightningModule):
    """Batches are dicts with input_ids, labels and, if rows are padded, attention_mask."""

    def __init__(self, model: transformers.PreTrainedModel, learning_rate: float = 1e-5) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def configure_model(self) -> None:
        """Here, before a strategy wraps the model. Lightning calls it again for validation."""
        if not hasattr(self, "applied"):
            self.applied = apply_to(self.model)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logprobs = token_logprobs(self.model, labels, **inputs)
        self.log("perplexity", (-logprobs.sum() / (labels != -100).sum()).exp())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main(steps: int = 20, **arguments: Any) -> dict[str, float]:
    """What Lightning logged last, for a tiny model that learns sequences of numbers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    rows = [(torch.arange(16) + start) % 64 for start in range(64)]
    data = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=8)
    trainer = lightning.Trainer(
        max_steps=steps, accumulate_grad_batches=2, logger=False, enable_checkpointing=False, **arguments)
    trainer.fit(FineTuning(transformers.LlamaForCausalLM(config), learning_rate=1e-2), data, data)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
