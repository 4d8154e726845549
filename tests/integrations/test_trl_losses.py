"""Steps with TRL's loss and with the one pass, on the same batches of a tiny model: equal parameters and metrics."""

import copy
from typing import Any

import pytest
import torch
from test_trl_rewards import tiny_model_and_tokenizer
from torch import Tensor
from trl_losses import LOSSES, OPTIONS, trl_weights, with_settings

from r1kernels import group_advantages, multi_reward_advantages, testing
from r1kernels.integrations.trl import R1GRPOTrainer

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # TRL's own

STEPS, LENGTH, GENERATIONS = 6, 6, 4


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [len(text.split()) / LENGTH for text in completions]


def answers(completions: list[str], **_: Any) -> list[float]:
    return [float("2" in text) for text in completions]


def make_trainer(kind: type, directory: Any, **arguments: Any) -> Any:
    import datasets

    model, tokenizer = tiny_model_and_tokenizer()
    rows = [{"prompt": text} for text in ("1 + 1 =", "so", "<answer>3</answer>", "so so")]
    fixed = {"max_steps": STEPS, "per_device_train_batch_size": 8, "num_generations": GENERATIONS, "report_to": [],
             "max_completion_length": LENGTH, "gradient_checkpointing": False, "use_cpu": True, "save_strategy": "no",
             "disable_tqdm": True, "seed": 3, "bf16": False}
    return kind(
        model=model, processing_class=tokenizer, reward_funcs=[lengths, answers],
        args=trl.GRPOConfig(output_dir=str(directory), **fixed | arguments),
        train_dataset=datasets.Dataset.from_list(rows * 8))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Tensor]], dict[str, Tensor]]:
    """(a trainer, the batches of its six steps, the parameters before them)."""
    batches: list[dict[str, Any]] = []

    class Recorder(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            batches.append(copy.deepcopy(inputs))
            return super()._compute_loss(model, inputs)

    trainer = make_trainer(Recorder, tmp_path_factory.mktemp("trl"))
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    trainer.model.load_state_dict(start)
    trainer.model.train()
    rng = testing.generator(0)

    def noise(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, generator=rng)

    for inputs in batches:
        mask, ids = inputs["completion_mask"], inputs["completion_ids"]
        # Equal prefixes would have equal entropies, and rounding would decide which of them a filter keeps.
        inputs["prompt_ids"] = torch.randint(1, 6, inputs["prompt_ids"].shape, generator=rng)
        inputs["prompt_mask"] = torch.ones_like(inputs["prompt_mask"])
        with torch.no_grad():
            logps = trainer._get_per_token_logps_and_entropies(
                trainer.model, torch.cat([inputs["prompt_ids"], ids], 1),
                torch.cat([inputs["prompt_mask"], mask], 1), ids.shape[1])[0]
        inputs["old_per_token_logps"] = (logps + noise(logps, 0.2)) * mask
        inputs["ref_per_token_logps"] = (logps + noise(logps, 0.2)) * mask
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + noise(logps, 0.3) * mask
    batches = list(batches)  # the trainer records no more
    assert len({int(inputs["completion_mask"].sum()) for inputs in batches}) > 1 and len(batches) == STEPS
    return trainer, batches, start


def after(recorded: Any, kind: type, steps: int) -> tuple[Tensor, dict[str, list[float]]]:
    """(the parameters, the metrics) after steps with the loss of one class of trainers."""
    trainer, batches, start = recorded
    model = trainer.model
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03 if trainer.loss_type == "luspo" else 0.5)
    trainer.current_gradient_accumulation_steps = 2
    trainer._metrics["train"].clear()
    plain, trainer.__class__ = trainer.__class__, kind
    for number in range(steps):
        optimizer.zero_grad()
        inputs = dict(batches[number % len(batches)])
        if trainer.use_vllm:
            inputs["importance_sampling_ratio"] = trl_weights(trainer, inputs)
        trainer._compute_loss(model, inputs).backward()
        optimizer.step()
    trainer.__class__ = plain
    parameters = torch.cat([value.detach().flatten() for value in model.parameters()])
    return parameters, {name: list(values) for name, values in trainer._metrics["train"].items()}


def compare(recorded: Any, loss_type: str, options: dict[str, Any], steps: int = 20) -> float:
    """The distance of the parameters after some steps, over the distance that they moved. The metrics are equal."""
    trainer, _, start = recorded
    with_settings(trainer, loss_type, options)
    theirs, metrics = after(recorded, trl.GRPOTrainer, steps)
    ours, found = after(recorded, R1GRPOTrainer, steps)
    assert list(found) == list(metrics) and "entropy" in found
    for name, values in metrics.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True), name
    moved = theirs - torch.cat([start[name].flatten() for name, _ in trainer.model.named_parameters()])
    assert moved.norm() > 1e-3
    return float((ours - theirs).norm() / moved.norm())


@pytest.mark.few(20)
@pytest.mark.parametrize("options", ["none", *OPTIONS])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_steps_of_each_loss_and_option(loss_type: str, options: str, recorded: Any) -> None:
    given = OPTIONS.get(options, {})
    if loss_type == "vespo" and str(given.get("weights", "")).startswith("sequence"):
        pytest.skip("TRL refuses weights of sequences with VESPO")
    if loss_type == "vespo" and given.get("importance_sampling_level"):
        pytest.skip("VESPO has its own ratio")
    assert compare(recorded, loss_type, given) <= 2e-5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale: str, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = recorded[0]
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    with_settings(trainer, "grpo", {})
    rows = [{"prompt": text} for text in ("1 + 1 =", "so") for _ in range(GENERATIONS)]
    trainer._logs["rewards"].clear()
    found = trainer._generate_and_score_completions(rows)["advantages"]
    given = torch.tensor([list(trainer._logs["rewards"][name]) for name in ("lengths", "answers")])
    ours = group_advantages(given.sum(0), GENERATIONS, scale={"none": "none"}.get(scale, f"{scale}_std"))
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(trainer, "multi_objective_aggregation", "normalize_then_sum")
    trainer._logs["rewards"].clear()
    found = trainer._generate_and_score_completions(rows)["advantages"]
    given = torch.tensor([list(trainer._logs["rewards"][name]) for name in ("lengths", "answers")])
    torch.testing.assert_close(found, multi_reward_advantages(given.T, GENERATIONS), rtol=1e-5, atol=1e-5)
