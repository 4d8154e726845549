"""What fits: bytes on each device by stage, phase and part, before any weight is loaded.

Parameters are counted, and activations measured, on a model whose tensors have shapes but no data: what a forward and a
backward allocate counts until it is freed. So no formula has to know the architecture. A rank of the tensor axis has a
model with fewer heads, a narrower MLP and its part of the vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import weakref
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1kernels import linear_loss_bytes
from r1kernels.train.errors import ConfigError, naming
from r1kernels.train.lora import add_adapters
from r1kernels.train.model import hidden_states, load_config
from r1kernels.train.policy import check_tensor_axis
from r1kernels.train.recipe import Lora, Recipe

GIB, CLOSE = 1 << 30, 0.9  # a sum above this share of the memory is close
CUDA, ROLLOUT = 2 * GIB, 30  # context, communication and fragments; ids, masks, log-probs and advantages of a token
SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
KEYS = {"tensor": "parallel.tensor", "lora": "lora.r"}  # of recipes, where they differ from the fields below
# Parts that depend on the lengths of texts, or on when memory is freed.
VARIABLE = ("rollout", "KV cache", "prompts, logits", "activations", "head", "gathered weights", "unreduced gradients",
            "CUDA, NCCL")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_measured: dict[str, dict[str, float]] = {}


class Memory(TorchDispatchMode):
    """Adds up the memory of the tensors that are made inside it, until they are freed."""

    known: set[int]
    now: int
    peak: int

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known, self.now, self.peak = {weight.untyped_storage()._cdata for weight in model.parameters()}, 0, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **kwargs or {})
        for storage in [value.untyped_storage() for value in tree_leaves(results) if isinstance(value, torch.Tensor)]:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return results

    def _free(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


class Case(SimpleNamespace):
    """A stage on some devices: settings of its recipe and its own, and what follows from them:

    `config` and `others`, the configurations of its model and of frozen ones; `width`, tokens of a sequence, 0 if
    nothing is trained; `scored`, the share of tokens that the head sees; `rollout`, tokens; `batches` that this process
    samples, as (completions, prompts, tokens of a completion), while it trains if `samples`, else in the evaluation.
    """

    def changed(self, **settings: Any) -> Case:
        return Case(**vars(self) | settings)

    def phases(self) -> dict[str, dict[str, float]]:
        """Bytes on each device by phase and part."""
        dtype, data = DTYPES[self.precision], self.devices // self.tensor
        part, whole, size = self._measured(self.config, self.tensor), self._measured(self.config), dtype.itemsize
        share, text, found = part["trained"] / part["all"], self.config.get_text_config(), {}
        held = other = {"CUDA, NCCL": CUDA * (self.device != "cpu")}
        if self.width:
            state = {"weights": 4, "gradients": 4, "optimizer": 8 if self.optimizer_state == "fp32" else 2}
            held = held | {name: size * part["trained"] / data for name, size in state.items()} | {
                "frozen weights": size * (part["all"] - part["trained"]) / data, "rollout": ROLLOUT * self.rollout}
        for name, config in self.others.items():
            if name != "reference":
                held[name] = size * self._measured(config)["all"]
            elif not self.lora:
                held[name] = size * part["all"] / data
        sampler = {"sampler's weights": size * whole["all"]}
        for rows, prompts, new in self.batches:
            rows, prompts = -(-rows // self.devices), -(-prompts // self.devices)
            rows = min(self.rollout_batch_size or rows, rows)
            parts = (held if self.samples else other) | sampler | {
                "gradients": 0,  # a step frees them
                "KV cache": rows * (self.prompt + new) * whole["token"],
                "prompts, logits": max(min(rows, prompts) * whole["prompt"], 8 * rows * text.vocab_size)}
            found["sampling"] = max(found.get("sampling", {}), parts, key=lambda parts: sum(parts.values()))
        if self.width:
            rows, vocab = int(self.micro_batch_tokens * self.scored), -(-text.vocab_size // self.tensor)
            head = linear_loss_bytes(rows, vocab, text.hidden_size, dtype, device=torch.device(self.device).type,
                                     weight_gradient=not self.lora, sharded=self.tensor > 1)
            activations = self.micro_batch_tokens / self.width * part["sequence"]
            found["updates"] = held | (sampler if self.samples and self.batches else {}) | {
                "gathered weights": size * (part["all"] if data == 1 else part["root"] + 2 * part["layer"]),
                "activations": activations,
                "head": (head + 4 * vocab * min(rows, 1024) * ("teacher" in held)) * (self.kind != "preference"),
                # A gradient is complete in the run's precision, and then summed over ranks in float32. Those of
                # embedding and head come last, when activations are gone.
                "unreduced gradients": share * max((size + 4) * part["layer"],
                                                   (2 * size + 4) * part["root"] - activations)}
        return {phase: {name: value for name, value in parts.items() if value} for phase, parts in found.items()}

    def peak(self, left_out: tuple[str, ...] = ()) -> tuple[float, str]:
        """The bytes of the phase that needs most, without some parts, and its name."""
        return max((sum(size for part, size in parts.items() if part not in left_out), phase)
                   for phase, parts in self.phases().items())

    def advice(self, memory: float) -> str:
        """The first setting, the least change first, with which the stage fits; if there is none, those that help."""
        tokens, trains = self.micro_batch_tokens, self.width > 0
        sampled = (self.rollout_batch_size or max([0, *(rows for rows, *_ in self.batches)])) // self.devices
        values: dict[str, list[Any]] = {
            "gradient_checkpointing": [True][:trains],
            "micro_batch_tokens": [tokens >> n for n in range(1, 40) if tokens >> n >= self.width > 0],
            "precision": ["bf16"], "lora": [Lora()][: self.kind in ("grpo", "sft", "distill") and not self.lora],
            "optimizer_state": ["8bit"][:trains],
            "tensor": [n for n in (2, 4, 8) if trains and self.devices % n == 0],
            "rollout_batch_size": [sampled >> n for n in range(1, 40) if sampled >> n],
            "devices": [self.devices << n for n in range(1, 11)]}
        helping, now = [], self.peak()[0]
        for name, value in [(name, value) for name, some in values.items() for value in some]:
            with contextlib.suppress(ConfigError):  # the model may have no layers with the names for LoRA
                need, key = self.changed(**{name: value}).peak()[0], KEYS.get(name, name)
                if need <= memory:
                    return f"{key}={json.dumps(getattr(value, 'r', value))}"
                helping += [key] if need < now and key not in helping else []
        return f"a combination of {', '.join(helping)}" if helping else "a smaller model"

    def _measured(self, config: Any, tensor: int = 1) -> dict[str, float]:
        """`measure` of a model on a rank of a tensor axis of this size."""
        used = [self.gradient_checkpointing, self.width, self.prompt, self.lora]
        used = used if config is self.config else [False, 0, 0, None]
        key = f"{config.to_json_string()} {tensor} {self.precision} {used}"
        if key not in _measured:
            check_tensor_axis(config, tensor)
            config = copy.deepcopy(config)
            text = config.get_text_config()
            text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            for name in SPLIT:
                if size := getattr(text, name, None):
                    setattr(text, name, -(-size // tensor))
            _measured[key] = measure(config, DTYPES[self.precision], *used)
        return _measured[key]


def measure(
    config: Any, dtype: torch.dtype, checkpointed: bool = False, width: int = 0, prompt: int = 0,
    lora: Lora | None = None,
) -> dict[str, float]:
    """Parameters of a model, and bytes of a sequence of `width` tokens that is trained, of a prompt that is read, and
    of a token in the cache."""
    depth, results = config.get_text_config().num_hidden_layers, []
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if lora:
            add_adapters(model, lora, 0, dtype)
        model.to(dtype)
    layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    every, trained = (sum(weight.numel() for weight in model.parameters() if weight.requires_grad >= only)
                      for only in (False, True))
    if checkpointed:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    equal = len(list(takewhile(lambda size: size == sizes[-1], reversed(sizes))))  # the last layers: three tell of all
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").tie_weights()
        # Gradients of weights are counted elsewhere.
        model.get_input_embeddings().requires_grad_(False)
        model.enable_input_require_grads()
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        for count in (depth - equal + 3, depth - equal + 2) if equal > 3 else (depth,):
            del layers[count:]
            results.append(found := dict.fromkeys(("sequence", "prompt", "token"), 0.0))
            for name, tokens in (("sequence", width), ("prompt", prompt)) if width + prompt else ():
                ids = torch.zeros(2, tokens, dtype=torch.long)  # two: operators may treat a single one in another way
                inputs = {"input_ids": ids, "attention_mask": ids, "position_ids": ids}
                with Memory(model) as memory, torch.set_grad_enabled(name == "sequence"):
                    if name == "prompt" and tokens:
                        cache = model.base_model(**inputs, use_cache=True).past_key_values
                        found["token"] = memory.now / 2 / tokens
                        del cache
                    elif tokens:
                        hidden = hidden_states(model, **inputs)
                        hidden.backward(torch.empty_like(hidden))
                found[name] = memory.peak / 2
            found["prompt"] -= prompt * found["token"]
    most, fewer = results[0], results[-1]
    return {"all": every, "trained": trained, "layer": max(sizes), "root": every - sum(sizes)} | {
        name: value + (equal - 3) * (value - fewer[name]) for name, value in most.items()}


def cases(recipe: Recipe, devices: int, prompt: int) -> Iterator[tuple[str, Case]]:
    """The stages by name; the longest prompt has `prompt` tokens."""
    configs, judged, asked = {}, recipe.eval, recipe.eval.questions * len(recipe.eval_problems)
    most = min(judged.batch_size, asked * judged.samples)
    for name, stage in recipe.stages.items():
        get, others, width, held, size, new = dict(stage).get, {}, 0, 0, 0, getattr(stage, "max_new_tokens", 0)
        if stage.kind == "pretrain":
            configs[name] = stage.architecture.call(recipe.seed)[0].config
        else:
            configs[name] = configs[get("model")] if get("model") else load_config(stage.path, stage.overrides)
        batches = [(most, min(most, asked), judged.max_new_tokens)]
        if stage.kind == "grpo":
            held, new = stage.questions * stage.group_size, max([new, *stage.length_schedule.values()])
            width, size = prompt + new, held // stage.minibatches
            batches.append((held * stage.oversample, stage.questions * stage.oversample, new))
            others = {item.model: configs[item.model] for item in stage.preference}
            if stage.objective.build().kl_coef and not stage.lora:
                others["reference"] = configs[name]
        elif stage.kind == "reject":
            batches = [(stage.questions_per_batch * stage.samples_per_question, stage.questions_per_batch, new)]
        elif stage.kind != "model":
            width, size = get("window") or stage.max_tokens, get("micro_batch_size") or stage.batch_size
            size *= 1 + (stage.kind == "preference")
            others = {"teacher": configs[stage.teacher]} if get("teacher") else {}
        batches = batches if stage.kind != "preference" and recipe.sampler.kind != "vllm" else []
        if width or batches:
            yield name, Case(**{"lora": None, "rollout_batch_size": None} | dict(recipe) | dict(stage) | {
                "config": configs[name], "others": others, "devices": devices, "prompt": prompt, "width": width,
                "precision": "bf16" if recipe.dtype == torch.bfloat16 else "fp32", "scored": new / width if held else 1,
                "micro_batch_tokens": get("micro_batch_tokens") or size * width, "tensor": recipe.parallel.tensor,
                "rollout": held * width, "batches": batches, "samples": not width or held})


def verdict(name: str, case: Case, memory: float, left_out: tuple[str, ...] = ()) -> tuple[str, bool]:
    """Why a stage does not fit on devices with this memory, or hardly; empty if it fits. And whether to refuse it:
    then the parts that are not left out do not fit."""
    try:
        (need, phase), certain = case.peak(), case.peak(left_out)[0]
    except ConfigError:
        raise
    except Exception as error:  # code of any model family may need values, and finds only shapes
        return f"stage '{name}': what it needs is unknown: {error!r:.200}", False
    part, size = max(case.phases()[phase].items(), key=lambda item: item[1])
    text = (f"stage '{name}' needs {need / GIB:.2f} GiB on a device for {phase}, which has {memory / GIB:.2f}; "
            f"the largest part is '{part}', {size / GIB:.2f} GiB")
    if certain > memory:
        return f"{text}; it would fit with {case.advice(memory)}", True
    return (text if need > CLOSE * memory else ""), False


def check_fits(recipe: Recipe, devices: int, prompt: int = 512) -> list[str]:
    """Warnings about stages that may not fit, if texts are as long as they can be. Raises ConfigError, which names the
    part and the setting, if a stage cannot fit whatever its texts are."""
    memory, found = memory_of(recipe.device), []
    for name, case in cases(recipe, devices, prompt):
        models = [case.changed(width=0, prompt=0)._measured(config) for config in (case.config, *case.others.values())]
        if 16 * sum(model["all"] for model in models) > memory / 50:  # else measuring costs more than it tells
            text, refused = verdict(name, case, memory, VARIABLE)
            if refused:
                raise ConfigError(text)
            found += [f"{text}, with the longest texts"] if text else []
    return found


def memory_of(device: str) -> int:
    """Bytes of a GPU, or those that are free for a CPU."""
    if torch.device(device).type != "cpu":
        with naming(f"'device' is {device!r}, which cannot be used here; give its memory, such as --memory 80"):
            return torch.cuda.mem_get_info(device)[1]
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
