"""Every file of examples/ is short, says its command, is in the table, and does what it shows, not only runs."""

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
from example_runs import EXAMPLES, commands, load_example, run_example

ROOT = EXAMPLES.parent
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
of_others = pytest.mark.filterwarnings("default")  # warnings of transformers and TRL
pytestmark = host_code


# ---- what all examples have in common -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_its_command(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80
    found = commands(name)
    recipes = [command.split()[-1] for command in found if command.startswith("r1kernels train ")]
    assert any(f"examples/{name}.py" in command.split() for command in found) or recipes
    for recipe in recipes:
        assert f"{name}:" in (ROOT / recipe).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_test_runs_the_example(name: str) -> None:
    called = re.compile(rf'\b(?:run_example|load_example)\(\s*"{name}"|^from {name} import|"examples/{name}\.py', re.M)
    assert [path for path in (ROOT / "tests").rglob("test_*.py") if called.search(path.read_text())]


def test_the_table_has_every_example_and_its_command() -> None:
    text = (EXAMPLES / "README.md").read_text()
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    linked = re.findall(r"\]\((\w+)(?:\.py|/?)\)", text)
    assert sorted(linked) == sorted({*NAMES, *folders})
    for name in NAMES:
        assert f"`{commands(name)[0]}`" in text or f"`{commands(name)[1]}`" in text, name
    for path in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXAMPLES / path).exists(), path


# ---- mathematics ----------------------------------------------------------------------------------------------


def test_the_objective_of_single_tokens_has_the_gradients_of_autograd() -> None:
    names = run_example("token_local_objective", "--tokens", 40)
    for ours, plain in zip(names["found"], names["expected"], strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    # Both terms of the loss count in this batch, and so do bounds on the ratio.
    hidden, weight, token_ids, advantages, old_logprobs = names["batch"]
    logprobs = (hidden @ weight.T).double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    ratio = (logprobs.gather(-1, token_ids[:, None])[:, 0] - old_logprobs).exp()
    assert (entropy < names["LEAST_ENTROPY"]).any() and (entropy > names["LEAST_ENTROPY"]).any()
    assert ((ratio > 1.3) & (advantages > 0)).any() and ((ratio < 0.7) & (advantages < 0)).any()


@of_others
def test_the_ratio_is_one_over_what_sampling_kept() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    names = run_example("sampling_mask_replay", "--top-p", 0.7, "--temperature", 0.9)
    replayed, whole = names["ratios"]["what sampling kept"], names["ratios"]["the whole vocabulary"]
    assert (replayed - 1).abs().max() < 1e-4
    # Over the vocabulary, the ratio is the probability of the set: between top-p and 1, from dense logits.
    logits = names["model"](names["ids"]).logits[:, names["start"] - 1 : -1] / 0.9
    rows = zip(logits.double().softmax(-1).flatten(0, 1), whole.flatten(), strict=True)
    sets = [names["kept"][step][row] for row in range(whole.shape[0]) for step in range(whole.shape[1])]
    for (p, ratio), kept in zip(rows, sets, strict=True):
        assert ratio.item() == pytest.approx(p[kept].sum().item(), rel=1e-4) and ratio > 0.699
        assert p[kept].sum() - p[kept].min() < 0.701  # no smaller set of the likeliest tokens is enough
    assert whole.mean() < 0.9 and len({len(kept) for kept in sets}) > 1


@of_others
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_distillation_learns_from_hidden_states(divergence: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    names = run_example("distill_hidden_states", "--steps", 40, "--divergence", divergence)
    assert names["teacher"].config.hidden_size != names["student"].config.hidden_size
    assert names["history"][-1] < 0.6 * names["history"][0]
    # The first loss is that of the dense logits of the same models.
    transformers.set_seed(0)
    torch.manual_seed(0)
    teacher, student = names["tiny_model"](48), names["tiny_model"](24)
    ids = torch.randint(names["VOCAB"], (8, 16))
    q, p = (model(ids).logits.double().log_softmax(-1) for model in (teacher, student))
    q, p = (q, p) if divergence == "forward_kl" else (p, q)
    assert names["history"][0] == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-4)


# ---- trainers -------------------------------------------------------------------------------------------------


@of_others
def test_fine_tuning_learns_to_count(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    names = run_example("transformers_sft", "--out", tmp_path)
    assert names["losses"][0] > 2 and names["losses"][-1] < 0.5
    ids = torch.tensor([[7, 8, 9], [60, 61, 62]])
    model = names["model"].eval()
    found = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert found[:, 3:].tolist() == [[10, 11, 12], [63, 0, 1]]


@of_others
def test_trl_learns_and_both_ways_agree(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from r1kernels.integrations.trl import R1GRPOTrainer, unpatch_trl

    try:
        one_pass, patched = (run_example("trl_grpo", "--out", tmp_path, *more)["history"] for more in ([], ["--patch"]))
    finally:
        unpatch_trl()
    assert one_pass == pytest.approx(patched, abs=0.1) and R1GRPOTrainer
    assert one_pass[0] < 0.6 and one_pass[-1] > 1.3  # of 2, for a right answer in its tags


@of_others
def test_the_plain_loop_learns() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    names = load_example("plain_loop")
    torch.manual_seed(0)
    rewards = names["train"](names["tiny_model"](), 12)
    assert rewards[0] < 0.1 and rewards[-1] > 0.15, rewards  # with other random numbers, from 0.3 to 0.6


@of_others
@pytest.mark.parametrize("ends", [None, 7, [0, 7, 9]])
def test_the_plain_loop_scores_no_padding(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
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


@of_others
def test_the_lightning_module_learns() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed; it is no dependency")
    names = load_example("lightning_module")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    assert names["main"](steps=20, **quiet)["perplexity"] < 16  # of 64 at first


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
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
    history = run_example("fsdp2", "--save", tmp_path / "one.pt")["history"]
    printed = [float(loss) for loss in re.findall(r"loss (-?[\d.]+)", completed.stdout)]
    assert printed == pytest.approx(history, abs=2e-6) and history[-1] < history[0] - 0.1
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert one.keys() == two.keys() and "lm_head.weight" in one
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


# ---- rewards and data -----------------------------------------------------------------------------------------


def test_rewards_without_torch() -> None:
    """In a process that has not imported torch."""
    pytest.importorskip("mpmath", reason="mpmath is not installed")
    completed = subprocess.run(
        [sys.executable, "-W", "error", "examples/rewards_alone.py"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert completed.returncode == 0, completed.stderr
    found = dict(line.split(": ", 1) for line in completed.stdout.splitlines())
    assert found == {
        "accuracy": "[1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, None]",
        "format": "[1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]",
        "language": "[1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]",
        "short_thoughts": "[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]",
        "accuracy + 0.2 format": "[1.2, 0.2, 1.0, 1.2, 1.2, 0.2, 0.0, 0.2]",
        "torch was imported": "False",
    }


def test_sums_of_one_digit_are_held_out() -> None:
    problems = load_example("one_digit_sums")["problems"]
    train, held_out = problems("train", None, seed=0), problems("test", None, seed=5)
    assert (len(train), len(held_out)) == (64, 16) and held_out == problems("test", None, seed=0)
    asked = [row["question"] for row in (*train, *held_out)]
    assert len(set(asked)) == 80 and train[:3] == problems("train", 3, seed=1)
    for row in train:
        a, b = re.search(r"What is (\d) \+ (\d)\?$", row["question"]).groups()
        assert int(a) + int(b) == int(row["answer"]) and (a, b) != ("2", "2")


def test_the_config_for_verl_has_names_and_keys_of_the_adapter() -> None:
    """test_verl_example gives the config to verl, where verl is installed."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    from r1kernels.integrations.verl import ESTIMATORS, LOSSES

    config = yaml.safe_load((EXAMPLES / "verl/r1_gspo.yaml").read_text())
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/migrate/verl.md").read_text(), re.DOTALL)

    def assert_has(part: dict[str, Any], keys: dict[str, Any], path: str) -> None:
        for key, value in keys.items():
            assert key in part, f"{path}{key}"
            if isinstance(value, dict):
                assert_has(part[key], value, f"{path}{key}.")

    assert_has(config, yaml.safe_load(block), "")
    assert config["actor_rollout_ref"]["model"]["fused_kernel_options"]["impl_backend"] == "r1kernels"
    assert config["actor_rollout_ref"]["actor"]["policy_loss"]["loss_mode"] in LOSSES
    assert config["algorithm"]["adv_estimator"] in ESTIMATORS
    reward = config["reward"]["custom_reward_function"]
    score = load_example("verl/sums")[reward["name"]]
    assert reward["path"].endswith("examples/verl/sums.py")
    good, bad = (f"<think> so </think> <answer> {answer} </answer>" for answer in (12, 13))
    assert [score("sums", text, "12")["score"] for text in (good, bad, "\\boxed{12}", "")] == [1.2, 0.2, 1.0, 0.0]


# ---- a model that the reader names ------------------------------------------------------------------------------


@of_others
def test_a_model_from_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, _ = load_example("transformers_sft")["tiny_model"]()
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(61))])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    folder, text = tmp_path / "model", tmp_path / "text"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text("".join(" ".join(f"w{(start + n) % 61}" for n in range(5 + start % 4)) + "\n"
                            for start in range(20)))

    rows = run_example("transformers_sft", "--model", folder, "--text", text, "--out", tmp_path)["rows"]
    assert rows[1]["labels"] == [*range(4, 10), 1] and len(rows) == 20
    same = ["--teacher", folder, "--student", folder, "--text", text, "--steps", 3]
    assert run_example("distill_hidden_states", *same)["history"][0] == pytest.approx(0, abs=1e-5)
    ratios = run_example("sampling_mask_replay", "--model", folder)["ratios"]
    assert (ratios["what sampling kept"] - 1).abs().max() < 1e-4
    assert len(run_example("plain_loop", "--model", folder, "--steps", 2)["chosen"].config.architectures) == 1
    assert "mean reward" in capsys.readouterr().out
