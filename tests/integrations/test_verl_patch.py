"""`patch_verl` and the plugin's backend: verl's class remains, patches end in any order, changes are named."""

import importlib
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: make test-verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl's own

from verl.models.transformers import monkey_patch  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402
from verl.utils.experimental.torch_functional import FusedLinearForPPO  # noqa: E402

with warnings.catch_warnings():  # of engines whose packages are not installed
    warnings.simplefilter("ignore")
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from r1kernels.integrations import verl_head  # noqa: E402
from r1kernels.integrations.verl_head import patch_verl  # noqa: E402

REPLACED = (
    (FusedLinearForPPO, "__init__"), (FusedLinearForPPO, "forward"), (monkey_patch, "patch_forward_with_backends"),
    (FSDPEngineWithLMHead, "forward_step"), (FSDPEngineWithLMHead, "prepare_model_outputs"),
)


def now() -> list[Any]:
    return [vars(holder)[name] for holder, name in REPLACED]


def is_ours(head: Any) -> bool:
    return head._r1kernels_head is not None


# verl's own, also where the plugin has been loaded in this process.
BEFORE = [(vars(function).get("_r1kernels") and function.__wrapped__) or function for function in now()]


class Subclass(FusedLinearForPPO):
    def __init__(self, extra: str) -> None:
        super().__init__(7)
        self.extra = extra


@pytest.fixture(autouse=True)
def verls_own() -> Iterator[None]:
    kept = now()
    for functions in (BEFORE, kept):
        for (holder, name), function in zip(REPLACED, functions, strict=True):
            setattr(holder, name, function)
        if functions is BEFORE:
            yield
    verl_head._patches.clear()
    verl_head._originals.clear()


def test_the_patch_is_undone() -> None:
    patch = patch_verl()
    assert all(new is not old for new, old in zip(now(), BEFORE, strict=True))
    assert is_ours(FusedLinearForPPO()) and is_ours(FusedLinearForPPO(5, impl_backend="liger"))
    assert FusedLinearForPPO(5)._r1kernels_head.chunk_size == 5
    patch.undo()
    patch.undo()
    assert now() == BEFORE
    with patch_verl(backends=()):
        theirs = FusedLinearForPPO(5)
        assert not is_ours(theirs) and theirs.chunk_size == 5 and theirs.impl_backend == "torch"
        with pytest.raises(ValueError, match="no-such-backend"):
            FusedLinearForPPO(impl_backend="no-such-backend")
    assert now() == BEFORE
    with pytest.raises(ValueError, match="backends is 'torch'"):
        patch_verl(backends="torch")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_patches_end_in_any_order(order: tuple[int, int]) -> None:
    patches = [patch_verl(), patch_verl(backends=())]
    patches[order[0]].undo()
    assert is_ours(FusedLinearForPPO()) == (order[0] == 1)
    assert is_ours(FusedLinearForPPO(impl_backend="r1kernels"))
    patches[order[1]].undo()
    assert now() == BEFORE


@pytest.mark.parametrize("patch_first", [False, True])
def test_what_the_plugin_adds_remains(patch_first: bool) -> None:
    patch = patch_verl() if patch_first else None
    verl_head.add_backend()
    verl_head.add_sums()
    added = now()
    (patch or patch_verl()).undo()
    assert now() == added
    assert not is_ours(FusedLinearForPPO()) and is_ours(FusedLinearForPPO(impl_backend="r1kernels"))


def test_the_class_remains_that_of_verl() -> None:
    made_before = FusedLinearForPPO(3)
    hidden, weight, ids = torch.randn(4, 6), torch.randn(9, 6), torch.arange(4)
    with patch_verl(backends=()):
        assert torch_functional.FusedLinearForPPO is FusedLinearForPPO
        ours, theirs = FusedLinearForPPO(impl_backend="r1kernels"), FusedLinearForPPO()
        assert type(ours) is type(theirs) is FusedLinearForPPO
        assert not is_ours(pickle.loads(pickle.dumps(theirs)))
        assert is_ours(pickle.loads(pickle.dumps(ours)))
        subclass = Subclass(extra="x")
        assert subclass.chunk_size == 7 and not is_ours(subclass)
        expected = theirs(hidden, weight, ids)
        for head in (made_before, subclass, ours):
            torch.testing.assert_close(head(hidden, weight, ids), expected)
    torch.testing.assert_close(ours(hidden, weight, ids), expected)  # verl's own again


def test_a_module_that_is_loaded_again_is_patched_once() -> None:
    verl_head.add_backend()
    first = now()
    importlib.reload(monkey_patch)
    verl_head.add_backend()  # as the plugin does
    assert now()[:2] == first[:2]
    again = monkey_patch.patch_forward_with_backends
    assert again is not first[2] and not hasattr(again.__wrapped__, "_r1kernels")


@pytest.mark.parametrize(("holder", "name"), [
    (torch_functional, "FusedLinearForPPO"), (monkey_patch, "patch_forward_with_backends"),
    (FSDPEngineWithLMHead, "forward_step"), (FSDPEngineWithLMHead, "prepare_model_outputs"),
    (tensordict_utils, "get_non_tensor_data"),
])
@pytest.mark.parametrize("change", ["renamed", "other parameters"])
def test_what_verl_renames_is_named(holder: Any, name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "renamed":
        monkeypatch.delattr(holder, name)
    else:
        monkeypatch.setattr(holder, name, lambda hidden, weight: None)
    with pytest.raises(ImportError, match=rf"{name}.*verl 0\.9|{name}.*verl==0\.9"):
        patch_verl()
    monkeypatch.undo()
    assert now() == BEFORE  # nothing is left half replaced


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl_head, "SUPPORTED", "0.1")
    with pytest.raises(ImportError, match=r"verl is 0\.9.*0\.1"):
        patch_verl()
    patch_verl(any_version=True).undo()
