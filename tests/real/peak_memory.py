"""Prints the peak memory of updates and of sampling, beside what `r1kernels plan` says, for one process on a CPU:

    python peak_memory.py MODEL [--precision fp32] [--checkpointing] [--lora] [--rows 4 --prompt 128 --new 64]

The trainer's own code runs, with recipes/smollm2.yaml and random tokens: one update of two micro-batches with `rows`
completions each. No two have the same prompt, as `plan` assumes, unless --group says how many do. The last line is what
a forward and a backward of one micro-batch allocate without the head: activations and gradients of a layer or, if that
is more, the gradient of the embedding. With --updates, sampling is not measured.

Memory is that of the process (VmHWM) minus that before the model is loaded, when the same work on a tiny model is done.
The allocator of the C library gives every freed block back, so that what is resident is what is in use.
"""

import argparse
import gc
import json
import os
import re
import sys
import tempfile
from pathlib import Path

FIXED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
         "OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
if __name__ == "__main__" and not FIXED.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | FIXED)

import torch  # noqa: E402
import transformers  # noqa: E402

import r1kernels  # noqa: E402
from r1kernels.train.errors import Interrupt  # noqa: E402
from r1kernels.train.grpo import GRPOTrainer  # noqa: E402
from r1kernels.train.log import Console  # noqa: E402
from r1kernels.train.model import load_tokenizer  # noqa: E402
from r1kernels.train.plan import cases  # noqa: E402
from r1kernels.train.recipe_file import load_recipe  # noqa: E402
from r1kernels.train.rollout import Sampling, Tokens  # noqa: E402
from r1kernels.train.stage import Stage  # noqa: E402
from r1kernels.train.update import Rollout, choose_route, completion_hidden_states, completion_logprobs  # noqa: E402

RECIPE, STAGE = Path(__file__).parents[2] / "recipes" / "smollm2.yaml", "r1_zero"


def resident(field="VmRSS"):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(work):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    work()
    return resident("VmHWM")


def recipe_of(model, options):
    stage = {"questions": options.rows, "group_size": 2, "max_new_tokens": options.new,
             "micro_batch_tokens": options.rows * (options.prompt + options.new),
             "lora": "{r: 16}" if options.lora else "null"}
    values = {"run_dir": "runs/none", "stages.base.path": model, "precision": options.precision,
              "gradient_checkpointing": str(options.checkpointing).lower(), "eval.questions": 1, "eval.samples": 1}
    values |= {f"stages.{STAGE}.{name}": value for name, value in stage.items()}
    return load_recipe(RECIPE, [f"{name}={value}" for name, value in values.items()])


class Work:
    """Functions that do the work of a step on random tokens."""

    def __init__(self, model, options):
        recipe = recipe_of(model, options)
        self.trainer = GRPOTrainer(Stage(recipe, recipe.stages[STAGE], Path("none"), Console(), Interrupt()))
        self.options, self.count = options, 2 * options.rows
        vocabulary = self.trainer.policy.model.config.vocab_size
        prompts = torch.randint(0, vocabulary, (-(-self.count // options.group), options.prompt))
        prompts = prompts.repeat_interleave(options.group, 0)[: self.count]
        ids = torch.randint(0, vocabulary, (self.count, options.new))
        masks = [torch.ones_like(part, dtype=torch.bool) for part in (prompts, ids)]
        masks[0][0, 0] = False  # as in any rollout, some lengths differ
        self.tokens = Tokens(prompts, masks[0], ids, masks[1])
        self.few = Tokens(prompts[:, :2], masks[0][:, :2], ids[:, :2], masks[1][:, :2])

    def update(self, tokens):
        trainer, rows = self.trainer, torch.arange(self.count)
        self.batches, route = trainer.micro_batches(tokens, rows), choose_route(trainer.policy, tokens, trainer.apart)
        logprobs = completion_logprobs(trainer.policy, tokens, self.batches, 1.0, route)
        rollout = Rollout(**vars(tokens), advantages=torch.randn(self.count), old_logprobs=logprobs,
                          ref_logprobs=None, importance_weights=None)
        trainer.update(rollout, rows)
        self.route = route

    def sample(self):
        """Like the next step: each of some prompts has two completions."""
        self.trainer.sampler.update(self.trainer.policy)
        texts = list(map(self.trainer.tokenizer.decode, self.tokens.prompt_ids[: self.options.rows]))
        self.trainer.sampler.sample(texts * 2, Sampling(1.0, self.options.new))

    def body(self):
        """The bytes that a forward and a backward of the model's body allocate, where weights are gathered and have
        gradients."""
        policy = self.trainer.policy
        policy.sync_gradients(False)

        def work(tokens):
            hidden = policy(completion_hidden_states, tokens.rows(self.batches[0]), self.route)
            hidden.backward(torch.ones_like(hidden))

        work(self.few)
        before = resident()
        return peak_of(lambda: work(self.tokens)) - before


def tiny_model(path, directory):
    """A directory with a small model of the same family, and the same tokenizer."""
    config = transformers.AutoConfig.from_pretrained(path)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, config.num_attention_heads * 8, 64
    config.head_dim = 8
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    load_tokenizer(path).save_pretrained(directory)
    return directory


def measured(options):
    """Bytes of the phases. What a tiny model of the family has loaded and compiled does not count."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        work = Work(tiny_model(options.model, directory), options)
        work.update(work.tokens), work.sample()
        del work
    gc.collect()
    r1kernels.release_workspace()
    before, work = resident(), Work(options.model, options)
    work.update(work.few)  # now the optimizer has its state
    found = {"updates": peak_of(lambda: work.update(work.tokens)) - before}
    r1kernels.release_workspace()
    if not options.updates:
        found["sampling"] = peak_of(work.sample) - before
    return found, work.route, work.body()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--precision", default="bf16")
    for name in ("--checkpointing", "--lora", "--updates"):
        parser.add_argument(name, action="store_true")
    for name, value in (("--rows", 4), ("--prompt", 128), ("--new", 64), ("--group", 1)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()
    found, route, body = measured(options)
    planned = dict(cases(recipe_of(options.model, options), 1, options.prompt))[STAGE].phases()
    for phase, size in found.items():
        total = sum(planned[phase].values())
        print(json.dumps({"phase": phase, "measured": size, "planned": total, "ratio": round(total / size, 4),
                          "parts": {name: round(part / 2**20, 1) for name, part in planned[phase].items()}}))
    print(json.dumps({"route": route, "body": body}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
