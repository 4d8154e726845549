"""Prints the peak memory of an update and of sampling, beside what `r1kernels plan` says, for one process on a CPU:

    python peak_memory.py MODEL [--precision fp32] [--checkpointing] [--lora] [--rows 4 --prompt 128 --new 64]

Memory is that of the process (VmHWM) minus that before the model is loaded, when the same work on a tiny model is done.
The allocator of the C library gives every freed block back, so that what is resident is what is in use.
"""

import argparse
import gc
import json
import os
import re
import sys
from pathlib import Path

FIXED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
         "OMP_NUM_THREADS": "1"}
if __name__ == "__main__" and not FIXED.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | FIXED)

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import distributed, nn  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402

import r1kernels  # noqa: E402
from r1kernels.train.lora import add_adapters  # noqa: E402
from r1kernels.train.model import enable_checkpointing, hidden_states, load_model, load_tokenizer  # noqa: E402
from r1kernels.train.plan import cases  # noqa: E402
from r1kernels.train.recipe import Lora  # noqa: E402
from r1kernels.train.recipe_file import build_recipe  # noqa: E402
from r1kernels.train.rollout import Sampling, TransformersSampler  # noqa: E402


class Policy(nn.Module):
    """A model whose forward ends in the loss, so that its head is gathered there too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, loss, **inputs):
        return loss(hidden_states(self.model, **inputs), self.model.get_output_embeddings().weight)


def resident(field="VmRSS"):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(work):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    work()
    return resident("VmHWM")


def recipe_of(options):
    rl = {"kind": "grpo", "model": "base", "problems": ["sums"], "questions": 1, "group_size": options.rows,
          "minibatches": 1, "micro_batch_tokens": options.rows * (options.prompt + options.new),
          "max_new_tokens": options.new,
          "objective": {"preset": "grpo"}, "lora": {"r": 16} if options.lora else None}
    return build_recipe({
        "run_dir": "runs/none", "precision": options.precision, "gradient_checkpointing": options.checkpointing,
        "eval": {"questions": 1, "samples": 1, "max_new_tokens": 1},
        "data": {"sums": {"kind": "jsonl", "path": "none", "test_path": "none"}},
        "stages": {"base": {"kind": "model", "path": options.model}, "rl": rl}})


def phases(model, copy, tokenizer, options):
    """Functions that make an update of the model, and sample from the copy."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    if options.lora:
        add_adapters(model, Lora(), 0, dtype)
    if options.checkpointing:
        enable_checkpointing(model)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    policy, rounding = Policy(model), MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in (*model.base_model.layers, policy):
        fully_shard(part, mesh=mesh, mp_policy=rounding, reshard_after_forward=False)
    policy.set_reshard_after_backward(False)
    optimizer = torch.optim.AdamW(
        [weight for weight in policy.parameters() if weight.requires_grad], lr=1e-6, weight_decay=0.0)
    width, head = options.prompt + options.new, slice(options.prompt - 1, -1)
    ids = torch.randint(0, len(tokenizer), (options.rows, width))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # some padding, so that attention needs a mask
    prompts = [tokenizer.decode(ids[0, : options.prompt])] * options.rows
    sampler = TransformersSampler(copy.to(dtype), tokenizer)

    def loss(hidden, weight):
        targets = ids[:, options.prompt :]
        return r1kernels.linear_grpo_loss(
            hidden[:, head], weight, targets, torch.randn(options.rows), old_logprobs=-torch.ones(targets.shape)).loss

    def update():
        optimizer.zero_grad()
        for _ in range(2):  # micro-batches: the second one finds gradients
            policy(loss, input_ids=ids, attention_mask=mask, position_ids=torch.arange(width).expand_as(ids)).backward()
        optimizer.step()
        for part in policy.modules():
            if hasattr(part, "reshard"):
                part.reshard()

    return update, lambda: sampler.sample(prompts, Sampling(1.0, options.new))


def measured(options):
    """Bytes of an update and of sampling. What a tiny model of the family has loaded and compiled does not count."""
    torch.manual_seed(0)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    tokenizer, config = load_tokenizer(options.model), transformers.AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, config.num_attention_heads * 8, 64
    config.head_dim = 8
    for work in phases(*map(transformers.AutoModelForCausalLM.from_config, (config, config)), tokenizer, options):
        work()
    gc.collect()
    r1kernels.release_workspace()
    before = resident()
    update, sample = phases(load_model(options.model), load_model(options.model), tokenizer, options)
    update()
    found = {"updates": peak_of(update) - before}
    r1kernels.release_workspace()
    return found | {"sampling": peak_of(sample) - before}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--precision", default="bf16")
    for name in ("--checkpointing", "--lora"):
        parser.add_argument(name, action="store_true")
    for name, value in (("--rows", 4), ("--prompt", 128), ("--new", 64)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()
    found = measured(options)
    planned = dict(cases(recipe_of(options), 1, options.prompt))["rl"].phases()
    for phase, size in found.items():
        total = sum(planned[phase].values())
        print(json.dumps({"phase": phase, "measured": size, "planned": total, "ratio": round(total / size, 4),
                          "parts": {name: round(part / 2**20, 1) for name, part in planned[phase].items()}}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
