"""A model of what a step of GRPO costs on many devices: seconds, FLOPs and bytes on the wire, by axis.

    python benchmarks/scaling.py benchmarks/results/scaling.json

writes the numbers for 8, 64 and 512 GPUs; docs/make_numbers.py makes the table of docs/scaling.md from them. No GPU was
measured: the FLOPs and bytes follow from the algorithm, and tests compare the bytes with those that 1, 2 and 4
processes send; the seconds follow from the speeds and shares in `Machine`, which are assumptions.

Bytes are those that one rank sends in a ring: (n - 1) / n of the result of an all-gather or of the input of a
reduce-scatter among n ranks, and twice that for an all-reduce.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FP32, BF16 = 4, 2
ROLLOUT_BYTES = 30  # of a token: ids, masks, log-probs, advantages
HEAD_BYTES, HEAD_CALL_BYTES = 24, 96  # of a token, and of a call: docs/parallel.md
COLUMN_MODULES = 5  # q, k, v, gate and up: each sums the gradient of its input over the tensor axis
ROW_MODULES = 2  # o and down: each sums its output


@dataclass(frozen=True)
class Model:
    """Numbers of parameters and sizes of a language model."""
    name: str
    layers: int
    hidden: int
    vocab: int
    layer: float  # parameters of a layer
    attention: int  # entries of the queries of a token in a layer (mean of those of QK and PV)
    key_values: int  # entries of keys and values of a token in a layer
    active: float  # parameters that a token is multiplied by, head included
    tied: bool = False
    row_modules: int = ROW_MODULES
    column_modules: int = COLUMN_MODULES
    norm: float = 0  # parameters of a layer that the tensor axis does not divide

    @property
    def root(self) -> float:
        """Parameters of embedding, head and last norm."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def parameters(self) -> float:
        return self.layers * self.layer + self.root


@dataclass(frozen=True)
class Step:
    """A step of GRPO, without a KL term."""
    completions: int = 512
    prompt: int = 512
    completion: int = 4096
    minibatches: int = 4
    micro_batch_tokens: int = 16384
    checkpointing: bool = True
    compute: int = BF16  # bytes of a number in the model

    @property
    def tokens(self) -> int:
        return self.completions * (self.prompt + self.completion)


@dataclass(frozen=True)
class Machine:
    """Devices and the share of their speed that is assumed."""
    name: str = "H100"
    memory: float = 80e9
    flops: float = 989e12  # bfloat16, dense
    compute_share: float = 0.45
    hbm: float = 3.35e12
    hbm_share: float = 0.6  # in decoding
    node: int = 8  # devices that NVLink connects
    nvlink: float = 450e9  # one way
    network: float = 50e9  # one way, a device: 400 Gb/s InfiniBand
    wire_share: float = 0.75
    latency: float = 15e-6  # of a collective, times log2 of its ranks
    overlap: float = 0.8  # share of the compute behind which transfers of the data axis can hide


class Layout(NamedTuple):
    data: int
    tensor: int


class Traffic(NamedTuple):
    """What a rank sends: bytes, and the number of collectives."""
    sent: float
    calls: float

    def __add__(self, other: Any) -> Traffic:
        return Traffic(self.sent + other.sent, self.calls + other.calls)

    def __mul__(self, times: Any) -> Traffic:
        return Traffic(self.sent * times, self.calls * times)


NOTHING = Traffic(0, 0)


def gather(size: float, ranks: int) -> Traffic:
    """An all-gather to, or a reduce-scatter from, `size` bytes."""
    return Traffic(size * (ranks - 1) / ranks, 1) if ranks > 1 else NOTHING


def reduce(size: float, ranks: int) -> Traffic:
    return Traffic(2 * size * (ranks - 1) / ranks, 1) if ranks > 1 else NOTHING


# ---- one micro-batch ---------------------------------------------------------------------------------------


def data_axis(model: Model, step: Step, at: Layout, trained: bool) -> Traffic:
    """FSDP2: the weights of a layer are gathered for the forward and again for the backward, those of the root once;
    gradients are reduced in float32."""
    layer = (model.layer - model.norm) / at.tensor + model.norm
    root = (model.root - model.hidden) / at.tensor + model.hidden
    weights = gather(step.compute * layer, at.data) * model.layers * (2 if trained else 1)
    weights += gather(step.compute * root, at.data)
    if not trained:
        return weights
    return weights + gather(FP32 * layer, at.data) * model.layers + gather(FP32 * root, at.data)


def tensor_axis(model: Model, step: Step, at: Layout, tokens: float, scored: float, trained: bool) -> Traffic:
    """Sums of hidden states over the tensor axis, and the exchange of the head."""
    hidden = reduce(tokens * model.hidden * step.compute, at.tensor)
    forward = hidden * (model.layers * model.row_modules + 1)  # and one for the embedding
    head = Traffic((HEAD_BYTES * scored + HEAD_CALL_BYTES) * (at.tensor - 1), 2) if at.tensor > 1 else NOTHING
    if not trained:
        return forward + head
    again = hidden * (model.layers * (model.row_modules - 1) * step.checkpointing)  # the last sum is not needed again
    backward = hidden * (model.layers * model.column_modules)
    return forward + again + backward + head + reduce(scored * model.hidden * FP32, at.tensor)


# ---- a step ------------------------------------------------------------------------------------------------


def forward_flops(model: Model, step: Step) -> float:
    """Of the rollout once through the model: products with weights, and causal attention."""
    length = step.prompt + step.completion
    attention = 2 * length * model.attention * model.layers  # QK and PV: 4 a pair, half of the pairs
    return step.tokens * (2 * model.active + attention)


def cost(model: Model, step: Step, at: Layout, machine: Machine) -> dict[str, float]:
    """Seconds, and bytes that a rank sends, by part of a step."""
    ranks, passes = at.data * at.tensor, 3 + step.checkpointing
    share = step.tokens / at.data  # tokens of a rank of the data axis
    micro = max(step.minibatches, math.ceil(share / step.micro_batch_tokens))  # micro-batches
    tokens, scored = share / micro, share / micro * step.completion / (step.prompt + step.completion)
    wire = {
        "data": data_axis(model, step, at, True) * micro + data_axis(model, step, at, False) * micro,
        "tensor": (tensor_axis(model, step, at, tokens, scored, True)
                   + tensor_axis(model, step, at, tokens, scored, False)) * micro,
        "rollout": gather(ROLLOUT_BYTES * step.tokens, ranks),
        "weights to the sampler": gather(step.compute * model.parameters, ranks),
    }
    far = ranks > machine.node

    def seconds(part: str, group: int, between_nodes: bool) -> float:
        speed = (machine.network if between_nodes else machine.nvlink) * machine.wire_share
        return wire[part].sent / speed + wire[part].calls * machine.latency * math.log2(max(group, 2))

    compute = (passes + 1) * forward_flops(model, step) / ranks / (machine.flops * machine.compute_share)
    tensor = seconds("tensor", at.tensor, at.tensor > machine.node)
    data = seconds("data", at.data, far)
    sampling = decode_seconds(model, step, ranks, machine)
    other = seconds("rollout", ranks, far) + seconds("weights to the sampler", ranks, far)
    updates = compute + tensor + max(0.0, data - machine.overlap * compute)
    state = 16 * model.parameters / ranks + BF16 * (model.root + 2 * model.layer) / at.tensor
    found = {"sampling": sampling, "compute": compute, "tensor": tensor, "data": data, "updates": updates,
             "other": other, "step": sampling + updates + other}
    return {
        "devices": ranks, "data ranks": at.data, "tensor ranks": at.tensor, "micro-batches": micro,
        **{f"{name} s": value for name, value in found.items()},
        **{f"{name} GB": traffic.sent / 1e9 for name, traffic in wire.items()},
        "PFLOPs": (passes + 1) * forward_flops(model, step) / 1e15, "state GB": state / 1e9,
        "tokens/s": step.tokens / found["step"],
        "tokens/s a device": step.tokens / found["step"] / ranks,
    }


def decode_seconds(model: Model, step: Step, ranks: int, machine: Machine) -> float:
    """Seconds in which vLLM samples on all devices: each replica is as small as its weights allow. A token of a batch
    reads all weights (those of experts at most once) and the keys and values of every sequence."""
    replica = next(n for n in (1, 2, 4, 8, 16, 32, 64) if BF16 * model.parameters <= 0.6 * n * machine.memory)
    batch = step.completions * min(replica, ranks) / ranks  # completions of a replica
    weights = BF16 * min(model.parameters, model.active * max(1.0, batch))
    cache = BF16 * model.key_values * model.layers * (step.prompt + step.completion / 2)
    memory = (weights + batch * cache) / (replica * machine.hbm * machine.hbm_share)
    sums = (2 * model.layers + 1) * machine.latency * math.log2(replica) if replica > 1 else 0.0
    products = 2 * model.active * batch / (replica * machine.flops * machine.compute_share)
    return step.completion * (max(memory, products) + sums)


# ---- the page ----------------------------------------------------------------------------------------------


def dense(name: str, layers: int, hidden: int, inner: int, heads: int, pairs: int, vocab: int) -> Model:
    """A Qwen2 model: `pairs` heads of keys and values."""
    width = hidden // heads
    projections = 2 * hidden * hidden + 2 * hidden * width * pairs + hidden + 2 * width * pairs  # with biases
    layer = projections + 3 * hidden * inner + 2 * hidden
    return Model(name, layers, hidden, vocab, layer, hidden, 2 * pairs * width, layers * layer + vocab * hidden,
                 norm=2 * hidden)


MODELS = (
    dense("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 152064),
    dense("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 152064),
    # 671 billion parameters, 37 billion active; 512 + 64 entries of compressed keys and values of a token.
    Model("DeepSeek-V3", 61, 7168, 129280, (671e9 - 2 * 129280 * 7168) / 61, 128 * 160, 576, 37e9),
)
TENSOR = {"Qwen2.5-7B": 1, "Qwen2.5-32B": 4, "DeepSeek-V3": 8}
MACHINES = (Machine(), Machine("H200", memory=141e9, hbm=4.8e12))
DEVICES = (8, 64, 512)


def results() -> dict[str, Any]:
    rows = []
    for machine in MACHINES:
        for model in MODELS:
            for devices in DEVICES:
                tensor = TENSOR[model.name]
                for completions in dict.fromkeys((512, 64 * devices)):
                    step = Step(completions=completions)
                    found = cost(model, step, Layout(devices // tensor, tensor), machine)
                    rows.append({"device": machine.name, "model": model.name,
                                 "completions": completions, "fits": found["state GB"] * 1e9 < 0.8 * machine.memory,
                                 **{name: float(f"{value:.4g}") for name, value in found.items()}})
    return {"assumptions": {machine.name: dataclasses.asdict(machine) for machine in MACHINES},
            "step": dataclasses.asdict(Step()), "rows": rows}


def main(path: str) -> None:
    Path(path).write_text(json.dumps(results(), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
