"""The trainer on real problems: GSM8K, a tiny Qwen2 model, and a tokenizer trained on the problems themselves."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint
from r1kernels.train.cli import main
from r1kernels.train.data import load_gsm8k
from r1kernels.train.prompt import render
from r1kernels.train.rewards import Sample, Scorer, ScoringConfig

ROOT = Path(__file__).resolve().parents[1]
FORMATS = (
    "<think>so</think> <answer>{}</answer>",
    r"so it is \boxed{{{}}}.",
    "so\n#### {}",
    r"<think>so</think> <answer>It is \boxed{{{}}}.</answer>",
    "<think>so</think> <answer>It is\n#### {}</answer>",
    r"<think>\boxed{{17}}, or #### 18</think> It is $\boxed{{{}}}$, I think.",
)


@pytest.fixture(scope="module")
def data():
    named = os.environ.get("R1KERNELS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        if not (folder / name).is_file():
            pytest.skip(f"no {name} in {folder}; R1KERNELS_DATA names a directory that holds GSM8K")
    return folder


@pytest.fixture(scope="module")
def scorer():
    with Scorer({"accuracy": 1.0}, ScoringConfig(timeout_s=60)) as scorer:
        yield scorer


@pytest.mark.parametrize("split, form", [*(("test", form) for form in FORMATS), ("train", FORMATS[0])])
def test_gold_answers_are_right_and_perturbed_ones_wrong(data, scorer, form, split):
    problems = load_gsm8k(data / f"gsm8k_{split}.jsonl")
    assert len(problems) == {"train": 7473, "test": 1319}[split]

    def accuracy(change):
        samples = [
            Sample(render(problem.question), form.format(change(problem.answer)), problem.answer)
            for problem in problems
        ]
        return set(scorer.score(samples).parts["accuracy"])

    for right in (
        str, "${}".format, "{}.00".format, "{} dollars".format, "{}.".format, "The answer is {}!".format,
        "x = {}".format,
        lambda gold: f"{int(gold):,}", lambda gold: f"${int(gold):,}.00", lambda gold: f"**{int(gold):,}** apples",
        lambda gold: rf"\${int(gold):,}".replace(",", "{,}"), lambda gold: f"{int(gold):,}".replace(",", " "),
    ):  # fmt: skip
        assert accuracy(right) == {1.0}
    for wrong in (
        "minus one more than {}".format, "{0}, 1{0}".format,
        "{}1".format, "1{}".format, "{}.5".format, lambda gold: str(int(gold) + 1), "{0} or 1{0}".format,
    ):  # fmt: skip
        assert accuracy(wrong) == {0.0}


def test_gold_answers_reach_the_judge_too(data, scorer):
    problems = load_gsm8k(data / "gsm8k_test.jsonl")[:100]
    for shift, value in ((0, 1.0), (1, 0.0)):
        answers = [rf"\frac{{{2 * (int(problem.answer) + shift)}}}{{2}}" for problem in problems]
        samples = [
            Sample("", form.format(answer), problem.answer)
            for problem, answer in zip(problems, answers, strict=True)
            for form in FORMATS
        ]
        scores = scorer.score(samples)
        assert scores.parts["accuracy"] == [value] * len(samples)
        assert (scores.timeouts, scores.crashes) == (0, 0)


def make_tokenizer(path):
    """Qwen2's own kind of tokenizer: AutoTokenizer expects no other beside a Qwen2 model."""
    rows = map(json.loads, path.read_text().splitlines())
    texts = (row[key] for row in rows for key in ("question", "answer"))
    empty = Qwen2Tokenizer(pad_token="<pad>", eos_token="<eos>", unk_token="<eos>")
    return empty.train_new_from_iterator(texts, 8192)


def make_model(tokenizer):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def teach(model, tokenizer, problems):
    """Has the model memorise these problems: a random one would never write an answer to extract."""
    heads = [tokenizer(render(problem.question))["input_ids"] for problem in problems]
    tails = [
        [*tokenizer(f" <think>so</think> <answer>{problem.answer}</answer>")["input_ids"], tokenizer.eos_token_id]
        for problem in problems
    ]
    ids = torch.full((len(problems), max(map(len, heads)) + max(map(len, tails))), tokenizer.pad_token_id)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for index, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[index, : len(head) + len(tail)] = torch.tensor(head + tail)
        scored[index, len(head) - 1 : len(head) + len(tail) - 1] = True
    targets = ids.roll(-1, dims=1)[scored]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        hidden = model.model(input_ids=ids).last_hidden_state[scored]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets)
        if loss < 0.05:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pytest.fail(f"the answers were not learnt: loss {loss}")


@pytest.fixture
def one_thread():
    """On models this small, threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_whole_steps_on_real_problems(data, one_thread, tmp_path, capsys):
    tokenizer = make_tokenizer(data / "gsm8k_train.jsonl")
    assert len(tokenizer) == 8192
    for split, count in (("train", 8), ("test", 4)):
        rows = sorted((data / f"gsm8k_{split}.jsonl").read_text().splitlines(), key=len)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows[:count]))
    model = make_model(tokenizer)
    teach(model, tokenizer, load_gsm8k(tmp_path / "train.jsonl") + load_gsm8k(tmp_path / "test.jsonl"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    settings = {
        "run_dir": tmp_path / "run",
        "stages.base.path": tmp_path / "model",
        "device": "cpu",
        "data.gsm8k.path": tmp_path / "train.jsonl",
        "data.gsm8k.test_path": tmp_path / "test.jsonl",
        "stages.r1_zero.steps": 2,
        "stages.r1_zero.questions": 4,
        "stages.r1_zero.group_size": 4,
        "stages.r1_zero.minibatches": 2,
        "stages.r1_zero.max_new_tokens": 24,
        "eval.every": 2,
        "eval.max_new_tokens": 24,
        "scoring.workers": 1,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    with pytest.raises(SystemExit) as done:
        main(["train", str(ROOT / "recipes" / "gsm8k_zero.yaml"), "--plain", "--set", *overrides])
    assert done.value.code == 0, capsys.readouterr()

    stage = tmp_path / "run" / "r1_zero"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1]
    for line in steps:
        assert all(math.isfinite(value) for value in line.values())
        assert (line["unscorable"], line["timeouts"], line["crashes"]) == (0, 0, 0)
        assert line["reward"] == pytest.approx(line["reward_accuracy"] + line["reward_format"])
        assert line["first_ratio_deviation"] < 1e-4
    # Answers to real problems were sampled, extracted and found right or wrong.
    assert steps[0]["reward_accuracy"] > 0
    assert steps[0]["reward_format"] > 0
    assert steps[0]["pass_at_1"] > 0
    assert any("pass_at_1" in line for line in lines if line["step"] == 2)

    checkpoint = load_checkpoint(latest_checkpoint(stage))
    assert checkpoint.state["step"] == 2
    trained = AutoModelForCausalLM.from_pretrained(checkpoint.model_dir)
    reloaded = AutoTokenizer.from_pretrained(checkpoint.model_dir)
    assert type(trained) is Qwen2ForCausalLM
    text = render("How many of 48 clips, at $1.50 each, are 1,234?")
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    before = dict(model.named_parameters())
    change = [(value - before[name]).abs().max().item() for name, value in trained.named_parameters()]
    # Four updates of AdamW move a parameter by about four learning rates at most.
    assert 0 < max(change) < 5e-5
