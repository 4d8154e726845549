"""The code of the page for those who come from transformers runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import host_code
from causal_models import batch, build
from test_trl_rewards import tiny_model_and_tokenizer

import r1kernels

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from r1kernels.integrations.transformers import compute_loss_func  # noqa: E402

pytestmark = [host_code, pytest.mark.filterwarnings("default")]  # those of transformers

ROOT = Path(__file__).parents[2]


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.loss.loss_utils import LOSS_MAPPING

    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", LOSS_MAPPING["ForCausalLM"])  # put back at the end
    page = ROOT / "docs/migrate/transformers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 3
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    names: dict[str, Any] = {
        "torch": torch, "transformers": transformers, "r1kernels": r1kernels, "model": build(), **batch(),
        "training_arguments": arguments, "rows": [{name: row[0] for name, row in batch().items()}] * 4,
        "collate": transformers.default_data_collator, "advantages": torch.tensor([1.0, -1.0]),
    }
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert names["trainer"].state.global_step == 2 and names["metrics"]["entropy"] > 0
    assert "_r1kernels_settings" not in vars(names["model"])


def test_the_loss_function_in_trl(tmp_path: Path) -> None:
    """SFTTrainer has a head of its own for its loss, except with `compute_loss_func`."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    trained = []
    for loss in (None, compute_loss_func):
        model, tokenizer = tiny_model_and_tokenizer()
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, optim="sgd", report_to=[], use_cpu=True,
            bf16=False, save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2, max_grad_norm=0.0)
        rows = datasets.Dataset.from_list([{"text": "1 + 1 = 2"}, {"text": "so so"}] * 24)
        start = model.lm_head.weight.detach().clone()
        trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer,
                       compute_loss_func=loss).train()
        assert (model.lm_head.weight - start).abs().max() > 1e-3
        trained.append(dict(model.named_parameters()))
    torch.testing.assert_close(*trained)


def test_every_public_name_is_on_the_page() -> None:
    page = (ROOT / "docs/migrate/transformers.md").read_text()
    for name in ("apply_to", "undo", "token_logprobs", "token_logprobs_and_entropy", "for_causal_lm_loss",
                 "compute_loss_func", "label_smoothing", "z_loss_coef", "chunk_bytes", "in_eval"):
        assert name in page, name
