"""Four ranks whose heads are DTensors, or parameters of FSDP2 and DDP.

    python mesh_ranks.py DIRECTORY

saves the results of each as DIRECTORY/RANK.pt; the tests compare them with one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import linear_cases as cases
import torch
from ranks import error_of, fork_ranks
from shard_cases import LEAD, VOCAB, WIDTH, batch, make, mask
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import r1kernels
from r1kernels import objectives

WORLD = 4


class FunctionalTraffic(TorchDispatchMode):
    """Counts what a rank gives to the collectives of DTensor: (name, bytes) of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls collectives with plain tensors
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.sent.append((func.__name__.partition(".")[0], args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


# ---- losses that are sums over tokens, of some rows of the batch ------------------------------------------


def statistics(case: dict[str, Any], rows: slice, **options: Any) -> Tensor:
    g, eta = (value[rows] for value in cases.weights_of(*LEAD))
    logprobs, entropy = r1kernels.linear_token_logprobs_and_entropy(**case, mask=mask()[rows], **options)
    return (g * logprobs + eta * entropy).sum().float()


def policy(case: dict[str, Any], rows: slice, **options: Any) -> Tensor:
    tokens = {name: value[rows] for name, value in batch().items()}
    objective = options.pop("objective", objectives.grpo(kl_coef=0.1, entropy_coef=0.02))
    return r1kernels.linear_grpo_loss(**case, **tokens, objective=objective, normalizer=LEAD[0], **options).loss


def two_phases(case: dict[str, Any], rows: slice, **options: Any) -> Tensor:
    return policy(case, rows, objective=objectives.gspo(clip_low=9, clip_high=9), **options)


def linear_nll(case: dict[str, Any], rows: slice, **options: Any) -> Tensor:
    case = case | {"targets": torch.where(mask()[rows], case["token_ids"], -100)}
    del case["token_ids"]
    return r1kernels.linear_cross_entropy(**case, reduction="sum", **options)


def distillation(case: dict[str, Any], rows: slice, **options: Any) -> Tensor:
    student = {f"student_{name}": case[name] for name in ("hidden", "weight")}
    teacher = {"teacher_hidden": case["hidden"].detach().flip(-1), "teacher_weight": case["weight"]}
    others = {name: value for name, value in case.items() if name not in ("hidden", "weight", "token_ids")}
    return r1kernels.linear_distillation_loss(
        **student, **teacher, **others, mask=mask()[rows], divergence="jsd", normalizer=10, **options
    ).loss


def two_targets(case: dict[str, Any], rows: slice, **options: Any) -> Tensor:
    case = dict(case)
    ids = case.pop("token_ids")
    ids = torch.stack([ids, case["weight"].shape[0] - 1 - ids])
    masks = mask()[rows].expand(ids.shape)
    given = {"token_ids": ids, "masks": masks, "normalizer": 10, "label_smoothing": 0.1, **options}
    return r1kernels.linear_multi_target(**case, **given).sum()


def more_statistics(case: dict[str, Any], rows: slice, **options: Any) -> Tensor:
    values = r1kernels.linear_token_statistics(**case, mask=mask()[rows], **options)
    return (values.logprobs + values.lse + values.entropy + values.sum_sq_probs).sum().float()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "statistics": statistics, "policy": policy, "two phases": two_phases, "cross entropy": linear_nll,
    "distillation": distillation, "two targets": two_targets, "more statistics": more_statistics,
}
CASES = {name: (name, "plain", "float32") for name in LOSSES} | {
    f"{name}, {head}, {dtypes}": (name, head, dtypes)
    for name, head, dtypes in (
        ("statistics", "everything", "bfloat16"), ("policy", "bias", "bfloat16"), ("policy", "lora", "float32"),
        ("policy", "plain", "float32 head"), ("cross entropy", "bias", "float16"),
    )
}


def taken(case: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The case with some of its sequences."""
    temperature = case.get("temperature")
    part = case | {name: case[name][rows] for name in ("hidden", "token_ids")}
    return part | {"temperature": temperature[rows]} if isinstance(temperature, Tensor) else part


def alone(name: str) -> dict[str, Tensor]:
    """The results of one process."""
    function, head, dtypes = CASES[name]
    case = make(head, dtypes)
    leaves = {key: value.requires_grad_() for key, value in cases.tensors(case).items()}
    loss = function_of(function)(cases.with_tensors(case, leaves), slice(None))
    loss.backward()
    return {"loss": loss.detach(), **{key: value.grad for key, value in leaves.items()}}


def function_of(name: str) -> Callable[..., Tensor]:
    return LOSSES[name]


# ---- the placements ---------------------------------------------------------------------------------------

VOCABULARY = {"weight": 0, "bias": 0, "lora_b": 1}


def placements(key: str, data: Any, tensor: bool) -> list[Any]:
    """Of a tensor of the head: `data` on the data axis, and its vocabulary on the tensor axis. FSDP2 cuts what the
    tensor axis has cut along the same dimension: _StridedShard."""
    if data == Shard(0) and tensor and VOCABULARY.get(key) == 0:
        data = _StridedShard(0, split_factor=2)
    kept = [Shard(VOCABULARY[key]) if key in VOCABULARY else Replicate()] if tensor else []
    return [*([] if data is None else [data]), *kept]


def run(
    name: str, mesh: DeviceMesh, data: Any, tensor: bool, hidden_on: Callable[[Tensor], Tensor] = lambda value: value
) -> dict[str, Any]:
    """The loss of this rank's sequences and the whole gradients; those of hidden are this rank's."""
    function, head, dtypes = CASES[name]
    ranks = 1 if data is None else mesh.size(0)
    rows = slice(0 if data is None else mesh.get_local_rank(0), None, ranks)
    case = taken(make(head, dtypes), rows)
    named = cases.tensors(case)
    leaves = {"hidden": named.pop("hidden").requires_grad_()}
    for key, value in named.items():
        leaves[key] = distribute_tensor(value, mesh, placements(key, data, tensor)).requires_grad_()
    used = leaves | {"hidden": hidden_on(leaves["hidden"])}
    options = {"process_group": mesh["tensor"]} if tensor else {}
    with FunctionalTraffic() as traffic:
        loss = function_of(function)(cases.with_tensors(case, used), rows, **options)
        loss.backward()
    for key in named:
        assert leaves[key].grad.placements == leaves[key].placements, (name, key)
    return {
        "loss": loss.detach(), "traffic": traffic.sent, "hidden": leaves["hidden"].grad,
        **{key: leaves[key].grad.full_tensor() for key in named},
    }


def same_tokens(mesh: DeviceMesh) -> dict[str, Any]:
    """Without a process group, on a mesh on which hidden is replicated: every rank has the whole gradient."""
    case = make("plain")
    weight = distribute_tensor(case["weight"], mesh, [Shard(0), Replicate()]).requires_grad_()
    hidden = distribute_tensor(case["hidden"], mesh, [Replicate(), Replicate()]).requires_grad_()
    loss = policy(case | {"weight": weight, "hidden": hidden}, slice(None))
    loss.backward()
    assert hidden.grad.placements == hidden.placements and weight.grad.placements == weight.placements
    return {"loss": loss.detach(), "hidden": hidden.grad.full_tensor(), "weight": weight.grad.full_tensor()}


def bad_calls(flat: DeviceMesh, grid: DeviceMesh, rank: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    case = make("plain")
    arguments = {name: case[name] for name in ("hidden", "token_ids")}
    weight = case["weight"]

    def call(weight: Any, **changes: Any) -> Callable[[], Any]:
        return lambda: r1kernels.linear_token_logprobs(**arguments | {"weight": weight} | changes)

    everywhere = distribute_tensor(weight, grid, [Replicate(), Replicate()])
    columns = distribute_tensor(weight, grid, [Replicate(), Shard(1)])
    group = grid["tensor"]
    yield "replicated", call(everywhere, process_group=group)
    yield "columns", call(columns, process_group=group)
    yield "another group", call(distribute_tensor(weight, flat, [Shard(0)]), process_group=group)
    yield "two dimensions", call(weight, process_group=grid)
    yield "partial", call(DTensor.from_local(weight, flat, [Partial()]))
    split = distribute_tensor(case["hidden"], flat, [Shard(2)])
    yield "features", call(weight, hidden=split)
    into = torch.zeros(VOCAB, WIDTH)
    yield "into", call(everywhere.requires_grad_(), grad_accumulation_into=into)
    backwards = DeviceMesh("cpu", [3, 2, 1, 0])
    yield "descending", call(
        distribute_tensor(weight, backwards, [Shard(0)]), process_group=flat
    )


# ---- modules of FSDP2 -------------------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """A layer and a head, whose forward computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        case = make("plain")
        self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        self.layer.weight.data.copy_(torch.eye(WIDTH) + 0.1 * case["weight"][:WIDTH])
        self.head.weight.data.copy_(case["weight"])

    def forward(self, hidden: Tensor, token_ids: Tensor, rows: slice, **options: Any) -> Tensor:
        case = {"hidden": self.layer(hidden), "weight": self.head.weight, "token_ids": token_ids}
        return policy(case, rows, **options)


def fsdp(mesh: DeviceMesh, inside: bool, precision: MixedPrecisionPolicy) -> dict[str, Any]:
    """The head's parameter in its own forward (a plain tensor, or a DTensor of the tensor axis), or after it."""
    model = Policy()
    tensor = mesh.ndim == 2
    if tensor:
        parallelize_module(model.head, mesh["tensor"], ColwiseParallel())
    data = mesh["data"] if tensor else mesh
    for module in (model.layer, *([] if inside else [model.head]), model):
        fully_shard(module, mesh=data, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    rows = slice(data.get_local_rank(), None, data.size())
    case = taken(make("plain"), rows)
    options = {"process_group": mesh["tensor"]} if tensor else {}
    if inside:
        loss = model(case["hidden"], case["token_ids"], rows, **options)
    else:
        hidden = model.layer(case["hidden"])
        assert isinstance(model.head.weight, DTensor)
        loss = policy({"hidden": hidden, "weight": model.head.weight, "token_ids": case["token_ids"]}, rows, **options)
    loss.backward()
    grads = {name: value.grad.full_tensor() for name, value in model.named_parameters()}
    return {"loss": loss.detach(), **grads}


PRECISIONS = {
    "float32": MixedPrecisionPolicy(), "bfloat16": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
}


def fsdp_alone(dtype: torch.dtype, head: torch.dtype | None = None) -> dict[str, Tensor]:
    """One process with the dtypes of the parameters in FSDP2's forward, and gradients of two halves in float32."""
    model, case = Policy(), make("plain")
    wide = {"layer.weight": dtype, "head.weight": head or dtype}
    weights = {name: value.detach().to(wide[name]).requires_grad_() for name, value in model.named_parameters()}
    hidden = case["hidden"].to(dtype)
    total, grads = torch.zeros(()), {name: torch.zeros(value.shape) for name, value in weights.items()}
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        loss = torch.func.functional_call(model, weights, (hidden[rows], case["token_ids"][rows], rows))
        for name, grad in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            grads[name] += grad
        total += loss.detach()
    return {"loss": total, **grads}


def results_of(rank: int) -> dict[str, Any]:
    flat = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("data",))
    line = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tensor",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    results: dict[str, Any] = {}
    for name, (_, head, dtypes) in CASES.items():
        results[f"{name}: FSDP"] = run(name, flat, Shard(0), False)
        if dtypes != "float32 head" or head == "plain":
            results[f"{name}: tensor"] = run(name, line, None, True)
        results[f"{name}: both"] = run(name, grid, Shard(0), True)
        results[f"{name}: replicated"] = run(name, flat, Replicate(), False)

    def on_tensor(value: Tensor) -> Tensor:
        return DTensor.from_local(value, grid["tensor"], [Replicate()], run_check=False)

    results["policy: hidden is a DTensor"] = run("policy", grid, Shard(0), True, on_tensor)
    results["same tokens"] = same_tokens(grid)
    for inside in (True, False):
        for name, precision in PRECISIONS.items():
            results[f"fsdp {inside} {name}"] = fsdp(grid, inside, precision)
    for name, call in bad_calls(flat, grid, rank):
        results[f"error {name}"] = error_of(call)
    case = make("bias")
    spread = {key: distribute_tensor(case[key], flat, [Shard(0)]) for key in ("weight", "bias")}
    results["logits"] = r1kernels.linear_logits(case["hidden"], **spread)
    return results


if __name__ == "__main__":
    fork_ranks(results_of, WORLD, Path(sys.argv[1]))
