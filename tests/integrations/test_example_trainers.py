"""The examples that train with transformers, TRL, Lightning and FSDP2: they learn, and agree with what they say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import host_code
from example_runs import commands, load_example, run_example

import r1kernels

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = [host_code, pytest.mark.filterwarnings("default")]  # those of transformers and TRL
ROOT = Path(__file__).resolve().parents[2]


def test_fine_tuning_learns_to_count(tmp_path: Path) -> None:
    names = run_example("transformers_sft", "--out", tmp_path)
    assert names["losses"][0] > 2 and names["losses"][-1] < 0.5
    ids = torch.tensor([[7, 8, 9], [60, 61, 62]])
    assert names["model"](torch.tensor([[7, 8]]), labels=torch.tensor([[7, 8]])).logits is None
    model = names["model"].eval()
    found = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert found[:, 3:].tolist() == [[10, 11, 12], [63, 0, 1]]


def test_trl_learns_and_both_ways_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from r1kernels.integrations import trl as adapter

    calls: list[str] = []

    def counting(name: str) -> Any:
        function = getattr(r1kernels, name)
        return lambda *args, **keywords: (calls.append(name), function(*args, **keywords))[1]

    for name in ("linear_grpo_loss", "linear_token_logprobs_and_entropy"):
        monkeypatch.setattr(r1kernels, name, counting(name))
    one_pass = run_example("trl_grpo", "--out", tmp_path)["history"]
    assert set(calls) == {"linear_grpo_loss"}
    calls.clear()
    try:
        patched = run_example("trl_grpo", "--out", tmp_path, "--patch")["history"]
    finally:
        adapter.unpatch_trl()
    assert set(calls) == {"linear_token_logprobs_and_entropy"}
    assert one_pass == pytest.approx(patched, abs=0.1)
    assert one_pass[0] < 0.6 and one_pass[-1] > 1.3  # of 2, for a right answer in its tags


def test_the_plain_loop_learns() -> None:
    names = load_example("plain_loop")
    torch.manual_seed(0)
    rewards = names["train"](names["tiny_model"](), 12)
    assert rewards[0] < 0.1 and rewards[-1] > 0.15, rewards  # with other random numbers, from 0.3 to 0.6


@pytest.mark.parametrize("ends", [None, 7, [0, 7, 9]])
def test_the_plain_loop_scores_no_padding(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, tiny_model = (load_example("plain_loop")[name] for name in ("train", "tiny_model"))
    torch.manual_seed(1)
    model, ended = tiny_model(), 0
    model.generation_config.eos_token_id = ends
    logprobs = train.__globals__["token_logprobs_and_entropy"]

    def spy(model: Any, targets: torch.Tensor, input_ids: torch.Tensor) -> Any:
        nonlocal ended
        for scored, ids in zip(targets.tolist(), input_ids.tolist(), strict=True):
            completion = ids[3:]
            places = [i for i, token in enumerate(completion) if token in ([ends] if ends == 7 else ends or [])]
            kept = completion[: places[0] + 1] if places else completion
            ended += bool(places)
            assert scored == [-100, -100, *kept, *[-100] * (len(ids) - 2 - len(kept))]
        return logprobs(model, targets, input_ids=input_ids)

    monkeypatch.setitem(train.__globals__, "token_logprobs_and_entropy", spy)
    train(model, 1)
    assert (ended > 0) == (ends is not None)


def plain_grpo_loss(logits: torch.Tensor, ids: torch.Tensor, ends: list[int], old: Any) -> tuple[torch.Tensor, ...]:
    """The loss of plain_loop by hand, from all logits of prompts of 3 tokens in groups of 16; its log-probs."""
    log_p = logits[:, 2:-1].log_softmax(-1)
    completions = ids[:, 3:]
    logprobs = log_p.gather(-1, completions[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    mask = torch.ones_like(logprobs)
    for row, completion in zip(mask, completions.tolist(), strict=True):
        if places := [place for place, token in enumerate(completion) if token in ends]:
            row[places[0] + 1 :] = 0
    rewards = (completions == 7).float().mean(-1).view(2, 16)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    ratio = (logprobs - (logprobs.detach() if old is None else old)).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    per_token = (-gain - 0.01 * entropy) * mask
    assert 0 < mask.sum() < mask.numel() and advantages.any()
    return (per_token.sum(1) / mask.sum(1)).mean(), logprobs.detach()


def test_the_plain_loop_has_the_gradient_of_the_dense_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both updates of a step: in the second, ratios are not 1 and some are clipped."""
    train, tiny_model = (load_example("plain_loop")[name] for name in ("train", "tiny_model"))
    torch.manual_seed(1)
    model, ends, updates = tiny_model(), [0, 7, 9], []
    dense = transformers.LlamaForCausalLM(model.config)
    model.generation_config.eos_token_id = ends
    logprobs = train.__globals__["token_logprobs_and_entropy"]

    def spy(model: Any, targets: torch.Tensor, input_ids: torch.Tensor) -> Any:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        updates.append((weights, input_ids, {}))
        return logprobs(model, targets, input_ids=input_ids)

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: updates[-1][2].update({name: parameter.grad.clone()}))
    monkeypatch.setitem(train.__globals__, "token_logprobs_and_entropy", spy)
    train(model, 1)
    assert len(updates) == 2
    old = None
    for weights, ids, found in updates:
        dense.load_state_dict(weights)
        dense.zero_grad()
        loss, values = plain_grpo_loss(dense(ids).logits, ids, ends, old)
        loss.backward()
        old = values if old is None else old
        for name, parameter in dense.named_parameters():
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=2e-5 * size + 1e-8,
                                       msg=lambda text, name=name: f"{name}: {text}")


def test_the_lightning_module_learns() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
    names = load_example("lightning_module")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    assert names["main"](steps=20, **quiet)["perplexity"] < 16  # of 64 at first


def plain_losses(config: Any, share: Any, steps: int) -> list[float]:
    """The training of fsdp2 in one process without r1kernels: dense logits, and DAPO's loss by hand."""
    torch.manual_seed(0)
    model, (ids, mask, advantages) = transformers.LlamaForCausalLM(config), share
    optimizer, old, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), None, []
    for _ in range(steps):
        logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        old = logprobs.detach() if old is None else old
        ratio = (logprobs - old).exp()
        per_token = -torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
        loss = (per_token * mask[:, 1:]).sum() / mask[:, 1:].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow(reason="starts three programs")
def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    documented = shlex.split(commands("fsdp2")[0])
    assert documented == ["torchrun", "--nproc-per-node", "2", "examples/fsdp2.py"]
    # --standalone chooses a free port, because another test may run torchrun at the same time.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *documented[1:]]
    completed = subprocess.run(
        [*command, "--save", str(tmp_path / "two.pt")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)})
    assert completed.returncode == 0, completed.stdout + completed.stderr
    names = run_example("fsdp2", "--save", tmp_path / "one.pt")
    history = names["history"]
    assert history == pytest.approx(plain_losses(names["model"].config, names["my_share"](0, 1), 6), abs=1e-5)
    printed = [float(loss) for loss in re.findall(r"loss (-?[\d.]+)", completed.stdout)]
    assert printed == pytest.approx(history, abs=2e-6) and history[-1] < history[0] - 0.1
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert one.keys() == two.keys() and "lm_head.weight" in one
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


# ---- a model that the reader names ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a tokenizer on disk, in the place of one that a reader names, and a file `text`."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = tmp_path_factory.mktemp("model")
    load_example("transformers_sft")["tiny_model"]()[0].save_pretrained(path)
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(61))])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    lines = [" ".join(f"w{(start + n) % 61}" for n in range(5 + start % 4)) for start in range(20)]
    (path / "text").write_text("\n".join(lines))
    return path


def test_fine_tuning_of_a_model_from_a_directory(folder: Path, tmp_path: Path) -> None:
    names = run_example("transformers_sft", "--model", folder, "--text", folder / "text", "--out", tmp_path)
    assert names["rows"][1]["labels"] == [*range(4, 10), 1] and len(names["rows"]) == 20
    batch = names["pad"](names["rows"][:2])
    assert batch["labels"][0].tolist() == [*range(3, 8), 1, -100] and batch["attention_mask"][0].sum() == 6


def test_trl_with_a_model_from_a_directory(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    names = run_example("trl_grpo", "--model", folder, "--steps", 5, "--out", tmp_path)
    assert names["history"] == [0.0]  # this model writes no tags


def test_other_examples_with_a_model_from_a_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ["--teacher", folder, "--student", folder, "--text", folder / "text", "--steps", 3]
    assert run_example("distill_hidden_states", *same)["history"][0] == pytest.approx(0, abs=1e-5)
    ratios = run_example("sampling_mask_replay", "--model", folder)["ratios"]
    assert (ratios["what sampling kept"] - 1).abs().max() < 1e-4
    assert run_example("plain_loop", "--model", folder, "--steps", 2)["chosen"].config.vocab_size == 64
    assert "step 2: mean reward" in capsys.readouterr().out
