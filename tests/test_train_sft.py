"""Supervised fine-tuning: what it computes, what it refuses, and that it goes on as if never stopped."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from supervised_cases import Killed, StopAt, outcome, same_after_stops, save_model, stage_of, write_rows
from transformers import AutoModelForCausalLM

from r1kernels.train import supervised
from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.data import DataError
from r1kernels.train.interrupt import Interrupted, TrainingError
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.metrics import read_metrics
from r1kernels.train.packing import encode
from r1kernels.train.prompt import Template
from r1kernels.train.schema import ConfigError
from r1kernels.train.stage import Stage
from r1kernels.train.stages import sft
from r1kernels.train.supervised import chosen, cross_entropy, gradient, learning_rate

RECIPE = """
run_dir: {directory}/run
threads: 1
template: chat
data:
  sums: {{kind: arithmetic}}
  replies: {{kind: jsonl, path: {directory}/replies.jsonl}}
checkpoint: {{supervised_every: 2, keep: 1}}
stages:
  - {{name: base, kind: model, path: {directory}/model}}
  - name: cold
    kind: sft
    model: base
    samples: [replies]
    epochs: 2
    batch_size: 4
    window: 160
    micro_batch_size: 1
    learning_rate: 1.0e-2
"""
REPLIES = [
    (f"Compute {a}+{b}", f" <think>{a}+{b}={a + b}</think>\n<answer>{a + b}</answer>")
    for a, b in [(1, 2), (3, 4), (5, 6), (7, 8), (9, 1), (2, 2), (4, 4), (6, 6), (8, 1), (3, 3)]
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model and samples for it."""
    directory = tmp_path_factory.mktemp("sft")
    save_model(directory / "model")
    write(directory / "replies.jsonl", REPLIES)
    return directory


def write(path: Path, replies: list[tuple[str, str]]) -> None:
    write_rows(path, [{"question": question, "response": response} for question, response in replies])


def stage_at(home: Path, directory: Path, *overrides: str, interrupt=None) -> Stage:
    return stage_of(RECIPE.format(directory=home), "cold", directory, overrides, interrupt)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    stage = stage_at(home, tmp_path_factory.mktemp("whole"))
    return sft.run(stage), outcome(stage), stage


def test_it_learns_the_responses(whole):
    summary, _, stage = whole
    lines = read_metrics(stage.directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]  # 2 epochs of 10 samples, 4 at a time
    assert summary["samples"] == 10 and summary["too_long"] == 0 and summary["steps"] == 5
    assert summary["loss"] == lines[-1]["loss"] < 0.8 * lines[0]["loss"] == 0.8 * summary["loss_first"]
    assert lines[0]["learning_rate"] == 1e-2 and lines[-1]["learning_rate"] == pytest.approx(1e-3)
    assert all(0.5 < line["packed"] <= 1 and line["grad_norm"] > 0 for line in lines)
    tokens = encode(load_tokenizer(stage.model_dir("base")), [("", response) for _, response in REPLIES])
    assert sum(line["tokens"] for line in lines) == summary["tokens"] == 2 * sum(map(len, tokens))
    assert not any("seconds" in name for name in lines[0])
    assert len(read_metrics(stage.directory / "timings.jsonl")) == 5


def test_its_model_loads_with_plain_transformers_and_its_generation_ends(whole):
    model_dir = latest_checkpoint(whole[2].directory) / "model"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ends = model.generation_config.eos_token_id
    assert load_tokenizer(model_dir).eos_token_id in (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("how", [Interrupted, Killed])
@pytest.mark.parametrize("checks", [0, 4, 12])
def test_stopped_and_resumed_it_is_the_same_run_bit_for_bit(home, whole, tmp_path, how, checks):
    same_after_stops(sft, lambda stop: stage_at(home, tmp_path, interrupt=stop), whole[:2], checks, how)
    # Asked once more, a finished stage does nothing and says the same.
    assert sft.run(stage_at(home, tmp_path, interrupt=StopAt(0, Killed))) == whole[0]


@pytest.fixture
def parts(home):
    model, tokenizer = load_model(home / "model"), load_tokenizer(home / "model")
    template = Template("chat", tokenizer)
    return model, encode(tokenizer, [(template.render(question), response) for question, response in REPLIES])


def gradients(model, samples, config) -> tuple[dict, torch.Tensor]:
    model.zero_grad()
    measured = gradient(model, samples, config, cross_entropy, lambda: None)
    return measured, torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


def test_the_gradient_is_that_of_the_mean_over_the_tokens_of_responses(home, tmp_path, parts):
    model, samples = parts
    config = stage_at(home, tmp_path, "stages.cold.micro_batch_size=null").config
    measured, ours = gradients(model, samples, config)

    model.zero_grad()
    losses = []
    for sample in samples:
        ids = torch.from_numpy(sample.ids).long()[None]
        logits = model(input_ids=ids).logits[0, sample.prompt_length - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[0, sample.prompt_length :], reduction="none"))
    plain = torch.cat(losses).mean()
    plain.backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert measured["tokens"] == len(torch.cat(losses))
    assert measured["loss"] == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_the_gradient_does_not_depend_on_windows_or_micro_batches(home, tmp_path, parts):
    model, samples = parts
    results = []
    for window, size in ((160, "null"), (160, 1), (160, 3), (1024, 1)):
        keys = (f"stages.cold.window={window}", f"stages.cold.micro_batch_size={size}")
        results.append(gradients(model, samples, stage_at(home, tmp_path, *keys).config))
    for measured, grad in results[1:]:
        assert measured["tokens"] == results[0][0]["tokens"]
        assert measured["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-5)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-4, atol=1e-6 * grad.abs().max().item())


def test_every_epoch_takes_every_sample_once_in_an_order_of_its_own(whole):
    config = whole[2].config
    taken = [index for step in range(config.steps(10)) for index in chosen(10, config, 0, step)]
    assert Counter(taken[:10]) == Counter(taken[10:]) == Counter(range(10))
    assert taken[:10] != taken[10:]
    assert [len(chosen(10, config, 0, step)) for step in range(5)] == [4, 4, 4, 4, 4]
    assert [len(chosen(3, config, 0, step)) for step in range(2)] == [4, 2]  # the last step takes what is left


def test_the_learning_rate_warms_up_and_falls_in_a_cosine_to_a_tenth(home, tmp_path):
    config = stage_at(home, tmp_path, "stages.cold.learning_rate=5e-5", "stages.cold.warmup_steps=4").config
    rates = [learning_rate(config, step, 25) for step in range(25)]
    assert rates[:5] == pytest.approx([1.25e-5, 2.5e-5, 3.75e-5, 5e-5, 5e-5])
    assert rates[14] == pytest.approx((5e-5 + 5e-6) / 2) and rates[-1] == pytest.approx(5e-6)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    config = stage_at(home, tmp_path, "stages.cold.final_learning_rate=0").config
    assert learning_rate(config, 0, 1) == 1e-2 and learning_rate(config, 9, 10) == 0


def test_a_sample_longer_than_the_window_is_left_out_and_counted(home, tmp_path, capsys):
    write(tmp_path / "replies.jsonl", [*REPLIES, ("Compute 1+1", " 1+1=2\n" * 40)])
    stage = stage_at(home, tmp_path, f"data.replies.path={tmp_path}/replies.jsonl", "stages.cold.epochs=1")
    summary = sft.run(stage)
    assert (summary["samples"], summary["too_long"]) == (10, 1)
    assert "1 of 11 samples are longer than the window of 160 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("overrides", "error", "message"), [
    (["window=9"], DataError, r"'window' is 9, expected at least \d+: every sample is longer"),
    (["window=1025"], ConfigError, r"'window' is 1025, expected at most 1024: the model has no more positions"),
    (["samples=[]"], ConfigError, "'samples' is empty"),
    (["samples=[sums]"], ConfigError, "'samples' names the data set 'sums' of kind 'arithmetic', which has no"),
    (["samples=[base]"], ConfigError, "'samples' names 'base', expected"),
    (["batch_size=0"], ConfigError, "'batch_size' is 0, expected at least 1"),
    (["learning_rate=0"], ConfigError, "'learning_rate' is 0.0, expected a positive number"),
    (["epoch=3"], ConfigError, r"unknown key 'epoch' in 'stages.cold' \(did you mean 'epochs'\?\)"),
])
def test_settings_that_cannot_be_used(home, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        sft.run(stage_at(home, tmp_path, *(f"stages.cold.{key}" for key in overrides)))


@pytest.mark.parametrize(("content", "message"), [
    ("", "replies.jsonl holds nothing"),
    ('{"question": "Compute 1+1", "response": "2"}\n{"question": "Compu', "replies.jsonl, line 2: not JSON"),
    ('{"question": "Compute 1+1"}\n', "replies.jsonl, line 1: no 'response'"),
    ('{"question": "Compute 1+1", "response": ""}\n', "replies.jsonl, line 1: 'response' must be a string that is not"),
])
def test_samples_that_cannot_be_used(home, tmp_path, content, message):
    path = tmp_path / "replies.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        sft.run(stage_at(home, tmp_path, f"data.replies.path={path}"))


def test_a_damaged_sample_of_another_stage_is_named(home, tmp_path):
    stage = stage_at(home, tmp_path)
    stage.directory_of("traces").mkdir()
    row = {"id": "1", "question": "1+1", "prompt": "Compute 1+1", "completion": " 2"}
    rows = [json.dumps(row), '{"id": "2", "prompt": "Com']
    (stage.directory_of("traces") / "selected.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"selected\.jsonl, line 2: not JSON"):
        stage.samples(["traces"], Template("chat", load_tokenizer(stage.model_dir("base"))))


def test_a_loss_that_is_not_finite_ends_the_stage_and_leaves_the_checkpoint(home, tmp_path):
    calls = iter(range(100))

    def diverging(model, batch, tokens):
        loss = cross_entropy(model, batch, tokens)
        return loss * math.nan if next(calls) > 2 else loss

    stage = stage_at(home, tmp_path, "stages.cold.micro_batch_size=null")
    with pytest.raises(TrainingError, match="step 3: loss nan"):
        supervised.train_on_samples(stage, supervised.Start.of(stage), diverging)
    weights = load_file(latest_checkpoint(stage.directory) / "model/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
