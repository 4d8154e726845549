"""The CUDA kernels of losses over tokens, emulated: what takes many blocks, and what must not follow from how many."""

import ctypes
import shutil
from collections.abc import Iterator
from typing import Any

import cuda_emulation
import pytest
import torch
from torch import Tensor

from r1kernels import Objective, _library, backend, group_advantages, objectives, policy_loss, testing
from r1kernels.ops.group_advantages import SCALES
from r1kernels.ops.policy_loss import METRICS

pytestmark = [
    pytest.mark.slow(reason="compiles kernels for the emulator"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the extension too"),
    pytest.mark.few(4),  # each takes a second or more in the emulator
]

LONG = [4700, 0, 3, 513, 1, 1200, 0]  # 10, 1, 1, 2, 1, 3 and 1 pieces; 13 tiles of all
MANY = [5000, 0, 700, 2, 512, 1030, 900, 601, 0, 77, 4096]  # blocks that wait at a barrier of the grid
WIDE = {"clip_low": 0.3, "clip_high": 0.3}
OBJECTIVES = {
    "grpo": objectives.grpo(kl_coef=0.04, entropy_coef=0.01),
    "dr_grpo": objectives.dr_grpo(6000),
    "dapo": objectives.dapo(ratio_cap=1.5, kl_coef=0.1, kl="k1"),
    "gspo": objectives.gspo(),
    "gspo_of_tokens": Objective(ratio="sequence", aggregate="token_mean", kl="k2", kl_coef=0.2, **WIDE),
    "cispo_sequence": Objective(surrogate="cispo", ratio="sequence", clip_high=0.1),
    "sapo": objectives.sapo(),
    "dapo_kl_ratio": objectives.dapo(kl_coef=0.1, kl_ratio=True),
    "gspo_kl_ratio": objectives.gspo(kl_coef=0.1, kl_ratio=True, **WIDE),
    "cispo_kl_ratio": Objective(surrogate="cispo", ratio="sequence", kl_coef=0.2, kl_ratio=True, kl="k1"),
    "gspo_token": objectives.gspo_token(**WIDE),
    "cispo": objectives.cispo(clip_low=0.4, clip_high=-0.3),
    "dppo_tv": objectives.dppo(clip_high=0.05),
    "dppo_kl": objectives.dppo("kl"),
    "ipo": objectives.ipo(tau_neg=0.1),
    "vespo": objectives.vespo(),
    "reinforce": objectives.reinforce(),
}
DEVICES = {"one": (9, 1), "hopper": (9, 4), "ampere": (8, 3), "blackwell": (10, 7), "consumer": (12, 2)}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = cuda_emulation.operators()
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.r1k_emulator_properties.argtypes = [ctypes.c_int] * 3 + [ctypes.c_size_t]
    library.r1k_emulator_seed.argtypes = [ctypes.c_uint64]
    return library


class Machine:
    """What the kernels run on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def use(self, device: str, seed: int = 1) -> None:
        major, processors = DEVICES[device]
        self.library.r1k_emulator_properties(major, 0, processors, 227 * 1024)
        self.library.r1k_emulator_seed(seed)


@pytest.fixture
def machine(library: ctypes.CDLL) -> Iterator[Machine]:
    machine = Machine(library)
    machine.use("hopper")
    yield machine
    machine.use("hopper")


def run(inputs: dict[str, Any], objective: Objective, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """What the emulated operator returns for the arguments of `policy_loss`."""
    returned: list[tuple[Tensor, ...]] = []

    def call(_: Any, *args: Any) -> tuple[Tensor, ...]:
        returned.append(torch.ops.r1kernels_cuda.policy_loss(*args))
        return returned[0]

    with monkeypatch.context() as patch:
        patch.setattr(_library, "call", call)
        policy_loss(**inputs, objective=objective)
    return returned[0]


def policy_inputs(lengths: list[int], extras: tuple[str, ...]) -> dict[str, Any]:
    inputs = testing.random_policy(len(lengths), max(lengths), seed=3)
    shape = inputs["logprobs"].shape
    if "token_values" in extras:
        inputs["advantages"] = torch.randn(shape, generator=testing.generator(4))
        inputs["importance_weights"] = torch.randn(shape, generator=testing.generator(5)).exp()
    if "mask" in extras:
        inputs["mask"] = torch.rand(shape, generator=testing.generator(6)) < 0.7
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropy"):
            inputs[name] = testing.poisoned(inputs[name], inputs["mask"])
    if "normalizer" in extras:
        inputs["normalizer"] = torch.tensor(37.5)
    return testing.packed(inputs, lengths) if "packed" in extras else inputs


def check(inputs: dict[str, Any], objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, grad_logprobs, grad_entropy, metrics = run(inputs, objective, monkeypatch)
    expected = testing.policy_loss(objective, **inputs)
    testing.assert_within(loss, expected.loss)
    testing.assert_within(grad_logprobs, expected.grad_logprobs)
    if objective.entropy_coef != 0:
        testing.assert_within(grad_entropy, expected.grad_entropy)
    for name, value in zip(METRICS, metrics, strict=True):
        testing.assert_within(value, expected.metrics[name])


@pytest.mark.parametrize("extras", [("packed",), ("packed", "mask", "token_values"), ("mask",), ("mask", "normalizer")],
                         ids="_".join)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_long_and_short_sequences(
    name: str, extras: tuple[str, ...], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = LONG if "packed" in extras else [1100, 700, 1300]
    check(policy_inputs(lengths, extras), OBJECTIVES[name], monkeypatch)


@pytest.mark.parametrize("name", ["dapo", "gspo_of_tokens"])
def test_the_barrier_of_a_grid(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    check(policy_inputs(MANY, ("packed", "mask", "token_values")), OBJECTIVES[name], monkeypatch)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo_of_tokens"])
@pytest.mark.parametrize("lengths", [LONG, MANY], ids=["cluster", "grid"])
def test_the_bits_follow_from_the_batch_alone(
    lengths: list[int], name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = policy_inputs(lengths, ("packed", "mask", "token_values"))
    results = []
    for seed, device in enumerate(DEVICES):
        machine.use(device, seed)
        results.append(run(inputs, OBJECTIVES[name], monkeypatch))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_gradients_of_a_sequence_do_not_follow_from_the_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a sequence's ratio, whose sums are the longest."""
    inputs = policy_inputs(LONG, ("packed", "mask", "token_values"))
    inputs["normalizer"] = torch.tensor(7.0)
    everything = run(inputs, OBJECTIVES["gspo_of_tokens"], monkeypatch)[1]
    for begin, end in inputs["cu_seqlens"].unfold(0, 2, 1).tolist():
        alone = {k: v[begin:end] if v.dim() else v for k, v in inputs.items()}
        alone["cu_seqlens"] = torch.tensor([0, end - begin])
        assert torch.equal(run(alone, OBJECTIVES["gspo_of_tokens"], monkeypatch)[1], everything[begin:end])


def test_more_sequences_than_shared_memory_holds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = testing.random_policy(8000, 1)
    inputs = testing.packed(inputs, [1, 0] * 4000)
    check(inputs, OBJECTIVES["gspo"], monkeypatch)


def test_tiles_of_many_tokens(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain PyTorch: more tokens than the first tiles of all blocks hold."""
    inputs = testing.random_policy(9, 16_000)
    loss, grad_logprobs, _, metrics = run(inputs, OBJECTIVES["dapo"], monkeypatch)
    logprobs = inputs.pop("logprobs").double().requires_grad_()
    with backend("reference"):
        expected = policy_loss(logprobs, **inputs, objective=OBJECTIVES["dapo"])
    torch.testing.assert_close(loss.double(), expected.loss.detach(), rtol=1e-6, atol=0)
    grad = torch.autograd.grad(expected.loss, logprobs)[0]
    torch.testing.assert_close(grad_logprobs.double(), grad, rtol=1e-5, atol=0)
    assert metrics[METRICS.index("tokens")] == logprobs.numel()


# ---- group advantages --------------------------------------------------------------------------------------


def advantages(
    rewards: Tensor, group_size: int | None = None, group_ids: Tensor | None = None, scale: str = "group_std",
    ddof: int = 1, eps: float = 1e-4,
) -> Tensor:
    return torch.ops.r1kernels_cuda.group_advantages(
        rewards, group_ids, group_size or 1, SCALES.index(scale), ddof, eps
    )


def some_rewards(count: int) -> Tensor:
    rewards = torch.randn(count, generator=testing.generator(7))
    rewards[torch.rand(count, generator=testing.generator(8)) < 0.1] = float("nan")
    return rewards


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 33, 100, 1024, 1025, 5000])
def test_groups_of_any_size(size: int, scale: str, machine: Machine) -> None:
    rewards = some_rewards(size * max(2, 600 // size))
    found = advantages(rewards, size, scale=scale)
    with backend("reference"):
        expected = group_advantages(rewards.double(), size, scale=scale)
    testing.assert_within(found, expected, 2 * testing.rounding(expected, torch.float32))
    ids = torch.arange(rewards.numel()) // size
    order = torch.randperm(rewards.numel(), generator=testing.generator(9))
    shuffled = advantages(rewards[order], group_ids=ids[order] * 3 - 5, scale=scale)
    testing.assert_within(shuffled, expected[order], 2 * testing.rounding(expected[order], torch.float32))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ids", [False, True], ids=["size", "ids"])
def test_the_bits_follow_from_the_rewards_alone(ids: bool, scale: str, machine: Machine) -> None:
    rewards = some_rewards(9000)
    named = {"group_ids": torch.arange(9000).square() % 7} if ids else {"group_size": 3000}
    results = []
    for seed, device in enumerate(DEVICES):
        machine.use(device, seed)
        results.append(advantages(rewards, scale=scale, **named))
    assert all(torch.equal(result, results[0]) for result in results)


def test_large_groups_of_equal_rewards_give_zero(machine: Machine) -> None:
    for scale in SCALES:
        found = advantages(torch.full((6000,), 0.1), 3000, scale=scale, eps=0.0)
        assert torch.equal(found, torch.zeros(6000))
