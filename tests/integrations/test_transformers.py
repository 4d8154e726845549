"""The adapter of transformers: losses and gradients are those of the model's own forward, without its logits."""

import copy
import functools
from typing import Any

import pytest
import torch
from backends import host_code
from causal_models import (
    FAMILIES,
    MORE_FAMILIES,
    VOCAB,
    assert_as_exact,
    batch,
    build,
    doubled,
    loss_and_gradients,
    shifted,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import r1kernels

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from r1kernels.integrations.transformers import (  # noqa: E402
    apply_to,
    token_logprobs,
    token_logprobs_and_entropy,
)

pytestmark = [host_code, pytest.mark.filterwarnings("default")]  # those of transformers

PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
KEPT = torch.arange(9) < torch.tensor([[6], [9]])
CALLS: dict[str, dict[str, Any]] = {
    "labels": {},
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(29)},
    "number": {"num_items_in_batch": 29},
    "shift_labels": {"shift_labels": shifted(batch()["labels"])},
    "tuple": {"return_dict": False},
    "padding": {"attention_mask": KEPT.long(), "labels": batch()["labels"].masked_fill(~KEPT, -100)},
    "packed": {"position_ids": PACKED, "labels": batch()["labels"].masked_fill(PACKED == 0, -100)},
}


def own_loss(model: Any, **call: Any) -> Tensor:
    outputs = model(**batch() | call)
    return outputs[0] if isinstance(outputs, tuple) else outputs.loss


@pytest.mark.few(24)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_all_gradients_are_those_of_the_own_forward(family: str, call: str, tied: bool) -> None:
    if (family, call) in {("mamba", "packed"), ("recurrent_gemma", "packed"), ("falcon_h1", "packed")}:
        call = "labels"  # their states know nothing of positions
    model = build(family, tie_word_embeddings=tied)
    loss = functools.partial(own_loss, **CALLS[call])
    exact, own = loss_and_gradients(doubled(model), loss), loss_and_gradients(model, loss)
    before = model(**batch() | CALLS[call])
    with apply_to(model):
        assert_as_exact(loss_and_gradients(model, loss), own, exact)
        outputs = model(**batch() | CALLS[call])
    if call == "tuple":
        logits = [isinstance(value, Tensor) and value.shape == (2, 9, VOCAB) for value in before]
        assert isinstance(outputs, tuple) and [value is None for value in outputs] == logits and sum(logits) == 1
    else:
        assert type(outputs) is type(before) and outputs.logits is None
        assert [*outputs] == [name for name in before if name != "logits"]
        if outputs.get("aux_loss") is not None:
            torch.testing.assert_close(outputs.aux_loss, before.aux_loss, rtol=0, atol=0)
    assert torch.equal(loss_and_gradients(model, loss)[""], own[""])  # the context has ended


@pytest.mark.few(3)
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_more_families(family: str) -> None:
    model = build(family).eval()
    own = loss_and_gradients(model, own_loss)
    largest = max(value.abs().max() for value in own.values())
    with apply_to(model):
        got = loss_and_gradients(model, own_loss)
    assert got.keys() == own.keys()
    for name, value in own.items():  # sums of the same terms in another order
        assert (got[name] - value).abs().max() <= 1e-5 * largest, name


@pytest.mark.few(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropy_are_those_of_the_logits(family: str) -> None:
    model = build(family).eval()
    ids = batch()["input_ids"]
    targets = shifted(batch()["labels"])
    loss = functools.partial(_scored, targets=targets, ids=ids)
    exact, own = loss_and_gradients(doubled(model), loss), loss_and_gradients(model, loss)
    with apply_to(model):
        fused = loss_and_gradients(model, functools.partial(_scored_without_logits, targets=targets, ids=ids))
        with torch.no_grad():
            logprobs = token_logprobs(model, targets, input_ids=ids)
    assert_as_exact(fused, own, exact)
    assert logprobs.dtype == torch.float32 and logprobs.shape == targets.shape
    assert (logprobs[targets == -100] == 0).all() and (logprobs[targets != -100] < 0).all()


def _scored(model: Any, targets: Tensor, ids: Tensor) -> Tensor:
    """A loss with other weights of each token, and a temperature."""
    logprobs = (model(input_ids=ids).logits / 0.7).log_softmax(-1)
    chosen = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return _weighted(chosen, -(logprobs.exp() * logprobs).sum(-1), targets)


def _scored_without_logits(model: Any, targets: Tensor, ids: Tensor) -> Tensor:
    return _weighted(*token_logprobs_and_entropy(model, targets, temperature=0.7, input_ids=ids), targets)


def _weighted(logprobs: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, targets.numel(), dtype=logprobs.dtype).reshape(targets.shape)
    return ((weights * logprobs + 0.1 * entropy) * (targets != -100)).sum()


@pytest.mark.parametrize("items", [None, torch.tensor(0), torch.tensor(5), 5])
def test_without_scored_labels_the_loss_is_that_of_transformers(items: Any) -> None:
    model = build()
    loss = functools.partial(own_loss, labels=torch.full((2, 9), -100), num_items_in_batch=items)
    own = loss_and_gradients(model, loss)
    with apply_to(model):
        got = loss_and_gradients(model, loss)
    for name, value in own.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_and_in_bfloat16_only_the_rounding_of_logits_is_missing(dtype: torch.dtype) -> None:
    """float32: bfloat16 by autocast. The head's gradient is nearer to the exact one than with rounded logits."""
    model = build().to(dtype)
    hidden_dtypes = []

    def loss(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            return own_loss(model)

    own = loss_and_gradients(model, loss)
    with apply_to(model), pytest.MonkeyPatch.context() as patch:
        linear = r1kernels.linear_cross_entropy

        def spy(hidden: Tensor, weight: Tensor, **keywords: Any) -> Tensor:
            hidden_dtypes.extend([hidden.dtype, weight.dtype])
            return linear(hidden, weight=weight, **keywords)

        patch.setattr(r1kernels, "linear_cross_entropy", spy)
        got = loss_and_gradients(model, loss)
    assert hidden_dtypes == [torch.bfloat16, torch.bfloat16]
    exact = loss_and_gradients(build(), own_loss)
    for name, value in exact.items():
        error, allowed = ((part[name].float() - value).norm() for part in (got, own))
        assert error <= 1.25 * allowed + 2e-3 * value.norm(), name


def test_layers_are_checkpointed_and_dropout_draws_the_same_numbers() -> None:
    model = build(attention_dropout=0.2)
    model.activation_checkpointing_enable()

    def loss(model: Any) -> Tensor:
        torch.manual_seed(3)
        return own_loss(model)

    own = loss_and_gradients(model, loss)
    with apply_to(model):
        got = loss_and_gradients(model, loss)
    for name, value in own.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("coefficients", [{"label_smoothing": 0.1}, {"z_loss_coef": 0.01}])
def test_label_smoothing_and_z_loss(coefficients: dict[str, float]) -> None:
    model = build("cohere")
    targets = shifted(batch()["labels"])

    def own(model: Any) -> Tensor:
        logits, scored = model(input_ids=batch()["input_ids"]).logits, targets != -100
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                           label_smoothing=coefficients.get("label_smoothing", 0.0))
        return loss + coefficients.get("z_loss_coef", 0.0) * logits.logsumexp(-1)[scored].pow(2).mean()

    exact, expected = loss_and_gradients(doubled(model), own), loss_and_gradients(model, own)
    with apply_to(model, **coefficients):
        assert_as_exact(loss_and_gradients(model, own_loss), expected, exact)


# ---- memory ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **kwargs or {})
        for value in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return results


def test_no_tensor_has_the_size_of_logits() -> None:
    """Inside the operation, too, memory does not grow with V x tokens: tests of the operation measure that."""
    model = build(vocab_size=4096)
    ids = torch.randint(3, 4096, (4, 64))
    largest = []
    for applied in (False, True):
        with apply_to(model) if applied else torch.enable_grad(), Largest() as mode:
            model(input_ids=ids, labels=ids).loss.backward()
            if applied:
                token_logprobs(model, shifted(ids), input_ids=ids).sum().backward()
        largest.append(mode.elements)
    assert largest[0] == 256 * 4096 and largest[1] == 4096 * 32, largest  # logits; the weight of the head


# ---- it comes and goes ----------------------------------------------------------------------------------------------


def test_generation_is_unchanged() -> None:
    model, ids = build().eval(), batch()["input_ids"]

    def generate() -> Tensor:
        return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)

    before, logits = generate(), model(input_ids=ids).logits
    with apply_to(model):
        assert torch.equal(generate(), before) and torch.equal(model(input_ids=ids).logits, logits)


def test_undo_leaves_nothing() -> None:
    model = build()
    kind, attributes = type(model), set(vars(model))
    applied = apply_to(model)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__ and str(type(model)) == str(kind)
    own_loss(model).backward()
    with pytest.raises(ValueError, match="undo"):
        apply_to(model)
    applied.undo()
    applied.undo()
    assert type(model) is kind and set(vars(model)) == attributes and "forward" not in vars(model.lm_head)
    with pytest.raises(ValueError, match="apply_to"):
        token_logprobs(model, shifted(batch()["input_ids"]), input_ids=batch()["input_ids"])


def test_the_hook_of_a_device_map_stays_on_the_head() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, ids = build(), batch()["input_ids"]
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook("cpu"))
    hooked = model.lm_head.forward
    with apply_to(model):
        assert model(**batch()).logits is None and model.lm_head.forward is hooked
        assert model(input_ids=ids).logits.shape == (2, 9, VOCAB)


def test_an_error_in_the_forward_leaves_nothing() -> None:
    model = build()
    with apply_to(model):
        with pytest.raises(ValueError, match="shift_labels"):
            model(**batch(), logits_to_keep=4)
        assert "forward" not in vars(model.lm_head) and model(input_ids=batch()["input_ids"]).logits is not None
        kept = model(**batch(), logits_to_keep=4, shift_labels=shifted(batch()["labels"])[:, -4:]).loss
    logits = model(input_ids=batch()["input_ids"]).logits[:, -4:-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch()["labels"][:, -3:].flatten())
    torch.testing.assert_close(kept, expected)


def test_a_copy_trains_its_own_parameters() -> None:
    model = build()
    apply_to(model)
    twin = copy.deepcopy(model)
    own_loss(twin).backward()
    assert twin.lm_head.weight.grad is not None and model.lm_head.weight.grad is None
    assert twin(**batch()).logits is None


def test_saved_files_are_those_of_the_model(tmp_path: Any) -> None:
    model = build()
    with apply_to(model):
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
