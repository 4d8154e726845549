"""Steps with TRL's loss and with the one pass, on the same batches of a tiny model: equal parameters and metrics."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_cases import make_trainer
from trl_losses import LOSSES, OPTIONS, trl_weights, with_settings

from r1kernels import (
    group_advantages,
    high_entropy_filter,
    importance_weights,
    multi_reward_advantages,
    objectives,
    off_policy_filter,
    policy_loss,
    testing,
)
from r1kernels.integrations.trl import R1GRPOTrainer

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # TRL's own

STEPS, GENERATIONS = 6, 4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Tensor]], dict[str, Tensor]]:
    """(a trainer, the batches of its six steps, the parameters before them)."""
    batches: list[dict[str, Any]] = []

    class Recorder(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            batches.append(copy.deepcopy(inputs))
            return super()._compute_loss(model, inputs)

    trainer = make_trainer("GRPO", tmp_path_factory.mktemp("trl"), kind=Recorder, max_steps=STEPS,
                           max_completion_length=6, learning_rate=1e-6, optim="adamw_torch")
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
        inputs["prompt_ids"] = torch.randint(1, 6, (len(ids), 6), generator=rng)
        inputs["prompt_mask"] = torch.ones_like(inputs["prompt_ids"])
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


@pytest.mark.few(14)
@pytest.mark.parametrize("options", ["none", *OPTIONS])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_steps_of_each_loss_and_option(loss_type: str, options: str, recorded: Any) -> None:
    given = OPTIONS.get(options, {})
    if loss_type == "vespo" and str(given.get("weights", "")).startswith("sequence"):
        pytest.skip("TRL refuses weights of sequences with VESPO")
    if loss_type == "vespo" and given.get("importance_sampling_level"):
        pytest.skip("VESPO has its own ratio")
    # TRL rounds the quantile of entropies, and sooner or later that decides about a token at the limit.
    steps = 6 if "top_entropy_quantile" in given else 20
    assert compare(recorded, loss_type, given, steps) <= 1e-4


@pytest.mark.few(2)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo", "vespo"])
def test_packed_rows(loss_type: str, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs, TRL scores the rows of the completions alone: here as if the CPU were one."""
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    for options in ("everything", "none", "sequence ratio, beta"):
        if loss_type != "vespo" or options != "sequence ratio, beta":
            assert compare(recorded, loss_type, OPTIONS.get(options, {}), 6) <= 1e-4


@pytest.mark.few(3)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("options", ["everything", "entropy", "off policy"])
def test_tokens_of_tools(options: str, packed: bool, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not scored, and whatever the rollout said about them does not matter. One sequence has no other."""
    from trl.trainer import utils

    trainer, batches, start = recorded
    batches = [dict(inputs) for inputs in batches]
    for inputs in batches:
        inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
        inputs["tool_mask"][1:4, :2] = 0
        inputs["tool_mask"][0] = 0
        for name in ("old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps"):
            inputs[name] = inputs[name].masked_fill((1 - inputs["tool_mask"]).bool(), -3.0) * inputs["completion_mask"]
    monkeypatch.setattr(utils, "_use_triton", lambda device: packed)
    assert compare((trainer, batches, start), "grpo", OPTIONS[options], 6) <= 1e-4


def test_very_unlikely_tokens_of_tools_are_finite(recorded: Any) -> None:
    trainer, batches, _ = recorded
    inputs = dict(batches[0])
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 0] = 0
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"].clone()
    inputs["old_per_token_logps"][:, 0] = -200.0
    with_settings(trainer, "grpo", {})
    trainer._metrics["train"].clear()
    plain, trainer.__class__ = trainer.__class__, R1GRPOTrainer
    loss = trainer._compute_loss(trainer.model, inputs)
    trainer.__class__ = plain
    assert loss.isfinite() and all(torch.tensor(v).isfinite().all() for v in trainer._metrics["train"].values())


# ---- what a user has without the adapter ----------------------------------------------------------------------


def test_filters_and_weights_are_those_of_trl(recorded: Any) -> None:
    trainer, batches, _ = recorded
    rng = testing.generator(1)
    for inputs in batches:
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        old, sampled = inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
        entropy = torch.rand(mask.shape, generator=rng)
        for top in (0.15, 0.5):
            theirs = trainer.get_high_entropy_mask(entropy, mask, 1 - top)
            assert torch.equal(high_entropy_filter(entropy, mask, top=top), theirs.float())
        for threshold in (0.0, 0.05):
            theirs = trainer.get_off_policy_mask(advantages[:, None], old, sampled, mask, threshold)[:, 0]
            assert torch.equal(off_policy_filter(old, sampled, advantages, mask, threshold=threshold), theirs.float())
        for options in OPTIONS.values():
            if "weights" in options:
                with_settings(trainer, "grpo", options)
                level, mode = options["weights"].split("_")
                cap, floor = (getattr(trainer, f"vllm_importance_sampling_clip_{name}") for name in ("max", "min"))
                ours = importance_weights(old, sampled, mask, level=level, mode=mode, cap=cap, floor=floor or 0.0)
                theirs = trl_weights(trainer, inputs) * (mask if level == "token" else 1)
                torch.testing.assert_close(ours.weights.reshape(theirs.shape), theirs)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_preset_of_vespo_is_that_of_trl(weighted: bool, recorded: Any) -> None:
    """TRL multiplies the ratio by the weights: the preset gets them as a part of `old_logprobs`."""
    trainer, batches, _ = recorded
    rng = testing.generator(2)
    for inputs in batches:
        mask, advantages, old = inputs["completion_mask"], inputs["advantages"], inputs["old_per_token_logps"]
        logprobs = ((old + 0.2 * torch.randn(old.shape, generator=rng)) * mask).requires_grad_()
        weights = (inputs["sampling_per_token_logps"] - old).exp() if weighted else torch.ones_like(old)
        phi = trainer.get_gamma_weights(advantages[:, None], logprobs - old, mask, weights, 1.5, 2.5, 2.5, 1.5)
        theirs = (-phi * advantages[:, None] * logprobs * mask).sum() / 20.0
        objective = objectives.vespo(power_pos=1.5, tau_pos=2.5, power_neg=2.5, tau_neg=1.5)
        ours = policy_loss(logprobs, advantages, old_logprobs=old - weights.log(), mask=mask, normalizer=20.0,
                           objective=objective).loss
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(ours, logprobs)[0], torch.autograd.grad(theirs, logprobs)[0],
                                   rtol=1e-4, atol=1e-6)


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
