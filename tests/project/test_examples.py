"""Every file of examples/ is short, says its command and is in the table. Those without a trainer show what is true.

test_example_trainers has the others.
"""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from backends import host_code
from example_runs import EXAMPLES, commands, load_example, run_example
from torch.utils._python_dispatch import TorchDispatchMode

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
        given = {*commands(name), f"python examples/{name}.py --help"}
        assert given & set(re.findall(r"`([^`]+)`", text)), name
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


class Widths(TorchDispatchMode):
    """Sees the last dimension of every result with three dimensions, such as (batch, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 3:
            self.seen.add(result.shape[-1])
        return result


@of_others
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_distillation_learns_from_hidden_states(divergence: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with Widths() as widths:
        names = run_example("distill_hidden_states", "--steps", 40, "--divergence", divergence)
    assert 24 in widths.seen and names["VOCAB"] not in widths.seen  # hidden states, and no logits
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

    config = yaml.safe_load((EXAMPLES / "verl_gspo/r1_gspo.yaml").read_text())
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
    score = load_example("verl_gspo/sums")[reward["name"]]
    assert reward["path"].endswith("examples/verl_gspo/sums.py")
    good, bad = (f"<think> so </think> <answer> {answer} </answer>" for answer in (12, 13))
    assert [score("sums", text, "12")["score"] for text in (good, bad, "\\boxed{12}", "")] == [1.2, 0.2, 1.0, 0.0]
