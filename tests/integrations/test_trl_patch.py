"""patch_trl: TRL's own function and ours give the same, in five trainers and one by one."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_cases import TRAINERS, make_trainer, tiny_model_and_tokenizer, trained

from r1kernels import testing
from r1kernels.integrations import trl as adapter
from r1kernels.integrations.trl import patch_trl

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # TRL's own

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def hook() -> Any:
    from trl.trainer import utils

    return utils._ChunkedLogProbFunction


@pytest.mark.few(8)
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ("log_probs", *OUTPUTS),
                                     ("mean_logits",), ("is_top1", "entropy")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_results_and_gradients(
    outputs: tuple[str, ...], bias: bool, softcap: float | None, logit_scale: float, temperature: float
) -> None:
    rng = testing.generator(0)
    count, width, vocab = 29, 12, 61
    given = [torch.randn(shape, generator=rng) for shape in ((count, width), (vocab, width), (vocab,))]
    given[1][7] = given[1][5]  # a tie, also of the largest logit
    given[0][:4] = given[1][5]
    given[2][7] = given[2][5]
    targets = torch.randint(0, vocab, (count,), generator=rng)
    targets[:4] = torch.tensor([5, 7, 5, 7])
    slopes = [torch.randn(count, generator=rng) for _ in range(2)]
    results, gradients = [], []
    for function in (hook(), adapter.LogProbs):
        leaves = [value.clone().requires_grad_() for value in (given if bias else given[:2])]
        found = function.apply(leaves[0], leaves[1], leaves[2] if bias else None, targets, temperature, 16, softcap,
                               logit_scale, outputs)
        loss = sum((value * slope).sum() for value, slope in zip(found, slopes, strict=False) if value is not None)
        results.append(found)
        gradients.append(torch.autograd.grad(loss, leaves))
    assert len(results[0]) == len(results[1]) == 5
    for theirs, ours in zip(*results, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert theirs.dtype == ours.dtype and theirs.requires_grad == ours.requires_grad
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                                    (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_dtypes_and_autocast(dtypes: tuple[torch.dtype, torch.dtype], autocast: bool) -> None:
    """As near to float64 as TRL is, whose logits are rounded to 16 bits; gradients have the dtypes of their tensors."""
    rng = testing.generator(0)
    hidden, weight = (torch.randn(shape, generator=rng).to(dtype)
                      for shape, dtype in zip(((40, 16), (61, 16)), dtypes, strict=True))
    targets, slope = torch.randint(0, 61, (40,), generator=rng), torch.randn(40, generator=rng)
    found = []
    for function in (hook(), adapter.LogProbs, None):
        leaves = [value.clone().requires_grad_() for value in (hidden, weight)]
        if function is None:  # float64
            exact = (leaves[0].double() @ leaves[1].double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
            results = (exact, None)
        else:
            with torch.autocast("cpu", enabled=autocast):
                results = function.apply(*leaves, None, targets, 1.0, 16, None, 1.0, ("log_probs", "entropy"))
            assert results[0].dtype == results[1].dtype == torch.float32
        gradients = torch.autograd.grad((results[0] * slope).sum(), leaves)
        assert [value.dtype for value in gradients] == list(dtypes)
        found.append((results[0].detach().double(), *(value.double() for value in gradients)))
    rounding = 2.0**-8 if autocast or torch.bfloat16 in dtypes else 1e-6
    for theirs, ours, exact in zip(*found, strict=True):
        size = exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * ((theirs - exact).abs().max() + rounding * size)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, tmp_path: Any) -> None:
    calls = []

    class Counting(adapter.LogProbs):
        @staticmethod
        def apply(*arguments: Any) -> Any:
            calls.append(len(arguments))
            return adapter.LogProbs.apply(*arguments)

    beta = {"GRPO": {"beta": 0.1}}.get(name, {})
    theirs = trained(lambda: make_trainer(name, tmp_path, **beta))
    assert not calls
    with patch_trl(), adapter.swapped(Counting):
        ours = trained(lambda: make_trainer(name, tmp_path, **beta))
    assert calls and set(calls) == {9}
    assert torch.equal(theirs[0], ours[0])
    moved = (theirs[1] - theirs[0]).norm()
    assert moved > 1e-4 and (theirs[1] - ours[1]).norm() <= 1e-4 * moved
    assert len(theirs[2]) == len(ours[2])
    for lines in zip(theirs[2], ours[2], strict=True):
        assert lines[1] == pytest.approx(lines[0], rel=1e-3, abs=1e-5, nan_ok=True)


def test_chunk_bytes_sets_the_memory_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int | None] = []

    def logprobs(*_: Any, chunk_bytes: int | None, **__: Any) -> Any:
        given.append(chunk_bytes)
        return torch.zeros(2)

    monkeypatch.setattr(adapter.r1kernels, "linear_token_logprobs", logprobs)
    arguments = torch.ones(2, 4), torch.ones(9, 4), None, torch.zeros(2).long(), 1.0, 16, None, 1.0, ()
    with patch_trl(chunk_bytes=2**20):
        hook().apply(*arguments)
        with patch_trl():
            hook().apply(*arguments)
        hook().apply(*arguments)
    adapter.LogProbs.apply(*arguments)
    assert given == [2**20, None, 2**20, None]


def test_undo_in_any_order() -> None:
    before = hook()
    first, second = patch_trl(), patch_trl()
    assert hook() is adapter.LogProbs
    first.undo()
    first.undo()
    assert hook() is adapter.LogProbs
    second.undo()
    assert hook() is before
    with patch_trl():
        assert hook() is adapter.LogProbs
    assert hook() is before
    with pytest.raises(ZeroDivisionError), patch_trl():
        raise ZeroDivisionError
    assert hook() is before


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = hook()
    monkeypatch.setattr("r1kernels.integrations.version", lambda package: "1.160.2")
    with pytest.raises(ImportError, match=r"trl is 1\.160\.2.*1\.16; install trl==1\.16\.\*.*any_version=True"):
        patch_trl()
    assert hook() is before
    with patch_trl(any_version=True):
        assert hook() is adapter.LogProbs


def lost(utils: types.ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(utils, "_ChunkedLogProbFunction")


def renamed(utils: types.ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(utils, "add_fused_lm_head")


def ten_arguments(model: Any) -> Any:
    _ChunkedLogProbFunction = hook()
    return _ChunkedLogProbFunction.apply(*range(9), model)


def other_call(utils: types.ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(utils, "add_fused_lm_head", ten_arguments)


def no_call(utils: types.ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(utils, "add_fused_lm_head", lost)


@pytest.mark.parametrize("change", [lost, renamed, other_call, no_call])
def test_a_change_of_trl_is_refused_at_once(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    change(utils, monkeypatch)
    with pytest.raises(ImportError, match=r"_ChunkedLogProbFunction\.apply with 9 arguments.*install trl==1\.16"):
        patch_trl()
    assert getattr(utils, "_ChunkedLogProbFunction", None) is not adapter.LogProbs


def test_a_head_that_is_no_linear_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight of torch\.uint8 with shape \(30, 1\).*size 12.*without r1kernels"):
        adapter.LogProbs.apply(torch.ones(2, 12), torch.ones(30, 1, dtype=torch.uint8), None, torch.zeros(2).long(),
                               1.0, 16, None, 1.0, ("log_probs",))


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_zero_3_is_released_before_backward(bias: bool) -> None:
    """DeepSpeed frees a partitioned weight after the forward. Here NaN stands for what it leaves behind."""
    rng = testing.generator(0)
    hidden = torch.randn(5, 8, generator=rng, requires_grad=True)
    weight, offset = (torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((11, 8), (11,)))
    weight.ds_id = offset.ds_id = 0
    targets = torch.arange(5)
    logits = hidden @ weight.T + (offset if bias else 0)
    expected = torch.autograd.grad(logits.log_softmax(-1).gather(1, targets[:, None]).sum(), (hidden, weight))
    found = adapter.LogProbs.apply(hidden, weight, offset if bias else None, targets, 1.0, 16, None, 1.0, ())[0]
    with torch.no_grad():
        weight.data, offset.data = weight.data * torch.nan, offset.data * torch.nan
    for got, wanted in zip(torch.autograd.grad(found.sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_head_of_a_dtensor(tmp_path: Any) -> None:
    """TRL gathers a weight of FSDP2 before the call; the gradient has its placement."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
    from trl.trainer.utils import add_fused_lm_head

    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0,
                                         world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ids = torch.tensor([[3, 4, 5, 1], [4, 4, 3, 1]])
        gradients: list[Tensor] = []
        for sharded in (False, True):
            model = tiny_model_and_tokenizer()[0]
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            if sharded:
                whole = model.lm_head.weight.detach()
                model.lm_head.weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
                with patch_trl():
                    result = model(input_ids=ids, labels=ids, fused_lm_head=True)
                    result.loss.backward()
                assert isinstance(model.lm_head.weight.grad, DTensor)
                gradients.append(model.lm_head.weight.grad.full_tensor())
            else:
                model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
                gradients.append(model.lm_head.weight.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("torch.compile takes 8 s; runs with --full")
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.tensor([[3, 4, 5, 1], [4, 4, 3, 1]])
    found = []
    with patch_trl():
        for compiled in (False, True):
            torch._dynamo.reset()
            model = tiny_model_and_tokenizer()[0]
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            if compiled:
                model.compile(backend="aot_eager")
            result = model(input_ids=ids, labels=ids, fused_lm_head=True)
            (result.loss + result.entropy.sum()).backward()
            found.append((result.log_probs.detach(), model.lm_head.weight.grad))
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)
