"""A real model takes three GRPO steps with TRL, alone, with patch_trl() and in one pass. `make test-real` runs it."""

import os
from typing import Any

import pytest
import torch

from r1kernels import rewards
from r1kernels.integrations.trl import R1GRPOTrainer, patch_trl

MODEL = os.environ.get("R1KERNELS_REAL_MODEL")
trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = [
    pytest.mark.skipif(not MODEL, reason="needs a real model: run `make test-real`"),
    pytest.mark.filterwarnings("default"),  # TRL's own
]


def lengths(completions: list[Any], **_: Any) -> list[float]:
    return [len(completion[0]["content"]) / 100 for completion in completions]


def trained(kind: type, directory: Any) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, float]]]:
    """(the head before, and after, what was logged in each step)."""
    import datasets

    rows = [{"prompt": [{"role": "user", "content": f"What is {n} + {n}? <think>"}]} for n in range(8)]
    arguments = trl.GRPOConfig(
        output_dir=str(directory), max_steps=3, per_device_train_batch_size=4, num_generations=4, report_to=[],
        max_completion_length=16, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, logging_steps=1,
        learning_rate=1e-5, beta=0.02, loss_type="dapo", seed=1, model_init_kwargs={"dtype": "float32"})
    trainer = kind(model=MODEL, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
                   reward_funcs=[lengths, rewards.format])
    weight = trainer.model.get_output_embeddings().weight
    before = weight.detach().clone()
    trainer.train()
    return before, weight.detach().clone(), [line for line in trainer.state.log_history if "kl" in line]


def test_three_steps_of_grpo(tmp_path: Any) -> None:
    before, theirs, log = trained(trl.GRPOTrainer, tmp_path / "trl")
    with patch_trl():
        _, ours, patched = trained(trl.GRPOTrainer, tmp_path / "patched")
    _, one_pass, lines = trained(R1GRPOTrainer, tmp_path / "one_pass")
    assert len(log) == len(patched) == len(lines) == 3
    moved = (theirs - before).norm()
    assert moved > 0
    for found, logged in ((ours, patched), (one_pass, lines)):
        # Adam's first steps have the size of the learning rate, whatever that of a gradient near 0, which rounding
        # decides about.
        assert (found - theirs).norm() <= 0.1 * moved
        for line, wanted in zip(logged, log, strict=True):
            for name in ("loss", "grad_norm", "kl", "entropy", "reward", "clip_ratio/region_mean"):
                assert float(line[name]) == pytest.approx(float(wanted[name]), rel=0.02, abs=1e-3), name
