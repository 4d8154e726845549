"""Every block of code in docs/migrate/trl.md runs, in its order."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from trl_cases import answers, lengths, make_trainer

from r1kernels.integrations import trl as adapter

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # TRL's own
PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrate" / "trl.md"


def test_the_code_of_the_page_runs(tmp_path: Any) -> None:
    trainer = make_trainer("GRPO", tmp_path, max_steps=1)
    before = adapter.checked_utils(False)._ChunkedLogProbFunction
    names = {"trainer": trainer, "model": trainer.model, "args": trainer.args, "tokenizer": trainer.processing_class,
             "train_dataset": trainer.train_dataset, "reward_funcs": [lengths, answers]}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        exec(compile(block, PAGE.name, "exec"), names)
        hook = adapter.checked_utils(False)._ChunkedLogProbFunction
        assert (hook is adapter.LogProbs) == (number == 0) and (number == 0 or hook is before)
    assert adapter.checked_utils(False)._ChunkedLogProbFunction is before
    assert names["trainer"].state.global_step == 1 and isinstance(names["trainer"], adapter.R1GRPOTrainer)
    assert issubclass(names["MyFasterTrainer"], adapter.R1GRPOMixin)


def test_the_loss_has_no_new_options() -> None:
    """A new option of TRL's loss has to be looked at: `_compute_loss` reads no more of a trainer than in 1.16."""
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    assert set(re.findall(r"self\.args\.(\w+)", source)) == {
        "delta", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target",
        "sapo_temperature_neg", "sapo_temperature_pos", "steps_per_generation", "use_bias_correction_kl",
        "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos",
    }
    assert set(re.findall(r"self\.(\w+)", source)) - {"args"} == READ


READ = {
    "_entropy_bonus_enabled", "_entropy_window_stats", "_get_per_token_logps_and_entropies", "_last_world_entropy",
    "_metrics", "accelerator", "aux_loss_enabled", "beta", "current_gradient_accumulation_steps", "entropy_coef",
    "epsilon_high", "epsilon_low", "get_gamma_weights", "get_high_entropy_mask", "get_off_policy_mask",
    "importance_sampling_level", "loss_type", "max_completion_length", "model", "off_policy_mask_threshold",
    "router_aux_loss_coef", "top_entropy_quantile", "use_adaptive_entropy", "use_vllm",
    "vllm_importance_sampling_correction",
}
