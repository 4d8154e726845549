"""The cost model of scaling: its bytes are those that ranks send, and its committed results are those of today."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scaling
import scaling_ranks
import transformers
from torch import distributed

from r1kernels.train import plan

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    program = ROOT / "tests" / "support" / "scaling_ranks.py"
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "counts.json").read_text())


def model_of(config):
    """The sizes of a Llama or Qwen2 model, counted on the model."""
    found = plan.measure(config, scaling_ranks.torch.bfloat16)
    active = found["all"] - config.vocab_size * config.hidden_size
    return scaling.Model("tiny", config.num_hidden_layers, config.hidden_size, config.vocab_size, found["layer"],
                         config.hidden_size, 0, active, norm=2 * config.hidden_size)


@pytest.mark.few(8)
@pytest.mark.parametrize("pass_", ["trained", "scored", "trained, checkpointed", "scored, checkpointed"])
@pytest.mark.parametrize("layout", scaling_ranks.LAYOUTS, ids=str)
@pytest.mark.slow(reason="its fixture starts four processes")
def test_the_bytes_of_each_axis_are_those_that_ranks_send(counts, layout, pass_):
    model, at, tokens = model_of(scaling_ranks.CONFIG), scaling.Layout(*layout), scaling_ranks.TOKENS
    step, trained = scaling.Step(checkpointing="checkpointed" in pass_), pass_.startswith("trained")
    expected = {"data": scaling.data_axis(model, step, at, trained),
                "tensor": scaling.tensor_axis(model, step, at, tokens, tokens, trained)}
    found = counts["x".join(map(str, layout))][pass_]
    assert {axis: list(traffic) for axis, traffic in expected.items() if getattr(at, axis) > 1} == {
        axis: count for axis, count in found.items() if getattr(at, axis) > 1}


@pytest.mark.parametrize("model", scaling.MODELS[:2], ids=lambda model: model.name)
def test_the_models_have_the_parameters_of_their_architecture(model):
    inner = {"Qwen2.5-7B": 18944, "Qwen2.5-32B": 27648}[model.name]
    config = transformers.Qwen2Config(
        vocab_size=model.vocab, hidden_size=model.hidden, intermediate_size=inner, num_hidden_layers=model.layers,
        num_attention_heads=model.hidden // 128, num_key_value_heads=model.key_values // 256,
        tie_word_embeddings=False)
    found = plan.measure(config, scaling_ranks.torch.bfloat16)
    assert model.parameters == found["all"]
    assert model.layer == found["layer"]


def test_more_devices_take_less_time_for_the_same_step_and_no_less_traffic():
    model, step, machine = scaling.MODELS[0], scaling.Step(), scaling.Machine()
    few, many = (scaling.cost(model, step, scaling.Layout(devices, 1), machine) for devices in (8, 64))
    assert many["compute s"] == pytest.approx(few["compute s"] / 8)
    assert few["step s"] > many["step s"] > few["step s"] / 8
    assert many["tokens/s a device"] < few["tokens/s a device"]


def test_the_committed_results_are_those_of_this_model():
    committed = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    assert committed == json.loads(json.dumps(scaling.results()))
