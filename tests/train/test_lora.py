"""LoRA: adapters are trained, the reference is free, and what is saved is a plain model."""

import pytest
import torch
from rl_cases import StopAfter, equal, make_model, make_tokenizer, outcome, stage_of
from transformers import AutoModelForCausalLM

from r1kernels.train.checkpoint import MODEL, latest_checkpoint
from r1kernels.train.errors import ConfigError, Interrupted
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.lora import AdapterReference, add_adapters, trained_weights
from r1kernels.train.recipe import Lora

pytest.importorskip("peft", reason="adapters need the package peft")
# peft asks transformers for a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
LORA = "lora={r: 2, alpha: 8}"
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))



@torch.no_grad()
def test_adapters_begin_without_effect_and_alone_are_trained():
    model, found = make_model(make_tokenizer(), num_hidden_layers=2), []
    logits = model(IDS).logits
    for _ in range(2):
        model = make_model(make_tokenizer(), num_hidden_layers=2)
        add_adapters(model, Lora(r=3, alpha=6.0, target_modules=["q_proj", "down_proj"]), seed=5)
        assert torch.equal(model(IDS).logits, logits) and not any(module.training for module in model.modules())
        found.append(trained_weights(model))
    assert equal(*found) and len(found[0]) == 8 and all(".lora_" in name for name in found[0])


def test_the_reference_is_the_model_without_its_adapters(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path, [LORA, "steps=1"]))
    plain = make_model(make_tokenizer(), end_scale=1.5)(IDS).logits
    trainer.run()
    assert isinstance(trainer.reference, AdapterReference)
    policy = trainer.model(IDS).logits
    with trainer.reference.in_place() as model, torch.no_grad():
        assert model is trainer.model and torch.equal(model(IDS).logits, plain)
    assert torch.equal(trainer.model(IDS).logits, policy) and not torch.equal(policy, plain)
    trainer.reference.load_state_dict(trainer.model.state_dict())  # a refresh
    with trainer.reference.in_place() as model:
        assert torch.equal(model(IDS).logits, policy)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_is_a_plain_model_with_the_adapters_merged(tmp_path, precision):
    stage = stage_of(tmp_path, [LORA, "steps=2", f".precision={precision}"])
    trainer = GRPOTrainer(stage)
    trainer.run()
    saved = AutoModelForCausalLM.from_pretrained(latest_checkpoint(stage.directory) / MODEL)
    assert saved.dtype is torch.float32 and saved.lm_head.weight is saved.model.embed_tokens.weight
    assert not any("lora" in name or "base_layer" in name for name in saved.state_dict())
    with torch.no_grad(), trainer.optimizer.float32_model():
        expected = trainer.model.float()(IDS).logits
        torch.testing.assert_close(saved(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_again_and_again_it_ends_the_same(tmp_path, precision):
    options = [LORA, f".precision={precision}"]
    GRPOTrainer(stage_of(tmp_path / "whole", options)).run()
    whole, stops = outcome(tmp_path / "whole" / "run" / "rl"), 0
    while True:
        try:
            GRPOTrainer(stage_of(tmp_path / "cut", options, interrupt=StopAfter(23))).run()
            break
        except Interrupted:
            stops += 1
    found = outcome(tmp_path / "cut" / "run" / "rl")
    assert stops > 2 and [name for name in whole if not equal(whole[name], found[name])] == []
    adapters = whole["state"]["adapters"]
    assert adapters and all(weight.dtype is torch.float32 for weight in adapters.values())
    assert whole["metrics"][1]["kl"] > 0 and whole["metrics"][0]["first_ratio_deviation"] <= 1e-6


def test_without_peft_or_layers_it_says_so(tmp_path, monkeypatch):
    stage = stage_of(tmp_path, ["lora.target_modules=[nothing]"])
    with pytest.raises(ConfigError, match=r"lora\.target_modules.*nothing"):
        GRPOTrainer(stage)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="peft"):
        stage.check()
