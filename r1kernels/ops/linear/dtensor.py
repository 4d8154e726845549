"""Heads whose tensors are DTensors: of tensor parallelism, of FSDP2, or of both on a mesh of two dimensions.

On the mesh dimension that `process_group` names, a weight with Shard(0) is the vocabulary shard that the kernels need.
On every other dimension, a weight is gathered once a call. Ranks there have different tokens, so its gradient is a
partial sum. One reduction adds the parts in float32 and leaves them with the placements of the weight. Only if hidden
is a DTensor that is replicated there, tokens and gradients are the same already.

Autograd would round a gradient to the dtype of its tensor before the reduction. So it does not see the gathered weight,
but a float32 tensor of this shape without memory, which receives the gradient.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from r1kernels.ops.linear.head import Names
from r1kernels.ops.shards import checked_group, collective


def is_dtensor(value: Any) -> bool:
    """Nothing is imported for it: a DTensor exists only where its module is loaded."""
    module = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class Placed:
    """A DTensor of a head, and how it becomes the tensor that the kernels read.

    Attributes:
        probe: a tensor of its local shape and dtype, without memory, for the checks before the gathering.
    """

    name: str
    value: Any
    shape: list[Any]

    def __init__(
        self, name: str, value: Any, vocab_dim: int | None, group: Any, same_tokens: set[tuple[int, ...]]
    ) -> None:
        from torch.distributed.tensor import Partial, Replicate, Shard

        mesh = value.device_mesh
        self.name, self.value, self.shape = name, value, list(value.shape)
        self.opened: list[Any] = []
        self.parts: list[Any] = []
        found = False
        for axis, placement in enumerate(value.placements):
            ranks = _ranks(mesh.get_group(axis))
            where = f"{name} has placement {placement} on dimension {_axis_name(mesh, axis)} of its device mesh"
            if placement.is_partial():
                raise ValueError(f"{where}, expected Shard or Replicate")
            if group is not None and ranks == _ranks(group):
                found = True
                kept = Replicate() if vocab_dim is None else Shard(vocab_dim)
                if placement != kept and len(ranks) > 1:
                    raise ValueError(f"{where}, which is process_group, expected {kept}")
                rank = mesh.get_coordinate()[axis]
                if rank != torch.distributed.get_rank(group):  # DTensor's shards have the order of the mesh
                    raise ValueError(f"{name} has a device mesh with ranks {mesh.mesh.tolist()}, expected the order of "
                                     f"the ranks in process_group, {list(ranks)}")
                self.opened.append(kept)
                self.parts.append(kept)
                if vocab_dim is not None:
                    self.shape[vocab_dim] = _chunk(self.shape[vocab_dim], len(ranks), rank)
            else:
                self.opened.append(Replicate())
                same = len(ranks) == 1 or ranks in same_tokens
                self.parts.append(Replicate() if same else Partial())
        if group is not None and not found:
            raise ValueError(f"{name} has a device mesh with ranks {mesh.mesh.tolist()}, expected a dimension with the "
                             f"ranks of process_group, {list(_ranks(group))}")
        empty = torch.empty((), dtype=value.dtype, device=value.to_local().device)
        self.probe: Tensor = empty.expand(self.shape).requires_grad_(value.requires_grad)

    def open(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(the local tensor, what receives its gradient). `dtype` is that of sums over ranks."""
        wanted = (getattr(self.value, "grad_dtype", None) if self.value.is_leaf else None) or self.value.dtype
        partial = any(part.is_partial() for part in self.parts)
        with collective(f"the gathering of {self.name}", self.value.device_mesh.mesh.flatten().tolist(), "its mesh"):
            local = self.value.detach().redistribute(placements=self.opened).to_local()
        receiver = _Receiver.apply(
            self.value, local, self.name, tuple(self.parts), dtype if partial else wanted, wanted
        )
        return local, receiver


class _Receiver(torch.autograd.Function):
    """A tensor of a local shape without memory, whose gradient becomes that of the DTensor."""

    @staticmethod
    def forward(
        ctx: Any, value: Any, local: Tensor, name: str, parts: tuple[Any, ...], dtype: torch.dtype,
        wanted: torch.dtype,
    ) -> Tensor:
        ctx.target = value.device_mesh, value.placements, value.shape, value.stride()
        ctx.name, ctx.parts, ctx.wanted = name, parts, wanted
        return local.new_empty((), dtype=dtype).expand(local.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None, None, None, None]:
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = ctx.target
        whole = DTensor.from_local(grad, mesh, ctx.parts, run_check=False, shape=shape, stride=stride)
        with collective(f"the sum of gradients of {ctx.name}", mesh.mesh.flatten().tolist(), "its mesh"):
            whole = whole.redistribute(placements=placements)
        return whole.to(ctx.wanted), None, None, None, None, None


def local_tensors(
    hidden: Any, weight: Any, options: Any, names: Names = Names()  # noqa: B008 - frozen
) -> tuple[Tensor, Any, Any]:
    """The arguments of a linear function, with `Placed` for DTensors of the head. Others are unchanged."""
    lora, bias = options.get("lora"), options.get("bias")
    pair = tuple(lora) if isinstance(lora, (tuple, list)) and len(lora) == 2 else ()
    if not any(is_dtensor(value) for value in (hidden, weight, bias, *pair)):
        return hidden, weight, options
    group = checked_group("process_group", options.get("process_group"))
    same_tokens: set[tuple] = set()
    if is_dtensor(hidden):
        hidden, same_tokens = _local_hidden(names.hidden, hidden, group)

    def placed(name: str, value: Any, vocab_dim: int | None) -> Any:
        return Placed(name, value, vocab_dim, group, same_tokens) if is_dtensor(value) else value

    head = {
        "bias": placed(f"{names.options}bias", bias, 0),
        "lora": (placed(f"{names.options}lora A", pair[0], None), placed(f"{names.options}lora B", pair[1], 1))
        if pair else lora,
    }
    weight = placed(names.weight, weight, 0)
    opened = any(isinstance(value, Placed) for value in (weight, head["bias"], *(head["lora"] if pair else ())))
    if opened and options.get("grad_accumulation_into") is not None:
        raise ValueError("grad_accumulation_into is given with a head of DTensors, expected None")
    return hidden, weight, {**options, **{name: value for name, value in head.items() if name in options}}


def probes(weight: Any, options: Any) -> tuple[dict[str, Placed], Any, Any]:
    """(the tensors of a head that are `Placed`, by name; weight and options with their probes instead)."""
    lora = options.get("lora")
    named = {"weight": weight, "bias": options.get("bias")}
    if isinstance(lora, tuple) and len(lora) == 2:
        named |= {"lora_a": lora[0], "lora_b": lora[1]}
    placed = {name: value for name, value in named.items() if isinstance(value, Placed)}
    if not placed:
        return placed, weight, options
    read = {name: value.probe if name in placed else value for name, value in named.items()}
    if "lora_a" in read:
        lora = (read["lora_a"], read["lora_b"])
    return placed, read["weight"], {**options, "bias": read["bias"], "lora": lora}


def _local_hidden(name: str, hidden: Any, group: Any) -> tuple[Tensor, set[tuple]]:
    """The hidden states of this rank, and the ranks of each mesh dimension on which all have the same."""
    same = set()
    for axis, placement in enumerate(hidden.placements):
        ranks = _ranks(hidden.device_mesh.get_group(axis))
        named = group is not None and ranks == _ranks(group)
        if placement.is_replicate():
            same.add(ranks)
        elif len(ranks) > 1 and (named or not placement.is_shard() or placement.is_shard(hidden.dim() - 1)):
            raise ValueError(
                f"{name} has placement {placement} on dimension {_axis_name(hidden.device_mesh, axis)} of its device "
                f"mesh, expected Replicate{'' if named else ', or Shard on a dimension of tokens'}"
            )
    return hidden.to_local(grad_placements=hidden.placements), same


def _axis_name(mesh: Any, axis: int) -> Any:
    return axis if mesh.mesh_dim_names is None else repr(mesh.mesh_dim_names[axis])


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))


def _chunk(size: int, ranks: int, rank: int) -> int:
    """How many of `size` rows a rank has, as `torch.chunk` gives them out."""
    step = math.ceil(size / ranks)
    return max(min(step, size - rank * step), 0)
