"""Models that compute in bfloat16 and train float32 weights."""

import copy
import dataclasses

import pytest
import torch
from rl_cases import StopAfter, equal, load_shards, make_model, make_tokenizer, outcome, policy_of, stage_of

import r1kernels
from r1kernels.train import recipe as recipes
from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.errors import Interrupted
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.model import hidden_states, round_parameters
from r1kernels.train.policy import make_optimizer
from r1kernels.train.recipe_file import build_recipe
from r1kernels.train.rollout import Sampling, TransformersSampler
from r1kernels.train.update import Rollout, completion_logprobs, minibatch_gradient

PROMPTS = ["Compute 3+4", "Compute 1+2+3+4+5+6", "Compute 9+9+9"] * 4
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


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

    for isa, fast in {"amx_bf16": True, "avx512_bf16": True, "avx512_bf16_fma": False, "avx512": False, "avx2": False,
                      "baseline": False}.items():
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


def sums(model, dtype, factors):
    """The gradient of a plain model in a precision, summed in float32."""
    total = torch.zeros(sum(map(torch.numel, model.parameters())))
    for factor in factors:
        rounded = round_parameters(copy.deepcopy(model), dtype)
        (hidden_states(rounded, input_ids=IDS).float().square().sum() * factor).backward()
        total += torch.cat([weight.grad.float().flatten() for weight in rounded.parameters()])
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_updates_are_kept_and_gradients_are_summed_in_float32(dtype):
    """An update of 1e-5 is far below the rounding of a bfloat16 weight, and a term of 1e-3 below that of a sum."""
    plain, factors = make_model(make_tokenizer(), num_hidden_layers=2), (1.0, 1e-3, 1e-3, 1e-3)
    policy = policy_of(copy.deepcopy(plain), dtype)
    optimizer = make_optimizer(policy, lr=1e-5, weight_decay=0.0)
    expected, before = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.0), dict(policy.weights())
    before = {name: weight.clone() for name, weight in before.items()}
    for _ in range(5):
        optimizer.zero_grad()
        for number, factor in enumerate(factors):
            policy.sync_gradients(number == len(factors) - 1)
            (policy(hidden_states, input_ids=IDS).float().square().sum() * factor).backward()
        total = sums(plain, dtype, factors)
        found = torch.cat([weight.grad.full_tensor().flatten() for weight in policy.trained().values()])
        assert found.dtype is torch.float32
        # The order of the terms of a weight that is used twice is not that of a plain model.
        torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-6 * total.abs().max().item())
        for weight, part in zip(plain.parameters(), found.split([p.numel() for p in plain.parameters()]), strict=True):
            weight.grad = part.view(weight.shape).clone()
        optimizer.step()
        expected.step()
    assert all(weight.dtype is torch.float32 for weight in policy.trained().values())
    for name, weight in policy.weights():
        assert torch.equal(weight, plain.get_parameter(name))
    moved = [(weight - before[name]).abs().max() for name, weight in policy.weights()]
    assert all(2e-5 < value < 1e-4 for value in moved)


def test_buffers_and_what_transformers_keeps_in_float32_are_not_rounded():
    model = make_model(make_tokenizer())
    model._keep_in_fp32_modules_strict = {"norm", "down_proj"}
    round_parameters(model, torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.float32}
    assert kept == {"model.norm.weight", "model.layers.0.mlp.down_proj.weight"}
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("route", ["padded", "packed", "shared"])
@pytest.mark.parametrize("preset", ["grpo", "r1"])
def test_the_first_ratio_is_one_in_bf16(preset, route):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden_size=64, num_hidden_layers=2)
    done = TransformersSampler(round_parameters(copy.deepcopy(model), torch.bfloat16), tokenizer).sample(
        PROMPTS, Sampling(0.7, 12))
    policy, rows = policy_of(model, torch.bfloat16), torch.arange(len(PROMPTS))
    batches, objective = list(rows.split(5)), getattr(r1kernels.objectives, preset)()
    old = completion_logprobs(policy, done, batches, 0.7, route)
    rollout = Rollout(done.prompt_ids, done.prompt_mask, done.token_ids, done.mask, old_logprobs=old, ref_logprobs=old,
                      advantages=torch.linspace(-1, 1, len(PROMPTS)), importance_weights=None)
    metrics = minibatch_gradient(policy, rollout, rows, batches, objective, 0.7, route)
    assert old.dtype is torch.float32 and metrics["ratio_deviation"] <= 1e-6
    shifted = dataclasses.replace(rollout, old_logprobs=old - 0.1)
    assert minibatch_gradient(policy, shifted, rows, batches, objective, 0.7, route)["ratio_deviation"] > 0.1


def test_the_head_gets_bf16_and_gives_float32(tmp_path, monkeypatch):
    seen = []
    real = r1kernels.linear_grpo_loss
    monkeypatch.setattr(r1kernels, "linear_grpo_loss", lambda hidden, weight, **options: seen.append(
        (hidden.dtype, weight.dtype)) or real(hidden, weight, **options))
    trainer = GRPOTrainer(stage_of(tmp_path, [".precision=bf16", "steps=1"]))
    trainer.run()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {weight.dtype for weight in trainer.optimizer.param_groups[0]["params"]} == {torch.float32}
    assert {weight.dtype for weight in trainer.reference.shards().values()} == {torch.bfloat16}
    assert trainer.sampler.model.dtype is torch.bfloat16


def test_without_kl_there_is_no_reference(tmp_path):
    trainer = GRPOTrainer(stage_of(tmp_path, ["objective.options.kl_coef=0"]))
    assert trainer.reference is None
    trainer.save()
    assert load_shards(latest_checkpoint(trainer.stage.directory)).keys() == {"optimizer"}


@pytest.mark.long(reason="test_grpo and test_resume stop runs again and again too")
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
