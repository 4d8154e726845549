"""The adapter of transformers with several threads, saved models and handles: each sees its own model."""

import io
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends import host_code
from causal_models import batch, build, shifted
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from r1kernels.integrations.transformers import Applied, apply_to, token_logprobs  # noqa: E402

pytestmark = [host_code, pytest.mark.filterwarnings("default")]  # those of transformers


@contextmanager
def stopped_in_its_forward(model: Any) -> Iterator[Any]:
    """Inside, another thread is in the middle of `model(..., labels=labels)`. Gives the future with its outputs."""
    entered, go_on = threading.Event(), threading.Event()
    own = threading.get_ident()

    def wait(*_: Any) -> None:
        if threading.get_ident() != own:
            entered.set()
            assert go_on.wait(60)

    handle = model.model.register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        try:
            outputs = pool.submit(lambda: model(**batch()))
            assert entered.wait(60)
            yield outputs
        finally:
            go_on.set()
            handle.remove()


@pytest.mark.parametrize("hooked", [False, True])
def test_other_threads_generate_while_the_model_trains(hooked: bool) -> None:
    model, ids = build(), batch()["input_ids"]
    if hooked:
        hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
        hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook("cpu"))
    logits, tokens = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=2, pad_token_id=0)
    with apply_to(model), stopped_in_its_forward(model) as training:
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=2, pad_token_id=0), tokens)
        with torch.no_grad():
            assert model.eval()(**batch()).logits is not None
        model.train()
    assert training.result().logits is None


def test_two_threads_train_with_one_model() -> None:
    """The forward that ends first does not end the other one's."""
    model = build()
    attributes = set(vars(model.lm_head))
    with apply_to(model):
        alone = model(**batch()).loss
        with stopped_in_its_forward(model) as other:
            inner = model(**batch())
            with pytest.raises(ValueError, match="shift_labels"):
                model(**batch(), logits_to_keep=4)
        assert inner.logits is None and other.result().logits is None
        assert torch.equal(inner.loss, alone) and torch.equal(other.result().loss, alone)
        assert set(vars(model.lm_head)) == attributes


@pytest.mark.parametrize("module", [pickle, torch])
def test_a_saved_model_is_that_without_the_adapter(module: Any) -> None:
    model, file = build(), io.BytesIO()
    own = model(**batch()).loss
    applied = apply_to(model)
    (module.dump if module is pickle else module.save)(model, file)
    assert b"r1kernels" not in file.getvalue()
    file.seek(0)
    loaded = pickle.load(file) if module is pickle else torch.load(file, weights_only=False)
    applied.undo()
    assert type(loaded) is type(model) and set(vars(loaded)) == set(vars(model))
    assert torch.equal(loaded(**batch()).loss, own)
    apply_to(loaded)
    assert loaded(**batch()).logits is None


def test_an_old_handle_does_not_undo_a_later_apply_to() -> None:
    model = build()
    first = apply_to(model)
    first.undo()
    second = apply_to(model)
    first.undo()
    assert model(**batch()).logits is None
    Applied(model).undo()  # for a model whose handle is lost
    assert model(**batch()).logits is not None
    second.undo()


@pytest.mark.parametrize("call", ["loss", "log-probs"])
def test_a_head_that_was_replaced_later_is_named(call: str) -> None:
    model = build()
    apply_to(model)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match=r"head of LlamaForCausalLM is a .*Sequential"):
        if call == "loss":
            model(**batch())
        else:
            token_logprobs(model, shifted(batch()["labels"]), input_ids=batch()["input_ids"])
