"""Two ranks that train a tiny model of transformers with FSDP2 or DDP, and the adapter.

    python transformers_ranks.py DIRECTORY
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from causal_models import VOCAB, build, shifted
from ranks import error_of, fork_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from r1kernels.integrations.transformers import Logits, apply_to, token_logprobs

WORLD = 2


def sharded(model: Any, mesh: Any, reshard: bool | None) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name.removeprefix("module."): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in model.named_parameters()}


def results_of(rank: int) -> dict[str, Any]:
    """The gradients of the model's own forward, and for each layout of ours."""
    mesh = init_device_mesh("cpu", (WORLD,))
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(rank))
    own: dict[str, Any] = {}
    results: dict[str, Any] = {"own": own}
    for name in ("tied", "untied"):
        model = build(num_hidden_layers=1, tie_word_embeddings=name == "tied")
        sharded(model, mesh, None)
        own[name] = gradients(model, model(input_ids=ids, labels=ids).loss)
        for layout in ("FSDP2", "FSDP2 before") if name == "tied" else ("FSDP2 again sharded", "DDP"):
            model = build(num_hidden_layers=1, tie_word_embeddings=name == "tied")
            if "before" not in layout:
                apply_to(model)
            if layout == "DDP":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                sharded(model, mesh, True if "again" in layout else None)
            if "before" in layout:
                apply_to(model)
            results[f"{layout}, {name}"] = gradients(model, model(input_ids=ids, labels=ids).loss)
            if name == "untied":
                model.zero_grad()
                loss = -token_logprobs(model, shifted(ids), input_ids=ids).sum() / 16
                results[f"{layout}, {name}, log-probs"] = gradients(model, loss)
    model = build()
    fully_shard(model.lm_head, mesh=mesh)
    results["head by itself"] = error_of(lambda: apply_to(model))
    model = build(num_hidden_layers=1)
    sharded(model, mesh, None)
    logits = Logits(torch.zeros(2, 32), model.lm_head, "this model", VOCAB)
    results["outside of the forward"] = error_of(logits.head_of_losses)
    return results


if __name__ == "__main__":
    warnings.filterwarnings("default")  # those of transformers
    warnings.filterwarnings("error", message=".*returned a view tensor")  # that of FSDP2
    importlib.import_module("transformers.models.llama.modeling_llama")  # once for all ranks
    fork_ranks(results_of, WORLD, Path(sys.argv[1]))
