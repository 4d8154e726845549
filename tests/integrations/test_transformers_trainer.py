"""The adapter of transformers in Trainer, with PEFT, Accelerate and FSDP2: the same parameters after training."""

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_ranks
from backends import host_code
from causal_models import VOCAB, assert_as_exact, batch, build, doubled, loss_and_gradients, shifted
from ranks import run_ranks
from torch import Tensor

from r1kernels import testing

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from r1kernels.integrations.transformers import (  # noqa: E402
    apply_to,
    compute_loss_func,
    for_causal_lm_loss,
    token_logprobs,
)

pytestmark = [host_code, pytest.mark.filterwarnings("default")]  # those of transformers and peft

STEPS = 20


def own_loss(model: Any) -> Tensor:
    return model(**batch()).loss


# ---- Trainer --------------------------------------------------------------------------------------------------------


def rows(packed: bool) -> list[dict[str, list[int]]]:
    """Sequences of several lengths, of which the first tokens are not scored; or two of them in each row."""
    rng = testing.generator(2)
    lengths = torch.randint(4, 12, (64,), generator=rng).tolist()
    made = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=rng).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made if not packed else [a | {"more": b} for a, b in zip(made, made[::-1], strict=True)]


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows padded on the right, with positions that begin again where a packed sequence does."""
    joined = []
    for example in examples:
        parts = [example, *([example["more"]] if "more" in example else [])]
        joined.append({
            "input_ids": [i for part in parts for i in part["input_ids"]],
            "labels": [i for part in parts for i in part["labels"]],
            "position_ids": [i for part in parts for i in range(len(part["input_ids"]))],
        })
    longest = max(len(row["input_ids"]) for row in joined)
    padding = {"input_ids": 0, "labels": -100, "position_ids": 0}
    return {key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in joined])
            for key, value in padding.items()}


def trained(
    model: Any, directory: Path, packed: bool = False, loss: Any = None, rate: float = 0.3, **arguments: Any
) -> dict[str, Tensor]:
    """The parameters after 20 steps of two micro-batches."""
    settings = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=rate, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", **arguments)
    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=rows(packed), data_collator=collate, compute_loss_func=loss)
    trainer.train()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def small_model(family: str, tied: bool = False) -> Any:
    """With a head that is not larger than others, so that steps of gradient descent can be large."""
    model = build(family, tie_word_embeddings=tied, num_hidden_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.div_(20)
    return model


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=testing.generator(len(name)))
    return adapted


def assert_same_training(ours: dict[str, Tensor], own: dict[str, Tensor], start: Any) -> None:
    """The difference is rounding, beside the way that the parameters have gone."""
    moved = max((own[name] - value).abs().max() for name, value in start.named_parameters())
    assert moved > 0.01
    for name, value in own.items():
        assert (ours[name] - value).abs().max() <= 1e-4 * moved, name


CASES = ["untied", "tied", "packed", "label smoothing", "LoRA", "LoRA on the head", "mean of each batch"]


@pytest.mark.few(2)
@pytest.mark.parametrize("case", CASES)
def test_training_ends_with_the_same_parameters(case: str, tmp_path: Path) -> None:
    model = small_model("gemma2" if case == "LoRA on the head" else "qwen2", tied=case == "tied")
    if case.startswith("LoRA"):
        model = lora(model, target_modules=["q_proj", "lm_head"] if "head" in case else ["v_proj", "down_proj"])
    smoothing = 0.1 if case == "label smoothing" else 0.0
    own, ours = copy.deepcopy(model), copy.deepcopy(model)
    if case == "mean of each batch":  # Trainer asks the model whether it takes num_items_in_batch
        own.accepts_loss_kwargs = ours.accepts_loss_kwargs = False
    options: dict[str, Any] = {"packed": case == "packed", "rate": 10.0 if case == "LoRA" else 0.3}
    expected = trained(own, tmp_path, label_smoothing_factor=smoothing, **options)
    apply_to(ours, label_smoothing=smoothing)
    assert_same_training(trained(ours, tmp_path, **options), expected, model)


@pytest.mark.few(1)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_function_of_trainer(smoothing: float, tmp_path: Path) -> None:
    model = small_model("qwen2")
    own, ours = copy.deepcopy(model), copy.deepcopy(model)
    results = trained(ours, tmp_path, loss=functools.partial(compute_loss_func, label_smoothing=smoothing))
    assert_same_training(results, trained(own, tmp_path, label_smoothing_factor=smoothing), model)


def test_the_loss_mapping_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.loss.loss_utils import LOSS_MAPPING

    model = build("granitemoe")
    exact, own = loss_and_gradients(doubled(model), own_loss), loss_and_gradients(model, own_loss)
    model.loss_function = for_causal_lm_loss
    assert_as_exact(loss_and_gradients(model, own_loss), own, exact)
    del model._loss_function
    calls = []
    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", lambda *a, **k: calls.append(1) or for_causal_lm_loss(*a, **k))
    assert_as_exact(loss_and_gradients(model, own_loss), own, exact)
    assert calls


def test_the_loss_function_takes_bfloat16_logits_as_they_are() -> None:
    """And that of transformers would make a copy in float32; the values are the same."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = torch.randn(2, 9, VOCAB, generator=testing.generator(4)).bfloat16().requires_grad_()
    for arguments in ({}, {"num_items_in_batch": 7}, {"shift_labels": shifted(batch()["labels"])},
                      {"ignore_index": 5, "num_items_in_batch": torch.tensor(3)}):
        labels = batch()["labels"].clamp(min=5) if "ignore_index" in arguments else batch()["labels"]
        values = [f(logits, labels, VOCAB, **arguments) for f in (for_causal_lm_loss, ForCausalLMLoss)]
        ours, own = (torch.autograd.grad(value, logits)[0] for value in values)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(ours, own)


def test_evaluation_in_trainer(tmp_path: Path) -> None:
    model = build()
    settings = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True,
                                              remove_unused_columns=False)
    trainer = transformers.Trainer(model=model, args=settings, eval_dataset=rows(False)[:8], data_collator=collate)
    expected, signature = trainer.evaluate()["eval_loss"], inspect.signature(model.forward)
    with apply_to(model):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert inspect.signature(model.forward) == signature  # by which Trainer chooses columns


# ---- PEFT -----------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "other layers": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "head, rank-stabilized": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("before", [False, True], ids=["after peft", "before peft"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_of_peft(adapter: str, before: bool) -> None:
    model = build("cohere")
    own = lora(copy.deepcopy(model), **ADAPTERS[adapter])
    if before:
        apply_to(model)
    ours = lora(model, **ADAPTERS[adapter])
    if not before:
        apply_to(ours)
    exact = loss_and_gradients(doubled(own), own_loss)
    assert_as_exact(loss_and_gradients(ours, own_loss), loss_and_gradients(own, own_loss), exact)
    assert ours(**batch()).logits is None
    targets = shifted(batch()["labels"])
    for turned_off in (False, True):
        with own.disable_adapter() if turned_off else torch.enable_grad(), torch.no_grad():
            logprobs = own(input_ids=batch()["input_ids"]).logits.log_softmax(-1)
        with ours.disable_adapter() if turned_off else torch.enable_grad(), torch.no_grad():
            got = token_logprobs(ours, targets, input_ids=batch()["input_ids"])
        expected = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
        torch.testing.assert_close(got, expected)


def test_two_adapters_and_merged_ones() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = lora(build(), target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head"], lora_alpha=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    exact, own = loss_and_gradients(doubled(model), own_loss), loss_and_gradients(model, own_loss)
    with apply_to(model):
        assert_as_exact(loss_and_gradients(model, own_loss), own, exact)
        model.merge_adapter()
        torch.testing.assert_close(own_loss(model), own[""])
        with model.disable_adapter():
            torch.testing.assert_close(own_loss(model).detach(), own_loss(build()).detach())


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_adapters_of_other_kinds_on_the_head_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*'default'.*lora_dropout=0"):
        apply_to(lora(build(), target_modules=["lm_head"], **options))
    model = lora(build(), target_modules=["q_proj"], **options)
    with apply_to(model):  # on other layers they are as good as any
        assert own_loss(model).isfinite()


# ---- Accelerate and FSDP2 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    accelerate.state.AcceleratorState._reset_state(True)  # it is shared by a process
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model, own = build(), accelerator.prepare(build())
    apply_to(model)
    ours = accelerator.prepare(model)
    expected, got = loss_and_gradients(own, own_loss), loss_and_gradients(ours, own_loss)
    if precision == "no":
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got[""], expected[""], rtol=1e-3, atol=0)
    logprobs = token_logprobs(ours, shifted(batch()["labels"]), input_ids=batch()["input_ids"])
    torch.testing.assert_close(-logprobs.sum().detach() / (batch()["labels"] != -100)[:, 1:].sum(), got[""])
    if precision == "bf16":
        with pytest.raises(ValueError, match="Accelerate"):
            apply_to(own)
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.slow(reason="starts processes")
def test_fsdp2_and_ddp_on_two_ranks(tmp_path: Path) -> None:
    """Gradients of log-probs and of the loss, on both ranks, are those of the model's own forward."""
    for results in run_ranks(transformers_ranks, tmp_path):
        own = results.pop("own")
        assert "FSDPLinear" in results.pop("head by itself")
        assert "this model is a sharded DTensor" in results.pop("outside of the forward")
        assert len(results) == 6
        for layout, gradients in results.items():
            tied = "tied" if "untied" not in layout else "untied"
            torch.testing.assert_close(gradients, own[tied], msg=lambda text, layout=layout: f"{layout}: {text}")
