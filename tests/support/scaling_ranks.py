"""Ranks that compute micro-batches of GRPO with FSDP2 and a tensor axis, and count what they send.

    python scaling_ranks.py DIRECTORY

writes DIRECTORY/counts.json, for several layouts: bytes and collectives of rank 0, by axis. One process imports torch,
and the ranks are forks of it, because the import takes longer than the work.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import r1kernels
from r1kernels.train.model import enable_checkpointing, hidden_states

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]  # ranks of the data axis and of the tensor axis
TOKENS = 24
CONFIG = transformers.LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False)
# By what a ring sends, for each byte of its larger side.
RINGS = {"all_gather": 1, "allgather": 1, "reduce_scatter": 1, "all_reduce": 2, "allreduce": 2}


class Wire(TorchDispatchMode):
    """Counts the bytes that a ring would send, and the collectives, by process group."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **kwargs or {})
        namespace, name = operator._schema.name.split("::")
        ring = next((weight for part, weight in RINGS.items() if part in name), None)
        if namespace in ("c10d", "_c10d_functional") and ring:
            group, ranks = group_of(args)
            sides = [sum(tensor.nbytes for tensor in tree_leaves(side) if isinstance(tensor, Tensor))
                     for side in (*args[:2], results)]
            if ranks > 1:
                self.sent[group] += round(ring * max(sides) * (ranks - 1) / ranks)
                self.calls[group] += 1
        return results


def group_of(args: Any) -> tuple[str, int]:
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            group = distributed.ProcessGroup.unbox(value)
            return group.group_name, group.size()
    name = next(value for value in reversed(args) if isinstance(value, str) and value not in ("sum", "avg"))
    return name, distributed.distributed_c10d._resolve_process_group(name).size()


class Policy(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[..., Tensor], **inputs: Tensor) -> Tensor:
        weight = self.model.get_output_embeddings().weight
        return loss(hidden_states(self.model, **inputs), weight.to_local() if isinstance(weight, DTensor) else weight)


def build(mesh: Any, checkpointed: bool) -> Policy:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG).eval()
    if checkpointed:
        enable_checkpointing(model)
    if mesh["tensor"].size() > 1:
        styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
        plan = {name: styles[style]() for name, _ in model.base_model.named_modules()
                for pattern, style in CONFIG.base_model_tp_plan.items() if fnmatch.fnmatch(name, pattern)}
        plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model.base_model, mesh["tensor"], plan)
        parallelize_module(model.lm_head, mesh["tensor"], ColwiseParallel())
    policy, rounding = Policy(model), MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh["data"], mp_policy=rounding, reshard_after_forward=True)
    fully_shard(policy, mesh=mesh["data"], mp_policy=rounding, reshard_after_forward=False)
    policy.set_gradient_divide_factor(1.0)
    policy.set_force_sum_reduction_for_comms(True)
    return policy


def count(rank: int, layout: tuple[int, int], store: str, path: str) -> None:
    """What rank 0 sends for a micro-batch that is trained, and one whose log-probs are computed."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=math.prod(layout),
                                   timeout=datetime.timedelta(seconds=120))
    mesh, found = init_device_mesh("cpu", layout, mesh_dim_names=("data", "tensor")), {}
    group = mesh["tensor"].get_group() if layout[1] > 1 else None
    axes = {mesh[name].get_group().group_name: name for name in ("data", "tensor")}
    ids = torch.randint(0, CONFIG.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "position_ids": torch.arange(TOKENS)[None]}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        advantages, old = torch.ones(1), torch.zeros(1, TOKENS)
        return r1kernels.linear_grpo_loss(hidden, weight, ids, advantages, old_logprobs=old, process_group=group,
                                          normalizer=1.0).loss

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return r1kernels.linear_token_logprobs(hidden, weight, ids, process_group=group)

    for checkpointed in (False, True):
        policy = build(mesh, checkpointed)
        for name in ("trained", "scored"):
            with Wire() as wire, torch.set_grad_enabled(name == "trained"):
                result = policy(loss if name == "trained" else logprobs, **inputs)
                if name == "trained":
                    result.backward()
            for part in policy.modules():
                if hasattr(part, "reshard"):
                    part.reshard()
            found[f"{name}, checkpointed" if checkpointed else name] = {
                axis: [wire.sent[key], wire.calls[key]] for key, axis in axes.items()}
    if rank == 0:
        Path(path).write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    forks, counts = multiprocessing.get_context("fork"), {}
    for layout in LAYOUTS:
        name = "x".join(map(str, layout))
        files = str(directory / f"store-{name}"), str(directory / f"{name}.json")
        ranks = [forks.Process(target=count, args=(rank, layout, *files)) for rank in range(math.prod(layout))]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        counts[name] = json.loads(Path(files[1]).read_text())
    (directory / "counts.json").write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
