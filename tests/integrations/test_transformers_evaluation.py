"""The adapter of transformers in an evaluation: logits are those of the model, or their use is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from backends import host_code
from causal_models import VOCAB, batch, build
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from r1kernels.integrations.heads import Logits  # noqa: E402
from r1kernels.integrations.transformers import apply_to  # noqa: E402

pytestmark = [host_code, pytest.mark.filterwarnings("default")]  # those of transformers


def best_tokens(logits: Any, _: Any) -> Tensor:
    """What `preprocess_logits_for_metrics` of the language-modeling scripts of transformers does."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": (predictions.predictions[:, :-1] == predictions.label_ids[:, 1:]).mean().item()}


def trainer_of(model: Any, directory: Path, **options: Any) -> Any:
    settings = transformers.TrainingArguments(
        output_dir=str(directory), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2,
        prediction_loss_only=options.pop("prediction_loss_only", False))
    rows = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]] * 2
    return transformers.Trainer(model=model, args=settings, eval_dataset=rows,
                                data_collator=transformers.default_data_collator, **options)


@pytest.mark.parametrize("hidden_states", [False, True])
def test_metrics_of_trainer_are_those_without_the_adapter(hidden_states: bool, tmp_path: Path) -> None:
    model = build(output_hidden_states=hidden_states)
    metrics = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best_tokens}
    with torch.no_grad():  # a model whose accuracy is not 0
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    rows = trainer_of(model, tmp_path, **metrics)
    expected, predicted = rows.evaluate(), rows.predict(rows.eval_dataset).predictions
    with apply_to(model, label_smoothing=0.1):
        got = rows.evaluate()
        assert (rows.predict(rows.eval_dataset).predictions == predicted).all()
    for name in ("eval_loss", "eval_accuracy"):
        assert got[name] == expected[name]


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("training, gradients", [(False, False), (False, True), (True, False), (True, True)])
def test_logits_are_computed_only_in_eval_mode_without_gradients(
    training: bool, gradients: bool, return_dict: bool
) -> None:
    """`from_pretrained` returns models in eval mode, so a loop may train in it."""
    model = build().train(training)
    with apply_to(model), torch.set_grad_enabled(gradients):
        outputs = model(**batch(), return_dict=return_dict)
    logits = outputs.logits if return_dict else outputs[1]
    assert (logits is None) == (training or gradients)


@pytest.mark.parametrize("hidden_states", [False, True])
def test_in_eval_computes_no_logits_and_refuses_their_use(hidden_states: bool, tmp_path: Path) -> None:
    model = build(output_hidden_states=hidden_states)
    metrics = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best_tokens}
    with apply_to(model, in_eval=True):
        with pytest.raises(TypeError, match="NoLogitsWithInEval"):  # an error of accelerate
            trainer_of(model, tmp_path, **metrics).evaluate()
        rows = trainer_of(model, tmp_path)
        with pytest.raises(TypeError, match="NoLogitsWithInEval"):
            rows.predict(rows.eval_dataset)
        without_metrics = rows.evaluate()["eval_loss"]
        with torch.no_grad():
            dictionary, values = model.eval()(**batch()), model(**batch(), return_dict=False)
    assert without_metrics == pytest.approx(rows.evaluate()["eval_loss"], rel=1e-5)
    for logits in (dictionary.logits, values[1]):
        assert isinstance(logits, Logits) and logits.shape == (2, 9, VOCAB)
        with pytest.raises(TypeError, match=r"'argmax'.*in_eval=True.*prediction_loss_only"):
            best_tokens(logits, None)
