"""What the adapter of transformers does not support is refused in one sentence that names it."""

from typing import Any

import pytest
import torch
from backends import host_code
from causal_models import VOCAB, assert_as_exact, batch, build, doubled, loss_and_gradients, shifted
from torch import Tensor, nn

from r1kernels.integrations import check_version

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from r1kernels.integrations import transformers as adapter  # noqa: E402
from r1kernels.integrations.transformers import apply_to, for_causal_lm_loss, token_logprobs  # noqa: E402

pytestmark = [host_code, pytest.mark.filterwarnings("default")]  # those of transformers


def own_loss(model: Any) -> Tensor:
    return model(**batch()).loss


# ---- versions -------------------------------------------------------------------------------------------------------


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr("r1kernels.integrations.version", lambda _: "4.57.1")
    with pytest.raises(ImportError, match=r"4\.57\.1.* is for 5;.*transformers==5\.\*.*any_version"):
        apply_to(model)
    apply_to(model, any_version=True)
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        monkeypatch.undo()
        check_version("no_such_package", "1")


@pytest.mark.parametrize("found, fits", [("5.0.0", True), ("5", True), ("50.1", False), ("4.9", False), ("6.0", False)])
def test_versions_are_compared_by_their_parts(found: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1kernels.integrations.version", lambda _: found)
    if fits:
        check_version("transformers", "5")
    else:
        with pytest.raises(ImportError, match="transformers"):
            check_version("transformers", "5")


def test_what_the_adapter_hooks_is_checked_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers had renamed it."""
    model = build()
    monkeypatch.setattr(transformers.PreTrainedModel, "loss_function", lambda self: None)
    with pytest.raises(ImportError, match="loss_function"):
        apply_to(model)
    monkeypatch.undo()
    monkeypatch.delattr(transformers.loss.loss_utils, "ForCausalLMLoss")
    with pytest.raises(ImportError, match="ForCausalLMLoss"):
        apply_to(model)


# ---- heads ----------------------------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """As those of bitsandbytes, which are subclasses too."""


def with_head(head: nn.Module) -> Any:
    model = build()
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("head", [Quantized(32, VOCAB), nn.Sequential(nn.Linear(32, VOCAB))])
def test_the_class_of_a_head_that_is_not_plain_is_named(head: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"LlamaForCausalLM is a .*{type(head).__name__}"):
        apply_to(with_head(head))


def test_a_head_that_is_parametrized_is_refused() -> None:
    model = build()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(TypeError, match="Parametrized"):
        apply_to(model)


def test_a_partitioned_or_offloaded_head_is_refused() -> None:
    model = build()
    model.lm_head.weight.ds_id = 3  # as DeepSpeed marks it
    with pytest.raises(TypeError, match="ZeRO-3"):
        apply_to(model)
    with pytest.raises(TypeError, match="offloaded"):
        apply_to(with_head(nn.Linear(32, VOCAB, device="meta")))
    model = build()
    apply_to(model)
    model.lm_head.weight.data = torch.empty(0)  # as after its forward
    with pytest.raises(TypeError, match="FSDP1"):
        own_loss(model)


def test_models_without_a_head_or_a_loss_are_refused() -> None:
    with pytest.raises(TypeError, match="LlamaModel"):
        apply_to(build().model)
    with pytest.raises(TypeError, match="Linear"):
        apply_to(nn.Linear(2, 2))


def test_a_replaced_forward_or_loss_is_refused() -> None:
    model = build()
    model.forward = model.forward
    with pytest.raises(ValueError, match=r"forward.*Accelerate"):
        apply_to(model)
    model = build()
    model.loss_function = nn.functional.cross_entropy
    with pytest.raises(ValueError, match=r"loss_function.*cross_entropy"):
        apply_to(model)
    model.loss_function = for_causal_lm_loss
    apply_to(model)


def test_tensor_parallelism_is_refused() -> None:
    model = build()
    model._tp_size = 2
    with pytest.raises(TypeError, match="tensor parallelism"):
        apply_to(model)


# ---- what a model does with its logits ------------------------------------------------------------------------------


def model_whose_logits(function: Any) -> Any:
    """A model that does this with its logits before the loss."""
    base = type(build())

    class Changed(base):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = function(self.lm_head(self.model(input_ids).last_hidden_state))
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = build()
    model.__class__ = Changed
    return model


@pytest.mark.parametrize("function, named", [
    (lambda z: z * torch.ones(VOCAB), "multiplies"), (lambda z: -1 * z, "-1"), (lambda z: z / 0, "divides"),
    (lambda z: z.tanh().tanh(), "twice"), (lambda z: z[:, 1:], "part"), (lambda z: z[..., ::2], "part"),
    (lambda z: z.view(-1, VOCAB), "view"), (lambda z: torch.logsumexp(z, -1), "logsumexp"), (lambda z: z + 1, "[+]"),
    (lambda z: torch.cat([z, z]), "cat"), (lambda z: z.log_softmax(-1), "log_softmax"),
])
def test_other_operations_are_named(function: Any, named: str) -> None:
    model = model_whose_logits(function)
    with apply_to(model), pytest.raises(TypeError, match=rf"{named}"):
        own_loss(model)


@pytest.mark.parametrize("function", [
    lambda z: 0.5 * z.float(), lambda z: torch.tanh(z / 3.0) * 3.0, lambda z: (z * 2).tanh() * 5 / 2,
    lambda z: nn.functional.tanh(z.to(torch.float32).contiguous() / 7) * 3, lambda z: z[..., :VOCAB], lambda z: z * 1,
])
def test_scales_and_caps_are_recorded(function: Any) -> None:
    model = model_whose_logits(function)
    exact, own = loss_and_gradients(doubled(model), own_loss), loss_and_gradients(model, own_loss)
    with apply_to(model):
        assert_as_exact(loss_and_gradients(model, own_loss), own, exact)


def test_rows_of_padding_are_left_out() -> None:
    """As Inkling does: the rest of the vocabulary has no probability, and no gradient."""
    model = model_whose_logits(lambda z: z[..., :50])
    ids = batch()["input_ids"] % 50
    with apply_to(model):
        got = loss_and_gradients(model, lambda model: model(ids, labels=ids).loss)
        assert (model.lm_head.weight.grad[50:] == 0).all()
    logits = model(ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(got[""], expected.detach())


def test_a_loss_that_the_model_computes_itself_is_refused() -> None:
    import transformers.models.bart.modeling_bart as bart

    config = transformers.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=2,
                                     decoder_ffn_dim=32, max_position_embeddings=64, encoder_layers=1)
    model = bart.BartForCausalLM(config)
    with apply_to(model), pytest.raises(TypeError, match=r"BartForCausalLM.*'view'"):
        own_loss(model)


def test_a_head_that_is_not_called_is_noticed() -> None:
    model = model_whose_logits(lambda z: nn.functional.linear(torch.ones(2, 9, 32), torch.ones(VOCAB, 32)))
    with apply_to(model), pytest.raises(TypeError, match="get_output_embeddings"):
        own_loss(model)


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_wrong_labels_are_named() -> None:
    model = build()
    ids = batch()["input_ids"]
    with apply_to(model):
        with pytest.raises(ValueError, match=r"labels.*\(2, 8\).*\(2, 9, 61\)"):
            model(input_ids=ids, labels=ids[:, 1:])
        with pytest.raises(ValueError, match=rf"{VOCAB + 3}.*\[0, {VOCAB}\)"):
            model(input_ids=ids, labels=torch.full_like(ids, VOCAB + 3))
        with pytest.raises(ValueError, match="labels were given"):
            token_logprobs(model, shifted(ids), input_ids=ids, labels=ids)
        with pytest.raises(ValueError, match=r"\(2, 8\)"):
            token_logprobs(model, ids[:, 1:], input_ids=ids)
    with pytest.raises(ValueError, match="shift_labels"):
        for_causal_lm_loss(torch.zeros(1, 2, 3), None)


def test_the_place_of_a_wrong_label_is_that_in_the_labels() -> None:
    model, ids = build(), batch()["input_ids"]
    wrong = ids.clone()
    wrong[1, 4] = VOCAB + 2
    with apply_to(model):
        for labels in ({"labels": wrong}, {"labels": ids, "shift_labels": wrong}):
            name = [*labels][-1]
            with pytest.raises(ValueError, match=rf"^{name}\[1, 4\] is {VOCAB + 2}, .*-100.*\[0, {VOCAB}\)"):
                model(input_ids=ids, **labels)
        with pytest.raises(ValueError, match=rf"^shift_labels\[1, 4\] is {VOCAB + 2}"):
            token_logprobs(model, wrong, input_ids=ids)
    with pytest.raises(ValueError, match=rf"^labels\[1, 4\] is {VOCAB + 2}"):
        for_causal_lm_loss(torch.zeros(2, 9, VOCAB), wrong)


@pytest.mark.parametrize("option, error", [
    ({"label_smoothing": 2}, ValueError), ({"label_smoothing": "x"}, TypeError), ({"z_loss_coef": -1}, ValueError),
    ({"chunk_bytes": -1}, ValueError), ({"chunk_bytes": 1.5}, TypeError),
    ({"chunk_bytes": 100}, ValueError),  # less than a row of this vocabulary
])
def test_options_are_checked_by_apply_to(option: dict[str, Any], error: type[Exception]) -> None:
    model = build()
    kind = type(model)
    with pytest.raises(error, match=f"^{next(iter(option))} is "):
        apply_to(model, **option)
    assert type(model) is kind


@pytest.mark.parametrize("name, meant", [("lable_smoothing", "label_smoothing"), ("z_loss_coeff", "z_loss_coef"),
                                         ("num_items_in_batches", "num_items_in_batch"), ("chunk_byte", "chunk_bytes")])
def test_misspelled_keywords_are_named_and_those_of_a_forward_are_not(name: str, meant: str) -> None:
    from transformers.utils.generic import TransformersKwargs

    logits, labels = torch.zeros(2, 9, VOCAB), batch()["labels"]
    with pytest.raises(TypeError, match=f"'{name}', expected '{meant}'"):
        for_causal_lm_loss(logits, labels, **{name: 0.1})
    others = {*TransformersKwargs.__annotations__, "position_ids", "use_cache", "logits_to_keep", "token_type_ids",
              "attention_mask", "pixel_values", "cache_position", "is_causal", "mm_token_type_ids"}
    for_causal_lm_loss(logits, labels, **dict.fromkeys(others - {"num_items_in_batch"}))


def test_several_models_and_no_models_are_refused() -> None:
    model = build()
    with pytest.raises(TypeError, match=r"ModuleList.*2 models.*LlamaForCausalLM, LlamaForCausalLM"):
        apply_to(nn.ModuleList([model, build()]))
    with apply_to(nn.ModuleList([model, model, model.model])):
        assert model(**batch()).logits is None
    with pytest.raises(TypeError, match="model is a str"):
        apply_to("gpt2")
    with pytest.raises(TypeError, match="model is a str"):
        token_logprobs("gpt2", shifted(batch()["labels"]))
    with pytest.raises(TypeError, match="shift_labels is a list"):
        token_logprobs(model, shifted(batch()["labels"]).tolist(), input_ids=batch()["input_ids"])


def test_logits_answer_what_hooks_ask_of_tensors() -> None:
    logits = adapter.Logits(torch.zeros(2, 3, 4), nn.Linear(4, 5), "a model", 5)
    assert logits.shape == (2, 3, 5) and logits.dtype == torch.float32 and logits.device.type == "cpu"
    assert not hasattr(logits, "grad_fn") and not isinstance(logits, Tensor)
