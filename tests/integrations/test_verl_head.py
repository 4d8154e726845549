"""verl's fused head and ours: values, gradients, a whole model through verl's FSDP engine, and sum p^2."""

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1kernels import testing

pytest.importorskip("verl", reason="verl is not installed: make test-verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl's own

from tensordict import TensorDict  # noqa: E402
from verl.models.transformers import monkey_patch  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils import torch_functional as verl_functional  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402

with warnings.catch_warnings():  # of engines whose packages are not installed
    warnings.simplefilter("ignore")
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from r1kernels.integrations.verl_head import FusedLinear, patch_verl  # noqa: E402

VOCAB, WIDTH, LENGTHS = 40, 16, (5, 3)
VERLS = torch_functional.FusedLinearForPPO


def head_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = testing.generator(seed)
    hidden = torch.randn(*shape, WIDTH, generator=rng).to(dtype)
    weight = (0.3 * torch.randn(VOCAB, WIDTH, generator=rng)).to(dtype)
    return hidden, weight, torch.randint(VOCAB, shape, generator=rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,)])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_is_that_of_verl(
    shape: tuple[int, ...], dtype: torch.dtype, chunk_size: int | None, temperature: float
) -> None:
    hidden, weight, ids = head_inputs(shape, dtype)
    slopes = torch.randn(2, *shape, generator=testing.generator(1))

    def run(head: Any, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        logprobs, entropy = head(*leaves, ids.int(), temperature=temperature)
        (logprobs * slopes[0].to(logprobs) + entropy * slopes[1].to(logprobs)).sum().backward()
        return [value.detach().double() for value in (logprobs, entropy, *(leaf.grad for leaf in leaves))]

    exact = run(lambda h, w, i, temperature: plain(h, w, i, temperature)[:2], hidden.double(), weight.double())
    theirs = run(VERLS(chunk_size=2), hidden, weight)
    ours = run(FusedLinear(chunk_size), hidden, weight)
    for name, value, reference, expected in zip(("logprobs", "entropy", "hidden", "weight"), ours, theirs, exact,
                                                strict=True):
        # At most the error of verl's head and one rounding.
        limit = 2 * (reference - expected).abs().amax() if expected.numel() else 0
        limit = limit + 4 * torch.finfo(dtype).eps * expected.abs().max() if expected.numel() else 0
        assert value.shape == reference.shape and (value - expected).abs().le(limit).all(), name


def plain(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logs = ((hidden @ weight.T) / temperature).log_softmax(-1)
    return logs.gather(-1, ids.long()[..., None]).squeeze(-1), -(logs.exp() * logs).sum(-1), logs.exp().square().sum(-1)


def test_the_dtypes_of_the_operands_count_under_autocast() -> None:
    hidden, weight, ids = head_inputs((6,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = FusedLinear()(hidden, weight, ids)
    torch.testing.assert_close((logprobs, entropy), plain(hidden, weight, ids, 1.0)[:2])


def test_bad_arguments_of_the_head() -> None:
    hidden, weight, ids = head_inputs((6,), torch.float32)
    for size in (0, 2.5, "512", True):
        with pytest.raises(ValueError, match=f"chunk_size is {size!r}"):
            FusedLinear(chunk_size=size)
    with pytest.raises(ValueError, match="temperature is 0"):
        FusedLinear()(hidden, weight, ids, temperature=0.0)


# ---- a model in verl's engine ----------------------------------------------------------------------------------------


def tiny_model(**overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "vocab_size": VOCAB, "attn_implementation": "eager"}

    class Model(LlamaForCausalLM):  # verl replaces the forward of the class
        pass

    return Model(LlamaConfig(**sizes | overrides))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl takes a machine without a GPU for one with."""
    for name in ("get_device_id", "get_device_name"):
        monkeypatch.setattr(sys.modules[FSDPEngineWithLMHead.__module__], name, lambda: "cpu")


def engine_of(model: Any) -> Any:
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.module, engine._autocast_dtype = model, torch.float32
    engine.pad_to_length = False
    engine.use_ulysses_sp, engine.ulysses_sequence_parallel_size = False, 1
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.compute_entropy_from_logits = verl_functional.entropy_from_logits
    engine.get_data_parallel_group = lambda: None
    return engine


def micro_batch(fused: bool, sums: bool, packed: bool = False) -> TensorDict:
    rng = testing.generator(2)
    rows = [torch.randint(VOCAB, (length,), generator=rng) for length in LENGTHS]
    data = TensorDict({
        "input_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
        "position_ids": torch.nested.as_nested_tensor([torch.arange(n) for n in LENGTHS], layout=torch.jagged),
    }, batch_size=len(LENGTHS))
    tensordict_utils.assign_non_tensor(
        data, use_remove_padding=packed, use_fused_kernels=fused, calculate_entropy=True,
        calculate_sum_pi_squared=sums, temperature=0.8)
    return data


def outputs(model: Any, *options: bool) -> dict[str, Tensor]:
    """What verl's engine makes of a micro-batch, the tokens of all sequences in a row."""
    data = micro_batch(*options)
    _, output = engine_of(model).forward_step(data, loss_function=None, forward_only=True)
    return {name: value.values() for name, value in output["model_output"].items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["r1kernels", "torch"])
def test_a_model_in_the_engine_of_verl(name: str, packed: bool) -> None:
    expected = outputs(tiny_model(), False, True, packed)
    model = tiny_model()
    with patch_verl(backends=() if name == "r1kernels" else (name,)):
        monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=name)
        found = outputs(model, True, True, packed)
        without = outputs(model, True, False, packed)
    assert set(found) == set(expected) == {"log_probs", "entropy", "sum_pi_squared"}
    # The last token of a sequence has no next one; which one verl takes depends on the forward.
    kept = torch.ones(sum(LENGTHS), dtype=torch.bool)
    kept[torch.tensor(LENGTHS).cumsum(0) - 1] = packed
    for field, value in expected.items():
        torch.testing.assert_close(found[field][kept], value[kept], rtol=1e-4, atol=1e-5)
    assert set(without) == {"log_probs", "entropy"}
    torch.testing.assert_close(without["log_probs"], found["log_probs"])


def test_verls_own_head_still_has_no_sums() -> None:
    model = tiny_model()
    with patch_verl(backends=()):
        monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
        with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
            outputs(model, True, True)


def test_heads_for_which_verls_forward_is_wrong_are_refused() -> None:
    def refuse(model: Any, message: str) -> None:
        with patch_verl(), pytest.raises(ValueError, match=message):
            monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")

    model = tiny_model()
    model.lm_head = torch.nn.Linear(WIDTH, VOCAB)
    refuse(model, "Linear with a bias.*use_fused_kernels")
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(WIDTH, VOCAB, bias=False))
    refuse(model, "Sequential.*use_fused_kernels")
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    refuse(model, r"final_logit_softcapping is 30\.0.*use_fused_kernels")
    with patch_verl():  # without fused kernels, verl needs no such head
        monkey_patch.patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend="torch")
