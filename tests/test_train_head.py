"""The head of a model apart from its body: what is read from a configuration, and what is refused."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    PhiConfig,
)

import r1kernels
from r1kernels.train import head as head_module
from r1kernels.train.head import check_head, head_of, hidden_states
from r1kernels.train.loading import load_model
from r1kernels.train.schema import ConfigError

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
# configuration -> (logit_scale, softcap, whether there is a bias)
FAMILIES = {
    "llama": (LlamaConfig(**SHAPE), 1, None, False),
    "llama, tied": (LlamaConfig(**SHAPE, tie_word_embeddings=True), 1, None, False),
    "phi": (PhiConfig(**SHAPE), 1, None, True),
    "gemma2": (Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=5.0), 1, 5, False),
    "cohere": (CohereConfig(**SHAPE, logit_scale=0.25), 0.25, None, False),
    "granite": (GraniteConfig(**SHAPE, logits_scaling=8.0), 0.125, None, False),
    "falcon_h1": (FalconH1Config(**SHAPE, head_dim=16, lm_head_multiplier=0.3), 0.3, None, False),
    "hyperclovax": (AutoConfig.for_model("hyperclovax", **SHAPE, logits_scaling=0.5), 0.5, None, False),
}


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that a soft cap bends
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_models_logits(family):
    config, scale, softcap, bias = FAMILIES[family]
    model = build(config)
    check_head(model)
    head = head_of(model)
    assert (head["logit_scale"], head["softcap"], head["bias"] is not None) == (pytest.approx(scale), softcap, bias)
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        logprobs = r1kernels.linear_token_logprobs(hidden_states(model, input_ids=ids), token_ids=ids, **head)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "falcon_h1", "hyperclovax"])
def test_what_a_configuration_does_not_say_is_noticed(family, monkeypatch):
    model = build(FAMILIES[family][0])
    monkeypatch.setattr(head_module, "_scale", lambda config: 1.0)
    monkeypatch.setattr(head_module, "_softcap", lambda config: None)
    with pytest.raises(ConfigError, match=r"the logits of \w+ are not those of its output layer"):
        check_head(model)


def test_a_cap_is_noticed_where_logits_are_small():
    model = build(FAMILIES["llama"][0])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)
    model.config.final_logit_softcapping = 100.0  # Llama's code has none
    with pytest.raises(ConfigError, match="softcap 100"):
        check_head(model)


def test_layers_between_body_and_head_are_noticed():
    model = build(ModernBertDecoderConfig(**SHAPE, cls_token_id=1, sep_token_id=2))
    with pytest.raises(ConfigError, match="are not those of its output layer"):
        check_head(model)


class Adapted(torch.nn.Linear):
    """A head that does more than its weight says, and nothing at first, as adapters do."""

    def forward(self, hidden):
        return super().forward(hidden)


@pytest.mark.parametrize("wrap", [
    lambda layer: torch.nn.Sequential(layer),
    lambda layer: Adapted(layer.in_features, layer.out_features, bias=False),
])
def test_heads_other_than_a_linear_layer_are_refused(wrap):
    model = build(FAMILIES["llama"][0])
    model.lm_head = wrap(model.lm_head)
    with pytest.raises(ConfigError, match=r"is a (Sequential|Adapted), expected a torch\.nn\.Linear"):
        check_head(model)


def test_a_model_that_takes_other_inputs_is_named(monkeypatch):
    model = build(FAMILIES["llama"][0])
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask: None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not take input_ids, attention_mask, position_ids"):
        check_head(model)


def test_a_damaged_model_is_named(tmp_path):
    model = build(FAMILIES["llama"][0])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not finite: its weights are damaged"):
        load_model(tmp_path)


def test_the_check_leaves_no_hook_and_no_gradient():
    model = build(FAMILIES["gemma2"][0])
    check_head(model)
    assert not model.lm_head._forward_pre_hooks and all(p.grad is None for p in model.parameters())
