"""Two ranks whose logits are parts of a vocabulary, as torchtitan's tensor parallelism has them.

    python torchtitan_ranks.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ranks import fork_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import set_spmd_backend

from r1kernels import testing
from r1kernels.integrations.torchtitan import CrossEntropyLoss

WORLD, VOCAB = 2, 51


def inputs() -> tuple[Tensor, Tensor]:
    rng = testing.generator(0)
    logits, labels = torch.randn(2, 3, VOCAB, generator=rng), torch.randint(VOCAB, (2, 3), generator=rng)
    labels[0, 1] = -100
    return logits, labels


def results_of(rank: int) -> dict[str, Any]:
    logits, labels = inputs()
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    loss = CrossEntropyLoss.Config(global_vocab_size=VOCAB).build(compile_config=None)
    part = logits.chunk(WORLD, -1)[rank].contiguous().requires_grad_()
    with set_current_spmd_mesh(mesh):
        value, _ = loss(part, labels, torch.tensor(5.0))
    value.backward()
    results = {"spmd_types": (value.detach(), part.grad)}
    set_spmd_backend("partial_dtensor")
    part = part.detach().requires_grad_()
    value, _ = loss(DTensor.from_local(part, mesh, [Shard(2)], shape=logits.shape, stride=logits.stride()), labels,
                    torch.tensor(5.0))
    value.backward()
    results["partial_dtensor"] = value.detach(), part.grad
    return results


if __name__ == "__main__":
    fork_ranks(results_of, WORLD, Path(sys.argv[1]))
