"""SFT and pretraining: what they compute, what they refuse, and that they continue as if never stopped."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rl_cases import policy_of, take_gradient
from safetensors.torch import load_file
from supervised_cases import (
    EXAMPLES,
    Killed,
    StopAt,
    make_tokenizer,
    outcome,
    same_after_stops,
    save_model,
    stage_of,
    write_rows,
)
from transformers import AutoModelForCausalLM

from r1kernels.train import supervised
from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.data import Template
from r1kernels.train.errors import ConfigError, DataError, Interrupted, TrainingError
from r1kernels.train.log import read_lines
from r1kernels.train.model import load_model, load_tokenizer
from r1kernels.train.packing import pack
from r1kernels.train.stage import Stage
from r1kernels.train.supervised import (
    cosine,
    cross_entropy,
    encode,
    fit,
    gradient,
    run_pretrain,
    run_sft,
    start_of,
)

RECIPE = """
run_dir: {directory}/run
precision: fp32
threads: 1
template: chat
data:
  replies: {{kind: jsonl, path: {directory}/replies.jsonl, test_path: {directory}/test.jsonl}}
checkpoint: {{supervised_every: 2, keep: 1}}
stages:
  base: {{kind: model, path: {directory}/model}}
  cold:
    {{kind: sft, model: base, samples: [replies], epochs: 2, batch_size: 4, window: 160, micro_batch_size: 1,
     learning_rate: 1.0e-2}}
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
    write_rows(directory / "test.jsonl", [{"question": "Compute 9+9", "answer": "18"}])
    return directory


def write(path: Path, replies: list[tuple[str, str]]) -> None:
    write_rows(path, [{"question": question, "response": response} for question, response in replies])


def stage_at(home: Path, directory: Path, *overrides: str, interrupt=None) -> Stage:
    return stage_of(RECIPE.format(directory=home), "cold", directory, overrides, interrupt)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    stage = stage_at(home, tmp_path_factory.mktemp("whole"))
    return run_sft(stage), outcome(stage), stage


def test_it_learns_the_responses(whole):
    summary, _, stage = whole
    lines = read_lines(stage.directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]  # 2 epochs of 10 samples, 4 at a time
    assert summary["samples"] == 10 and summary["too_long"] == 0 and summary["steps"] == 5
    assert summary["loss"] == lines[-1]["loss"] < 0.8 * lines[0]["loss"] == 0.8 * summary["loss_first"]
    assert lines[0]["learning_rate"] == 1e-2 and lines[-1]["learning_rate"] == pytest.approx(1e-3)
    assert all(line["grad_norm"] > 0 for line in lines)
    tokens = encode(load_tokenizer(stage.model_path("base")), [("", response) for _, response in REPLIES])
    assert sum(line["tokens"] for line in lines) == summary["tokens"] == 2 * sum(len(ids) for ids, _ in tokens)
    assert {"updates", "total", "tokens_per_second"} <= lines[0]["timing"].keys()


def test_its_model_loads_with_plain_transformers_and_its_generation_ends(whole):
    model_dir = latest_checkpoint(whole[2].directory) / "model"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ends = model.generation_config.eos_token_id
    assert load_tokenizer(model_dir).eos_token_id in (ends if isinstance(ends, list) else [ends])


@pytest.mark.few(2)
@pytest.mark.parametrize(("checks", "how"), [(0, Killed), (1, Interrupted), (3, Killed), (3, Interrupted)])
def test_stopped_and_resumed_it_is_the_same_run_bit_for_bit(home, whole, tmp_path, checks, how):
    same_after_stops(run_sft, lambda stop: stage_at(home, tmp_path, interrupt=stop), whole[:2], checks, how)
    # A finished stage that runs again does nothing and says the same.
    assert run_sft(stage_at(home, tmp_path, interrupt=StopAt(0, Killed))) == whole[0]


@pytest.mark.long(reason="the test before it stops and resumes in float32")
@pytest.mark.few(1)
@pytest.mark.parametrize("options", [["precision=bf16"], ["gradient_checkpointing=true"],
                                     ["stages.cold.lora={r: 2, alpha: 8}", "precision=bf16"]], ids=str)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_so_it_is_in_bf16_with_checkpointed_layers_and_with_adapters(home, tmp_path, options):
    if "lora" in options[0]:
        pytest.importorskip("peft", reason="adapters need the package peft")
    stage = stage_at(home, tmp_path / "whole", *options)
    whole, cut = (run_sft(stage), outcome(stage)), tmp_path / "cut"
    assert whole[0]["loss"] < 0.95 * whole[0]["loss_first"]
    same_after_stops(run_sft, lambda stop: stage_at(home, cut, *options, interrupt=stop), whole, 3, Killed)


@pytest.fixture
def parts(home):
    policy, tokenizer = policy_of(load_model(home / "model")), load_tokenizer(home / "model")
    template = Template("chat", tokenizer)
    return policy, list(encode(tokenizer, [(template.render(question), response) for question, response in REPLIES]))


def gradients(policy, samples, window: int = 160, size: int | None = None) -> tuple[dict, torch.Tensor]:
    measured = gradient(policy, cross_entropy, pack(samples, window), size)
    return measured, take_gradient(policy)


def test_the_gradient_is_that_of_the_mean_over_the_tokens_of_responses(home, parts):
    (measured, ours), samples, losses = gradients(*parts), parts[1], []
    model = load_model(home / "model")
    for sample in samples:
        ids = sample.ids.long()[None]
        logits = model(input_ids=ids).logits[0, sample.first - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[0, sample.first :], reduction="none"))
    plain = torch.cat(losses).mean()
    plain.backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert measured["tokens"] == len(torch.cat(losses))
    assert measured["loss"] == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_the_gradient_does_not_depend_on_windows_or_micro_batches(parts):
    policy, samples = parts
    expected, first = gradients(policy, samples)
    for window, size in ((160, 1), (160, 3), (1024, 1), (0, 4)):
        measured, grad = gradients(policy, samples, window, size)
        assert measured["tokens"] == expected["tokens"]
        assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        torch.testing.assert_close(grad, first, rtol=1e-4, atol=1e-6 * first.abs().max().item())


def test_every_epoch_takes_every_sample_once_in_another_order(home, tmp_path):
    stage, steps = stage_at(home, tmp_path), []

    def learn(items):
        steps.append(items)
        for weight in start[0].trained().values():
            weight.grad = torch.zeros_like(weight)
        return {"loss": 1.0, "tokens": 1}

    start = start_of(stage)
    fit(stage, start, list(range(7)), learn)
    taken = [index for items in steps for index in items]
    assert Counter(taken[:7]) == Counter(taken[7:]) == Counter(range(7))
    assert taken[:7] != taken[7:]
    assert list(map(len, steps)) == [4, 4, 4, 2]  # the last step takes the rest


def test_the_learning_rate_warms_up_and_falls_in_a_cosine_to_a_tenth(home, tmp_path):
    settings = stage_at(home, tmp_path, "stages.cold.learning_rate=5e-5", "stages.cold.warmup_steps=4").settings
    rates = [cosine(settings, 25, step) for step in range(25)]
    assert rates[:5] == pytest.approx([1.25e-5, 2.5e-5, 3.75e-5, 5e-5, 5e-5])
    assert rates[14] == pytest.approx((5e-5 + 5e-6) / 2) and rates[-1] == pytest.approx(5e-6)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    settings = stage_at(home, tmp_path, "stages.cold.final_learning_rate=0.0").settings
    assert cosine(settings, 1, 0) == 1e-2 and cosine(settings, 10, 9) == 0


def test_a_sample_longer_than_the_window_is_left_out_and_counted(home, tmp_path, capsys):
    write(tmp_path / "replies.jsonl", [*REPLIES, ("Compute 1+1", " 1+1=2\n" * 40)])
    stage = stage_at(home, tmp_path, f"data.replies.path={tmp_path}/replies.jsonl", "stages.cold.epochs=1")
    summary = run_sft(stage)
    assert (summary["samples"], summary["too_long"]) == (10, 1)
    assert "1 of 11 texts" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("override", "error", "message"), [
    ("window=9", DataError, "'samples' replies: 10 of 10 .* more than 9 tokens .*'window'"),
    ("window=1025", ConfigError, r"'window' is 1025.*the model supports at most 1024 positions"),
])
def test_settings_that_cannot_be_used(home, tmp_path, override, error, message):
    with pytest.raises(error, match=message):
        run_sft(stage_at(home, tmp_path, f"stages.cold.{override}"))


def test_a_loss_that_is_not_finite_ends_the_stage_and_leaves_the_checkpoint(home, tmp_path, monkeypatch):
    calls = iter(range(100))

    def diverging(*given):
        loss = cross_entropy(*given)
        return loss * math.nan if next(calls) > 2 else loss

    monkeypatch.setattr(supervised, "cross_entropy", diverging)
    stage = stage_at(home, tmp_path, "stages.cold.micro_batch_size=null")
    with pytest.raises(TrainingError, match=r"step 3: loss nan"):
        run_sft(stage)
    weights = load_file(latest_checkpoint(stage.directory) / "model/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_tokenizer_that_appends_its_end_token_teaches_the_same(home, whole, tmp_path):
    save_model(tmp_path / "model", tokenizer=make_tokenizer(appends_end=True))
    stage = stage_at(home, tmp_path, f"stages.base.path={tmp_path}/model")
    assert run_sft(stage) == whole[0]
    assert outcome(stage)["weights"] == whole[1]["weights"]


PRETRAIN = """
run_dir: {directory}/run
precision: fp32
import_from: ["{examples}"]
data: {{sums: {{kind: function, function: "tiny_world:sums"}}}}
checkpoint: {{supervised_every: 6, keep: 1}}
stages:
  base:
    kind: pretrain
    architecture:
      function: tiny_world:architecture
      options: {{hidden_size: 16, intermediate_size: 32, layers: 1, heads: 2, text: {{worked: 0.5}}}}
    corpus: {{function: "tiny_world:corpus", options: {{worked: 0.5}}}}
    steps: 20
    batch_size: 2
    window: 64
    learning_rate: 3.0e-2
"""


def pretrain_at(directory: Path, *overrides: str, interrupt=None) -> Stage:
    return stage_of(PRETRAIN.format(directory=directory, examples=EXAMPLES), "base", directory, overrides, interrupt)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    stage = pretrain_at(tmp_path_factory.mktemp("pretrained"))
    return run_pretrain(stage), outcome(stage), stage


def test_a_new_model_learns_the_text(pretrained):
    summary, _, stage = pretrained
    lines = read_lines(stage.directory / "metrics.jsonl")
    assert summary["steps"] == len(lines) == 20 and summary["loss"] < 0.9 * summary["loss_first"]
    model = load_model(latest_checkpoint(stage.directory) / "model")
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert all(line["tokens"] <= 2 * 63 for line in lines)
    # Warm-up over 50 steps, and a linear fall.
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [3e-2 * (step + 1) / 50 * (1 - step / 20) for step in range(20)])


@pytest.mark.few(1)
@pytest.mark.parametrize(("checks", "how"), [(0, Killed), (9, Killed), (9, Interrupted)])
def test_pretraining_continues_as_if_never_stopped(pretrained, tmp_path, checks, how):
    same_after_stops(run_pretrain, lambda stop: pretrain_at(tmp_path, interrupt=stop), pretrained[:2], checks, how)


@pytest.mark.parametrize(("override", "message"), [
    ("stages.base.window=513", r"'window' is 513.*at most 512"),
    ("template=chat", "'template' is 'chat'"),
    ("stages.base.architecture.options.heads=3", r"architecture'.*'heads': 3"),
    ("stages.base.corpus.options.worked=2.0", r"'corpus'.*'worked' is 2\.0"),
    ("stages.base.corpus.options={colour: 1}", r"'corpus'.*colour"),
])
def test_what_cannot_be_pretrained_is_refused_before_any_work(tmp_path, override, message):
    stage = pretrain_at(tmp_path, override)
    with pytest.raises(ConfigError, match=message):
        run_pretrain(stage)
    assert not list(stage.directory.iterdir())
