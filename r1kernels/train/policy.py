"""The model that is trained: sharded over the ranks, float32 behind a model that computes in the run's precision.

FSDP2 of PyTorch shards weights, gradients and the state of AdamW over the axis `data`, and gathers the weights of a
layer, rounded, while it computes; gradients are summed over ranks in float32. An update of RL is smaller than the
distance of two neighbouring bfloat16 numbers, so nothing of this is kept in bfloat16. On the axis `tensor`, layers are
split by the plan in the model's configuration, and embedding and head by the vocabulary. One rank runs the same code.
"""

from __future__ import annotations

import copy
import fnmatch
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

from r1kernels.train.errors import ConfigError
from r1kernels.train.parallel import everywhere, first, ranks, share

Result = TypeVar("Result")
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


class Policy(nn.Module):
    """A model over the ranks of a mesh. Call it with a function of the model; inside, the weights are gathered.

        loss = policy(loss_of, batch)        # loss_of(model, batch)

    Every rank of the mesh must make the same calls.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    data: DeviceMesh
    tensor: DeviceMesh

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype, *, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.dtype, self.data, self.tensor = model, dtype, mesh["data"], mesh["tensor"]
        if dtype == torch.bfloat16 and mesh.device_type == "cuda" and is_flash_attn_2_available():
            model.set_attn_implementation("flash_attention_2")  # it needs no mask, and keeps packed samples apart
        if self.tensor.size() > 1:
            split_layers(model, self.tensor)
        whole = self.data.size() == 1  # nothing to save by gathering a layer twice
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        kept = "|".join(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        for name, module in model.named_modules():
            if kept and re.search(rf"(^|\.)({kept})$", name):
                fully_shard(module, mesh=self.data, reshard_after_forward=not whole)
            if isinstance(module, GradientCheckpointingLayer):
                if compiled:
                    module.compile(dynamic=True)
                fully_shard(module, mesh=self.data, mp_policy=policy, reshard_after_forward=not whole)
        fully_shard(self, mesh=self.data, mp_policy=policy, reshard_after_forward=False)
        for part in self._parts():
            part.set_gradient_divide_factor(1.0)  # losses are divided by the tokens of all ranks
            part.set_force_sum_reduction_for_comms(True)
        if whole:
            self.set_reshard_after_backward(False)

    def forward(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        return function(self.model, *args, **options)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def sync_gradients(self, last: bool) -> None:
        """Before a micro-batch. One rank adds its gradients up, and stores them once, after the `last`."""
        self.set_requires_gradient_sync(last or self.data.size() > 1)

    def share(self, items: Sequence[Any], size: int | None) -> list[Sequence[Any]]:
        """This rank's micro-batches of `size` items, or of all. All ranks have as many, so some may be empty."""
        number, count = self.data.get_local_rank(), self.data.size()
        mine, most = share(items, number, count), -(-len(items) // count)
        return [mine[place : place + (size or most)] for place in range(0, most, size or most)]

    def add_gradients(
        self, batches: Sequence[Any], spare: Any, loss: Callable[[Any], tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Adds up the gradients of this rank's micro-batches. `loss` returns what a micro-batch adds to the loss, and
        measures, which are returned for the micro-batches of all ranks. An empty one takes part as the `spare` one."""
        measures = []
        for number, batch in enumerate(batches, start=1):
            self.sync_gradients(number == len(batches))
            value, measured = loss(batch if len(batch) else spare)
            (value if len(batch) else 0.0 * value).backward()
            measures += [measured.detach()] * bool(len(batch))
        mine = [measured.cpu() for measured in measures]  # last, so that the device need not wait
        return [measured for some in everywhere(lambda: mine)[:: self.tensor.size()] for measured in some]

    def reshard_all(self) -> None:
        """Frees gathered weights. Needed after a change of the weights."""
        for part in self._parts():
            part.reshard()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, sharded, by name."""
        self.reshard_all()
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters as groups of an optimizer; those that are split on both axes are one of two."""
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter in self.trained().values():
            groups.setdefault(parameter.device_mesh, []).append(parameter)
        return [{"params": parameters} for parameters in groups.values()]

    @torch.no_grad()
    def weights(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """The whole weights by name, with adapters merged, as a checkpoint of transformers has them. Every rank must
        take all of them; each is freed when the next is taken."""
        self.reshard_all()
        state = dict(self.model.named_parameters())
        layers = {name: module for name, module in self.model.named_modules() if hasattr(module, "get_delta_weight")}
        for name, parameter in state.items():
            if ".lora_" in name:
                continue
            layer = layers.get(name.removesuffix(".base_layer.weight"))
            if layer is None:
                yield name.replace(".base_layer.", "."), whole(parameter.to(dtype))
                continue
            (adapter, a), (_, b) = next(zip(layer.lora_A.items(), layer.lora_B.items(), strict=True))
            change = layer.scaling[adapter] * (whole(b.weight).float() @ whole(a.weight).float())
            yield name.replace(".base_layer.", "."), (whole(parameter).float() + change).to(dtype)

    def shards(self) -> dict[str, Tensor]:
        """All weights, sharded, by name; they share memory with the model."""
        self.reshard_all()
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def refresh(self, policy: Policy) -> None:
        """Takes over the weights of a policy with the same shards."""
        self.reshard_all()
        policy.reshard_all()
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), policy.parameters(), strict=True):
                mine.to_local().copy_(theirs.to_local())

    def _parts(self) -> Iterator[FSDPModule]:
        return (module for module in self.modules() if isinstance(module, FSDPModule))


def share_out(
    make: Callable[[], tuple[PreTrainedModel, Result]], mesh: DeviceMesh, dtype: torch.dtype, *, compiled: bool = False
) -> tuple[Policy, Result]:
    """The policy of a model that the first rank makes on its CPU, and what it makes besides. Other ranks receive the
    structure, and their shards of the weights: no rank but the first has memory for all of them."""
    made: list[tuple[PreTrainedModel, Result]] = []

    def structure() -> bytes:
        made.append(make())
        return pickle.dumps(without_weights(made[0], "meta"))

    if ranks() == 1:
        model, other = make()
        return Policy(model, mesh, dtype, compiled=compiled), other
    # Memory that nobody writes to takes no space.
    model, other = without_weights(pickle.loads(first(structure)), "cpu")
    policy, weights = Policy(model, mesh, dtype, compiled=compiled), made[0][0].state_dict() if made else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return policy, other


def without_weights(made: tuple[PreTrainedModel, Result], device: str) -> tuple[PreTrainedModel, Result]:
    """A copy of a model, and of what belongs to it, with parameters that nothing is written to, on a device."""
    return copy.deepcopy(made, {id(weight): nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
                                for weight in made[0].parameters()})


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_tensor_axis(config: Any, size: int) -> None:
    """Raises ConfigError if a model of this configuration cannot be split into `size` parts."""
    config = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (value := getattr(config, name, None) or size) % size:
            raise ConfigError(f"'parallel.tensor' is {size}, which does not divide {name}, {value}")
    styles = {*(getattr(config, "base_model_tp_plan", None) or {"": "missing"}).values()}
    if size > 1 and styles - STYLES.keys():
        raise ConfigError(f"'parallel.tensor' is {size}, but the plan of {config.model_type!r} models has the "
                          f"styles {sorted(styles)}; expected only {sorted(STYLES)}")


def split_layers(model: PreTrainedModel, axis: DeviceMesh) -> None:
    """Splits the layers by the plan of the model's configuration, and embedding and head by rows of the vocabulary."""
    body, head = model.base_model, model.get_output_embeddings()
    check_tensor_axis(model.config, axis.size())
    plan = {name: STYLES[style]() for name, _ in body.named_modules()
            for pattern, style in model.config.get_text_config().base_model_tp_plan.items()
            if fnmatch.fnmatchcase(name, pattern)}
    embedding = body.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    name = next(name for name, module in body.named_modules() if module is embedding)
    parallelize_module(body, axis, plan | {name: RowwiseParallel(input_layouts=Replicate())})
    if tied:
        head.weight = embedding.weight
    elif head is not None:
        head.weight = nn.Parameter(distribute_tensor(head.weight, axis, [Shard(0)]))
    if head is not None and head.bias is not None:
        head.bias = nn.Parameter(distribute_tensor(head.bias, axis, [Shard(0)]))


def make_optimizer(policy: Policy, state: str = "fp32", **options: Any) -> torch.optim.Optimizer:
    """AdamW on the trained weights; with the `state` 8bit, its moments take 2 bytes a parameter instead of 8."""
    if state == "fp32":
        return torch.optim.AdamW(policy.parameter_groups(), fused=True, **options)
    from torchao.optim import AdamW8bit

    for name, weight in policy.trained().items():
        if weight.shape[0] % policy.data.size():
            raise ConfigError(f"'optimizer_state' is '8bit', which needs equal shards; {name} has {weight.shape[0]} "
                              f"rows for {policy.data.size()} ranks")

    return AdamW8bit(policy.parameter_groups(), **options)


def clip_gradient(policy: Policy, largest: float) -> float:
    """Scales the gradient down to a norm of at most `largest`; returns its norm."""
    groups = [[weight.grad for weight in group["params"] if weight.grad is not None]
              for group in policy.parameter_groups()]
    norm = sum(whole(torch.nn.utils.get_total_norm(grads)).double() ** 2 for grads in groups if grads) ** 0.5
    factor = (largest / (norm + 1e-6)).clamp(max=1.0).float()
    for grads in groups:
        torch._foreach_mul_([grad.to_local() for grad in grads], factor)
    return float(norm)
