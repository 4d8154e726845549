"""What fits: parameters and activations of models without data equal those of real ones, and advice that holds."""

import re

import pytest
import torch
import transformers
from rl_cases import make_tokenizer, stage_of

from r1kernels.train import plan
from r1kernels.train.cli import main
from r1kernels.train.errors import ConfigError
from r1kernels.train.lora import add_adapters
from r1kernels.train.model import enable_checkpointing, hidden_states
from r1kernels.train.recipe import Lora

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 96}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=64),
}
WIDTH, PROMPT = 48, 16


def measured(config, dtype=torch.float32, checkpointed=False, lora=None, width=WIDTH, prompt=PROMPT):
    return plan.measure(config, dtype, checkpointed, width, prompt, lora)


def kept_for_backward(model):
    """Bytes of one sequence that a real forward keeps, without weights."""
    weights, kept = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 90, (2, WIDTH))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=torch.arange(WIDTH).expand(2, -1))
    return sum(storage.nbytes() for storage in kept.values()) / 2


@pytest.mark.few(4)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.slow(reason="runs models of three architectures")
def test_activations_are_what_autograd_keeps(family, dtype, checkpointed):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype).eval()
    if checkpointed:
        enable_checkpointing(model)
    kept, found = kept_for_backward(model), measured(CONFIGS[family], dtype, checkpointed)
    # Inside the backward, a layer needs temporary values; a checkpointed one all of its activations.
    layer = (measured(CONFIGS[family], dtype)["sequence"] if checkpointed else kept) / SIZES["num_hidden_layers"]
    assert kept <= found["sequence"] <= kept + 1.5 * layer


@pytest.mark.parametrize("checkpointed", [False, True])
def test_three_layers_tell_what_all_need(checkpointed, monkeypatch):
    few = measured(CONFIGS["llama"], checkpointed=checkpointed)
    monkeypatch.setattr(plan, "takewhile", lambda *_: ())  # as if layers differed: none is left out
    assert measured(CONFIGS["llama"], checkpointed=checkpointed) == few


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_those_of_the_model(family, lora):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    if lora:
        add_adapters(model, lora, 0, torch.float32)
    found = measured(CONFIGS[family], lora=lora, width=0, prompt=0)
    assert found["all"] == sum(weight.numel() for weight in model.parameters())
    assert found["trained"] == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert found["root"] + SIZES["num_hidden_layers"] * found["layer"] == found["all"]


def test_a_token_in_the_cache_has_the_keys_and_values_of_all_layers():
    keys = SIZES["num_key_value_heads"] * SIZES["hidden_size"] // SIZES["num_attention_heads"]
    expected = 2 * 2 * keys * SIZES["num_hidden_layers"]
    assert expected <= measured(CONFIGS["llama"], torch.bfloat16, width=0)["token"] <= expected + 8  # and its position


def case_of(folder, *overrides, devices=1):
    """The case of a tiny stage of RL with a model of several layers."""
    stage = stage_of(folder, overrides)
    tokenizer = make_tokenizer()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"vocab_size": len(tokenizer) // 4 * 4}))
    model.save_pretrained(folder / "base")
    return dict(plan.cases(stage.recipe, devices, PROMPT))["rl"], stage.recipe


def test_more_devices_divide_the_state_and_a_tensor_axis_the_activations(tmp_path):
    (one, _), (four, _) = (case_of(tmp_path, devices=devices) for devices in (1, 4))
    one, four, split = (case.phases()["updates"] for case in (one, four, four.changed(tensor=2)))
    for part in ("weights", "gradients", "optimizer", "reference"):
        assert four[part] == one[part] / 4
        assert split[part] == pytest.approx(four[part], rel=0.05)  # norms are on every rank of the tensor axis
    assert four["activations"] == one["activations"] > split["activations"] > one["activations"] / 2
    assert four["gathered weights"] < one["gathered weights"]


def test_a_step_frees_the_gradients_before_the_next_step_samples(tmp_path):
    phases = case_of(tmp_path)[0].phases()
    assert phases["updates"]["gradients"] == phases["updates"]["weights"] == phases["sampling"]["weights"]
    assert "gradients" not in phases["sampling"]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_the_advice_makes_the_stage_fit(tmp_path, share):
    case, _ = case_of(tmp_path)
    memory = case.peak()[0] * share
    text, refused = plan.verdict("rl", case, memory)
    assert refused and re.search(r"stage 'rl' needs .* GiB .*'(weights|activations|optimizer|head)'.* fit with", text)
    name, value = case.advice(memory).split("=")
    value = Lora() if name == "lora.r" else {"true": True}.get(value, value.strip('"'))
    value = int(value) if str(value).isdigit() else value
    assert case.changed(**{name.removesuffix(".r"): value}).peak()[0] <= memory


def test_without_one_setting_the_advice_is_a_combination(tmp_path):
    case, _ = case_of(tmp_path)
    assert re.match(r"a combination of .*precision, optimizer_state, devices", case.advice(case.peak()[0] / 1e4))


def test_a_run_refuses_only_what_cannot_fit_and_warns_of_the_rest(tmp_path, monkeypatch):
    case, recipe = case_of(tmp_path)
    least, most = case.peak(plan.VARIABLE)[0], case.peak()[0]
    for memory, warned in ((2 * most, False), (most / 1.02, True), (1.02 * least, True)):
        monkeypatch.setattr(plan, "memory_of", lambda device, memory=memory: memory)
        assert [text[:10] for text in plan.check_fits(recipe, 1, PROMPT)] == ["stage 'rl'"] * warned
    monkeypatch.setattr(plan, "memory_of", lambda device: 0.98 * least)
    (tmp_path / "test.jsonl").write_text('{"question": "Compute 8+8", "answer": "16"}\n')
    with pytest.raises(SystemExit, match=r"stage 'rl' needs .* GiB .* it would fit with"):
        main(["train", str(tmp_path / "recipe.yaml"), "--set", f"data.sums.test_path={tmp_path / 'test.jsonl'}"])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_tensor_axis_must_divide_the_heads(tmp_path):
    case, _ = case_of(tmp_path, devices=3)
    with pytest.raises(ConfigError, match=r"parallel.tensor' is 3.*num_attention_heads.* 4"):
        case.changed(tensor=3).phases()


def test_the_command_shows_parts_and_fails_if_a_stage_does_not_fit(tmp_path, capsys):
    case_of(tmp_path)
    command = ["plan", str(tmp_path / "recipe.yaml"), "--prompt-tokens", "16"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--memory", "80", "--devices", "2"])
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert all(part in shown for part in ("rl (grpo), updates", "activations", "reference", "KV cache", "2 devices"))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--memory", "0.0001"])
    assert ended.value.code == 1
    assert re.search(r"stage 'rl' needs .* it would fit with", capsys.readouterr().out.replace("\n", " "))
