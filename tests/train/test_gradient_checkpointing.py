"""Gradient checkpointing: the same gradients from less memory, in training only."""

import pytest
import torch
from rl_cases import StopAfter, equal, make_model, make_tokenizer, outcome, stage_of

from r1kernels.train.errors import ConfigError, Interrupted
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.model import enable_checkpointing, hidden_states
from r1kernels.train.rollout import Sampling, TransformersSampler

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def gradients(model):
    model.zero_grad()
    hidden_states(model, input_ids=IDS).square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_layers_give_the_same_gradients_from_less_memory(dtype):
    model = make_model(make_tokenizer(), hidden_size=32, num_hidden_layers=4).to(dtype).eval()
    kept, sizes = [], []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda value: sizes[-1].append(value.numel()) or value,
                                                      lambda value: value):
            sizes.append([])
            kept.append(gradients(model))
    assert kept[0] and all(map(torch.equal, *kept))
    assert sum(sizes[1]) < sum(sizes[0])
    assert not any(module.training for module in model.modules())


def test_a_checkpointed_model_still_samples_with_its_cache():
    tokenizer, found = make_tokenizer(), []
    model = make_model(tokenizer)
    for _ in range(2):
        found.append(TransformersSampler(model, tokenizer).sample(["1+1", "2+2="], Sampling(1.0, 6)).texts)
        enable_checkpointing(model)
    assert found[0] == found[1]


@pytest.mark.parametrize("broken", ["none", "dropout"])
def test_models_that_cannot_be_checkpointed_are_refused(broken, monkeypatch):
    model = make_model(make_tokenizer())
    if broken == "none":
        monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    else:
        layer = model.model.layers[0]
        forward = layer.forward.__func__
        monkeypatch.setattr(type(layer), "forward", lambda self, hidden, *given, **options: forward(
            self, torch.nn.functional.dropout(hidden, 0.5, self.training), *given, **options))
    with pytest.raises(ConfigError, match=r"(?s)gradient_checkpointing.*LlamaForCausalLM"):
        enable_checkpointing(model)


def test_a_checkpointed_run_learns_and_resumes(tmp_path):
    options = [".precision=bf16", ".gradient_checkpointing=true", "steps=2"]
    trainer = GRPOTrainer(stage_of(tmp_path / "whole", options))
    trainer.run()
    whole = outcome(tmp_path / "whole" / "run" / "rl")
    assert all(line.get("first_ratio_deviation", 0) <= 1e-6 for line in whole["metrics"])
    with pytest.raises(Interrupted):
        GRPOTrainer(stage_of(tmp_path / "cut", options, interrupt=StopAfter(23))).run()
    GRPOTrainer(stage_of(tmp_path / "cut", options)).run()
    found = outcome(tmp_path / "cut" / "run" / "rl")
    assert [name for name in whole if not equal(whole[name], found[name])] == []
