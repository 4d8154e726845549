"""Distillation: of samples as the paper does it, and of whole distributions."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rl_cases import policy_of, take_gradient
from supervised_cases import make_tokenizer, save_model, stage_of, write_rows
from transformers import AutoModelForCausalLM

from r1kernels.train.errors import ConfigError
from r1kernels.train.model import load_model, load_tokenizer
from r1kernels.train.packing import pack
from r1kernels.train.stage import Stage
from r1kernels.train.supervised import divergence_loss, encode, gradient, run_distill

RECIPE = """
run_dir: {directory}/run
precision: fp32
threads: 1
template: chat
data:
  replies: {{kind: jsonl, path: {directory}/replies.jsonl, test_path: {directory}/test.jsonl}}
checkpoint: {{supervised_every: 2, keep: 1}}
stages:
  base: {{kind: model, path: {directory}/student}}
  big: {{kind: model, path: {directory}/teacher}}
  padded: {{kind: model, path: {directory}/padded}}
  other: {{kind: model, path: {directory}/other}}
  small:
    {{kind: distill, model: base, samples: [replies], epochs: 2, batch_size: 4, window: 128, micro_batch_size: 1,
     learning_rate: 1.0e-2}}
"""
LOGITS = ("method=logits", "teacher=big")
REPLIES = [(f"Compute {a}+{a}", f" <think>{a}+{a}={2 * a}</think>\n<answer>{2 * a}</answer>") for a in range(6)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A student, a wider teacher, one with more rows in its head than tokens, and one of another vocabulary."""
    directory = tmp_path_factory.mktemp("distill")
    save_model(directory / "student")
    save_model(directory / "teacher", 1, hidden_size=32, num_hidden_layers=2)
    save_model(directory / "padded", 1, rows=len(make_tokenizer()) + 11)
    save_model(directory / "other", 1, tokenizer=make_tokenizer("é"))
    write_rows(directory / "replies.jsonl", [{"question": q, "response": r} for q, r in REPLIES])
    write_rows(directory / "test.jsonl", [{"question": "Compute 9+9", "answer": "18"}])
    return directory


def stage_at(home: Path, directory: Path, *keys: str) -> Stage:
    return stage_of(RECIPE.format(directory=home), "small", directory, [f"stages.small.{key}" for key in keys])


def test_of_samples_it_is_fine_tuning_on_them(home, tmp_path):
    stage = stage_at(home, tmp_path)
    assert stage.settings.method == "samples"
    summary = run_distill(stage)
    assert summary["samples"] == 6 and summary["steps"] == 3 and summary["loss"] < summary["loss_first"]


@pytest.mark.parametrize("teacher_name", ["teacher", "padded"])
def test_of_logits_the_gradient_is_that_of_the_divergence_at_every_token_of_responses(home, teacher_name):
    student, teacher = load_model(home / "student"), load_model(home / teacher_name).requires_grad_(False)
    policy, frozen = policy_of(load_model(home / "student")), policy_of(copy.deepcopy(teacher))
    tokenizer = load_tokenizer(home / "student")
    samples = list(encode(tokenizer, [(f"{question}:", response) for question, response in REPLIES]))
    loss = partial(divergence_loss, frozen, len(tokenizer))
    measured = gradient(policy, loss, pack(samples, 128), 1)
    ours = take_gradient(policy)

    values = []
    for sample in samples:
        ids = sample.ids.long()[None]
        logits = [model(input_ids=ids).logits[0, sample.first - 1 : -1] for model in (student, teacher)]
        log_p, log_q = (z[:, : len(tokenizer)].log_softmax(-1) for z in logits)
        values.append(F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1))
    plain = torch.cat(values).mean()
    plain.backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert measured["loss"] == pytest.approx(plain.item(), rel=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


def test_the_student_comes_closer_to_a_teacher_that_stays_as_it_is(home, tmp_path):
    stage = stage_at(home, tmp_path, *LOGITS, "epochs=10")
    before = AutoModelForCausalLM.from_pretrained(home / "teacher").state_dict()
    summary = run_distill(stage)
    assert summary["loss"] < 0.7 * summary["loss_first"]
    after = AutoModelForCausalLM.from_pretrained(stage.model_path("big")).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(home, tmp_path):
    summary = run_distill(stage_at(home, tmp_path, "method=logits", "teacher=base", "epochs=1"))
    assert abs(summary["loss_first"]) < 1e-6


def test_another_vocabulary_is_refused(home, tmp_path):
    with pytest.raises(ConfigError, match=r"differ, .*\('é', \d+\)"):
        run_distill(stage_at(home, tmp_path, "method=logits", "teacher=other"))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "."
    save_model(tmp_path / "other", tokenizer=tokenizer)
    keys = [f"stages.other.path={tmp_path}/other", "stages.small.method=logits", "stages.small.teacher=other"]
    with pytest.raises(ConfigError, match="end of text"):
        run_distill(stage_of(RECIPE.format(directory=home), "small", tmp_path / "b", keys))
