"""Models that compute in bfloat16 and train float32 weights."""

import dataclasses
import json

import pytest
import torch
from rl_cases import StopAfter, equal, make_model, make_tokenizer, outcome, stage_of
from safetensors.torch import load_file

import r1kernels
from r1kernels.train import recipe as recipes
from r1kernels.train.errors import Interrupted
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.model import hidden_states, load_model
from r1kernels.train.precision import AdamW, round_parameters
from r1kernels.train.recipe_file import build_recipe
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rollout import Sampling, TransformersSampler
from r1kernels.train.update import Rollout, completion_logprobs, minibatch_gradient

PROMPTS = ["Compute 3+4", "Compute 1+2+3+4+5+6", "Compute 9+9+9"] * 4


def recipe(**settings):
    data = {"sums": {"kind": "jsonl", "path": "a", "test_path": "b"}}
    return build_recipe({"run_dir": "x", "data": data, "stages": {"base": {"kind": "model", "path": "x"}}, **settings})


@pytest.mark.parametrize("fast", [True, False])
def test_precision_follows_the_device_unless_it_is_given(fast, monkeypatch):
    asked = []
    monkeypatch.setattr(recipes, "has_fast_bf16", lambda device: asked.append(device) or fast)
    assert recipe(device="cuda:1").dtype is (torch.bfloat16 if fast else torch.float32)
    assert asked == ["cuda:1"]
    assert recipe(precision="fp32").dtype is torch.float32 and recipe(precision="bf16").dtype is torch.bfloat16


def test_a_cpu_has_fast_bf16_by_its_instruction_set(monkeypatch):
    from r1kernels import _library

    for isa, fast in {"amx_bf16": True, "avx512_bf16": True, "avx512": False, "avx2": False, "baseline": False}.items():
        extension = type("Extension", (), {"cpu_isa": staticmethod(lambda isa=isa: isa)})
        monkeypatch.setattr(_library, "extension", extension)
        assert r1kernels.has_fast_bf16("cpu") is fast
    monkeypatch.setattr(_library, "extension", None)
    assert not r1kernels.has_fast_bf16("cpu") and not r1kernels.has_fast_bf16("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not r1kernels.has_fast_bf16("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, fast in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert r1kernels.has_fast_bf16("cuda:0") is (fast or torch.version.hip is not None)


def test_small_updates_are_kept_and_gradients_are_summed_in_float32():
    """An update of 1e-5 is far below the rounding of a bfloat16 weight, and a term of 1e-3 below that of a sum."""
    layer = torch.nn.Linear(4, 3)
    exact = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = AdamW(layer, torch.bfloat16, lr=1e-5, weight_decay=0.0)
    weights = optimizer.param_groups[0]["params"]
    plain = [torch.nn.Parameter(values.clone()) for values in exact]
    expected = torch.optim.AdamW(plain, lr=1e-5, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        sums = [torch.zeros_like(values) for values in exact]
        for factor in (1.0, 1e-3, 1e-3, 1e-3):
            gradients = torch.autograd.grad(layer(torch.ones(2, 4).bfloat16()).float().sum() * factor,
                                            list(layer.parameters()))
            (layer(torch.ones(2, 4).bfloat16()).float().sum() * factor).backward()
            sums = [total + gradient.float() for total, gradient in zip(sums, gradients, strict=True)]
        for weight, parameter, total in zip(weights, plain, sums, strict=True):
            assert weight.grad.dtype is torch.float32 and torch.equal(weight.grad, total)
            parameter.grad = total
        optimizer.step()
        expected.step()
    for weight, parameter, copy, before in zip(weights, plain, layer.parameters(), exact, strict=True):
        assert torch.equal(weight, parameter) and (weight - before).abs().max() > 2e-5
        assert copy.grad is None and torch.equal(copy, weight.bfloat16())


def test_in_fp32_it_is_the_optimizer_of_torch():
    ours, theirs = (torch.nn.Linear(4, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for layer, optimizer in ((ours, AdamW(ours, torch.float32, lr=0.1)),
                             (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1))):
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_buffers_and_what_transformers_keeps_in_float32_are_not_rounded():
    model = make_model(make_tokenizer())
    model._keep_in_fp32_modules_strict = {"norm", "down_proj"}
    round_parameters(model, torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.float32}
    assert kept == {"model.norm.weight", "model.layers.0.mlp.down_proj.weight"}
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_for_a_checkpoint_the_model_has_its_float32_weights(tmp_path):
    model = make_model(make_tokenizer())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = AdamW(model, torch.bfloat16)
    with optimizer.float32_model():
        model.save_pretrained(tmp_path)
    assert model.dtype is torch.bfloat16 and json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    saved = load_file(tmp_path / "model.safetensors")
    assert all(value.dtype is torch.float32 and torch.equal(value, before[name]) for name, value in saved.items())
    hidden_states(model, input_ids=torch.ones(1, 3, dtype=torch.long)).sum().backward()  # gradients still arrive
    assert optimizer.param_groups[0]["params"][0].grad.abs().max() > 0
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert equal(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("preset", ["grpo", "r1"])
def test_the_first_ratio_is_one_in_bf16(preset):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden_size=64, num_hidden_layers=2)
    AdamW(model, torch.bfloat16)
    with torch_seeded(0, "ratio"):
        done = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(0.7, 12))
    batches = torch.arange(len(PROMPTS)).split(5)
    old = completion_logprobs(model, done, batches, 0.7)
    rollout = Rollout(done.prompt_ids, done.prompt_mask, done.token_ids, done.mask, old_logprobs=old, ref_logprobs=old,
                      advantages=torch.linspace(-1, 1, len(PROMPTS)), importance_weights=None)
    metrics = minibatch_gradient(model, rollout, batches, getattr(r1kernels.objectives, preset)(), 0.7)
    assert old.dtype is torch.float32 and metrics["ratio_deviation"] <= 1e-6
    shifted = dataclasses.replace(rollout, old_logprobs=old - 0.1)
    assert minibatch_gradient(model, shifted, batches, r1kernels.objectives.grpo(), 0.7)["ratio_deviation"] > 0.1


def test_the_head_gets_bf16_and_gives_float32(tmp_path, monkeypatch):
    seen = []
    real = r1kernels.linear_grpo_loss
    monkeypatch.setattr(r1kernels, "linear_grpo_loss", lambda hidden, weight, **options: seen.append(
        (hidden.dtype, weight.dtype)) or real(hidden, weight, **options))
    trainer = GRPOTrainer(stage_of(tmp_path, [".precision=bf16", "steps=1"]))
    trainer.run()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {weight.dtype for weight in trainer.optimizer.param_groups[0]["params"]} == {torch.float32}
    assert trainer.reference.dtype is torch.bfloat16


def test_without_kl_there_is_no_reference(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path, ["objective.options.kl_coef=0"]))
    assert trainer.reference is None and "reference" not in trainer.parts


def test_stopped_again_and_again_it_ends_the_same_in_bf16(tmp_path):
    GRPOTrainer(stage_of(tmp_path / "whole", [".precision=bf16"])).run()
    whole, stops = outcome(tmp_path / "whole" / "run" / "rl"), 0
    while True:
        try:
            GRPOTrainer(stage_of(tmp_path / "cut", [".precision=bf16"], interrupt=StopAfter(23))).run()
            break
        except Interrupted:
            stops += 1
    assert stops > 2 and all(value.dtype is torch.float32 for value in whole["weights"].values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in whole["weights"].values())
    found = outcome(tmp_path / "cut" / "run" / "rl")
    assert [name for name in whole if not equal(whole[name], found[name])] == []
