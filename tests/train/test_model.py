"""Models as they are loaded, and the head apart from the body."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
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
    PreTrainedTokenizerFast,
)

import r1kernels
from r1kernels.train import model as module
from r1kernels.train.errors import ConfigError
from r1kernels.train.model import (
    align,
    check_head,
    head_of,
    hidden_states,
    load_config,
    load_model,
    load_tokenizer,
)
from r1kernels.train.parallel import start

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
LLAMA = LlamaConfig(**SHAPE)
# name -> (configuration, logit_scale, softcap, whether there is a bias)
FAMILIES = {
    "llama": (LLAMA, 1, None, False),
    "llama, tied": (LlamaConfig(**SHAPE, tie_word_embeddings=True), 1, None, False),
    "phi": (PhiConfig(**SHAPE), 1, None, True),
    "gemma2": (Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=5.0), 1, 5, False),
    "cohere": (CohereConfig(**SHAPE, logit_scale=0.25), 0.25, None, False),
    "granite": (GraniteConfig(**SHAPE, logits_scaling=8.0), 0.125, None, False),
    "falcon_h1": (FalconH1Config(**SHAPE, head_dim=16, lm_head_multiplier=0.3), 0.3, None, False),
    "hyperclovax": (AutoConfig.for_model("hyperclovax", **SHAPE, logits_scaling=0.5), 0.5, None, False),
}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def build(config=LLAMA):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that a soft cap bends
    return model


def make_tokenizer(**options):
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "a": 2, "?": 3}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="?", **options)


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_is_loaded_as_it_is(tmp_path, side):
    make_tokenizer(padding_side=side).save_pretrained(tmp_path / "first")
    tokenizer = load_tokenizer(tmp_path / "first")
    assert tokenizer.padding_side == side and tokenizer.pad_token == "<end>"
    tokenizer.save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())
    assert saved["padding_side"] == side and not {"is_local", "local_files_only"} & set(saved)


def test_a_padding_token_is_kept(tmp_path):
    make_tokenizer(pad_token="<pad>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<pad>"


def test_a_loaded_model_is_aligned_still_tied_and_computes_the_same_bits(tmp_path):
    model = build(FAMILIES["llama, tied"][0])
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not any(tensor.data_ptr() % module.ALIGNMENT for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.dtype is torch.float32 and not loaded.training
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert load_config(tmp_path).max_position_embeddings == 64
    assert load_config(tmp_path, {"max_position_embeddings": 128}).max_position_embeddings == 128
    assert load_model(tmp_path, overrides={"max_position_embeddings": 128}).config.max_position_embeddings == 128


def test_only_unaligned_weights_are_copied():
    layer = torch.nn.Linear(8, 8)
    weight, bias = torch.randn(65)[1:].view(8, 8), layer.bias.data_ptr()
    layer.weight.data = weight
    align(layer)
    assert torch.equal(layer.weight, weight) and layer.weight.data_ptr() % module.ALIGNMENT == 0
    assert layer.bias.data_ptr() == bias or bias % module.ALIGNMENT


def test_what_cannot_be_loaded_is_named(tmp_path):
    for load in (load_tokenizer, load_model, load_config):
        with pytest.raises(ConfigError, match="'/no/such/directory'"):
            load("/no/such/directory")
        with pytest.raises(ConfigError, match=str(tmp_path)):
            load(tmp_path)
    build().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="'device' is 'cuda:77'"):
        start("cuda:77")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError, match=r"endless.*eos_token"):
        load_tokenizer(tmp_path / "endless")


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"'{tmp_path}'.*LoRA adapter; merge it"):
        load_config(tmp_path)


# ---- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_models_logits(family):
    config, scale, softcap, bias = FAMILIES[family]
    model = build(config)
    check_head(model)
    head = head_of(model)
    assert (head["logit_scale"], head["softcap"], head["bias"] is not None) == (pytest.approx(scale), softcap, bias)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits.double().log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
        logprobs = r1kernels.linear_token_logprobs(hidden_states(model, input_ids=IDS), token_ids=IDS, **head)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "falcon_h1", "hyperclovax"])
def test_what_a_configuration_does_not_say_is_noticed(family, monkeypatch):
    model = build(FAMILIES[family][0])
    for name in ("_FACTORS", "_DIVISOR", "_CAPS"):
        monkeypatch.setattr(module, name, "")
    with pytest.raises(ConfigError, match=r"ForCausalLM.*logit_scale 1, softcap None"):
        check_head(model)


def test_a_cap_is_noticed_where_logits_are_small():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)
    model.config.final_logit_softcapping = 100.0  # Llama's code has no cap
    with pytest.raises(ConfigError, match="softcap 100"):
        check_head(model)
    model.config.final_logit_softcapping = None
    check_head(model)
    assert not model.lm_head._forward_pre_hooks and all(p.grad is None for p in model.parameters())


def test_layers_between_body_and_head_are_noticed():
    with pytest.raises(ConfigError, match="ModernBertDecoderForCausalLM"):
        check_head(build(ModernBertDecoderConfig(**SHAPE, cls_token_id=1, sep_token_id=2)))


class Adapted(torch.nn.Linear):
    """A head that may do more than its weight says, as adapters do."""


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, lambda layer: Adapted(layer.in_features, layer.out_features)])
def test_heads_other_than_a_linear_layer_are_refused(wrap):
    model = build()
    model.lm_head = wrap(model.lm_head)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*(Sequential|Adapted).*torch\.nn\.Linear"):
        check_head(model)


def test_other_inputs_and_damaged_weights_are_named(tmp_path, monkeypatch):
    model = build()
    with monkeypatch.context() as context:
        context.setattr(model, "forward", lambda input_ids, attention_mask: None)
        with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*position_ids"):
            check_head(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*not finite"):
        load_model(tmp_path)
