"""LoRA: adapters are trained, the reference is free, and what is saved is a plain model."""

import pytest
import torch
from rl_cases import StopAfter, equal, make_model, make_tokenizer, outcome, policy_of, stage_of
from transformers import AutoModelForCausalLM

from r1kernels.train.checkpoint import MODEL, latest_checkpoint
from r1kernels.train.errors import ConfigError, Interrupted
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.lora import add_adapters, without_adapters
from r1kernels.train.recipe import Lora

pytest.importorskip("peft", reason="adapters need the package peft")
# peft asks transformers for a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
LORA = "lora={r: 2, alpha: 8}"
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))



@torch.no_grad()
def test_adapters_begin_without_effect_and_alone_are_trained():
    settings, found = Lora(r=3, alpha=6.0, target_modules=["q_proj", "down_proj"]), []
    logits = make_model(make_tokenizer(), num_hidden_layers=2)(IDS).logits
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        model = make_model(make_tokenizer(), num_hidden_layers=2)
        add_adapters(model, settings, 5, dtype)
        assert not any(module.training for module in model.modules())
        assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {dtype}
        assert dtype is torch.bfloat16 or torch.equal(model(IDS).logits, logits)
        found.append({name: weight.full_tensor() for name, weight in policy_of(model, dtype).trained().items()})
    assert equal(found[0], found[1]) and equal(found[0], found[2]) and len(found[0]) == 8
    assert all(".lora_" in name and weight.dtype is torch.float32 for name, weight in found[0].items())


@torch.no_grad()
def logits(policy):
    return policy(lambda model: model(IDS).logits)


def test_the_reference_is_the_model_without_its_adapters(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path, [LORA, "steps=1"]))
    plain = make_model(make_tokenizer(), end_scale=1.5)(IDS).logits
    trainer.run()
    assert trainer.reference is None
    policy = logits(trainer.policy)
    with without_adapters(trainer.policy):
        assert torch.equal(logits(trainer.policy), plain)
    assert torch.equal(logits(trainer.policy), policy) and not torch.equal(policy, plain)


def test_reference_log_probs_of_a_rollout_are_those_without_adapters(tmp_path):
    stage = stage_of(tmp_path, [LORA, "steps=1"])
    trainer = GRPOTrainer(stage)
    trainer.run()
    trainer.scorer = stage.scorer(trainer.settings.rewards)
    rollout, _ = trainer.roll_out()
    assert rollout.prompt_mask.all()
    ids, first = torch.cat([rollout.prompt_ids, rollout.token_ids], dim=1), rollout.prompt_ids.shape[1]
    with torch.no_grad():
        plain = make_model(make_tokenizer(), end_scale=1.5)(ids).logits[:, first - 1 : -1].log_softmax(-1)
    expected = plain.gather(-1, rollout.token_ids[..., None])[..., 0]
    mask = rollout.mask
    torch.testing.assert_close(rollout.ref_logprobs[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() > 1e-3


def test_a_reference_that_changes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'ref_refresh_every' is 2; .* the 3 'steps'"):
        stage_of(tmp_path, [LORA]).check()
    stage_of(tmp_path, [LORA, "ref_refresh_every=3"]).check()
    stage_of(tmp_path, [LORA, "objective={preset: dapo}"]).check()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_is_a_plain_model_with_the_adapters_merged(tmp_path, precision):
    stage = stage_of(tmp_path, [LORA, "steps=2", f".precision={precision}"])
    trainer = GRPOTrainer(stage)
    trainer.run()
    saved = AutoModelForCausalLM.from_pretrained(latest_checkpoint(stage.directory) / MODEL)
    assert saved.dtype is torch.float32 and saved.lm_head.weight is saved.model.embed_tokens.weight
    assert not any("lora" in name or "base_layer" in name for name in saved.state_dict())
    # peft itself, on the same weights in float32.
    model = make_model(make_tokenizer(), end_scale=1.5)
    add_adapters(model, stage.settings.lora, 0, torch.float32)
    for name, weight in trainer.policy.shards().items():
        model.get_parameter(name.removeprefix("model.")).data = weight.full_tensor().float()
    with torch.no_grad():
        torch.testing.assert_close(saved(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.long(reason="test_grpo and test_resume stop runs again and again too")
@pytest.mark.few(1)
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
    adapters = whole["shards"]["adapters"]
    assert adapters and all(weight.dtype is torch.float32 for weight in adapters.values())
    assert whole["metrics"][1]["kl"] > 0 and whole["metrics"][0]["first_ratio_deviation"] <= 1e-6


def test_without_peft_or_layers_it_says_so(tmp_path, monkeypatch):
    stage = stage_of(tmp_path, ["lora.target_modules=[nothing]"])
    with pytest.raises(ConfigError, match=r"lora\.target_modules.*nothing"):
        GRPOTrainer(stage)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="peft"):
        stage.check()
