"""TRL's GRPO step, forward and backward: alone, with patch_trl(), and with R1GRPOTrainer, in the same run.

    python benchmarks/trl_step.py [--tokens 2048] [--vocab 151936] [--rounds 5]

`_compute_loss` and backward of a Qwen2 model of one small layer, whose head takes nearly all of the time, on a batch as
TRL gives it: prompts of 2 tokens, completions of 256, advantages of both signs, log-probs of an old policy. First, the
losses and the gradients of the three are compared. Times are medians over rounds; in each round every candidate runs
once. Peak memory is what steps add to the memory of their process (Linux), with gradients; each candidate has its own.
The results of this device get a file trl_step.json.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import saving
import torch
from torch import Tensor

CANDIDATES = ("TRL", "TRL with patch_trl()", "R1GRPOTrainer")
LENGTH, PROMPT = 256, 2


def make_trainer(candidate: str, options: argparse.Namespace, directory: str) -> Any:
    import datasets
    import tokenizers
    import transformers
    import trl

    from r1kernels.integrations.trl import R1GRPOTrainer

    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    transformers.set_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.hidden, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2 * LENGTH, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, tie_word_embeddings=False))
    count = options.tokens // LENGTH
    arguments = trl.GRPOConfig(
        output_dir=directory, per_device_train_batch_size=count, num_generations=count, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_completion_length=LENGTH, loss_type="dapo",
        epsilon_high=0.28)
    kind = R1GRPOTrainer if candidate == "R1GRPOTrainer" else trl.GRPOTrainer
    trainer = kind(model=model, processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0],
                   args=arguments, train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * count))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def make_inputs(options: argparse.Namespace) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    count = options.tokens // LENGTH
    ids = torch.randint(3, options.vocab, (count, PROMPT + LENGTH), generator=rng)
    mask = torch.ones(count, LENGTH, dtype=torch.int64)
    old = torch.full((count, LENGTH), -float(torch.tensor(options.vocab).log()))
    return {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones(count, PROMPT, dtype=torch.int64),
        "completion_ids": ids[:, PROMPT:], "completion_mask": mask, "num_items_in_batch": mask.sum(),
        "advantages": torch.randn(count, generator=rng),
        "old_per_token_logps": old + 0.1 * torch.randn(old.shape, generator=rng),
    }


def step_of(candidate: str, options: argparse.Namespace, directory: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that does one step, and gives the loss and the gradient of the head."""
    from r1kernels.integrations.trl import patch_trl

    trainer, inputs = make_trainer(candidate, options, directory), make_inputs(options)

    def step() -> tuple[Tensor, Tensor]:
        trainer.model.zero_grad(set_to_none=True)
        with patch_trl() if "patch" in candidate else contextlib.nullcontext():
            loss = trainer._compute_loss(trainer.model, inputs)
            loss.backward()
        return loss.detach(), trainer.model.lm_head.weight.grad

    return step


def peak_of(candidate: str, options: argparse.Namespace) -> int | None:
    """Bytes that two steps add to the memory of this process, which does nothing else."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    warnings.simplefilter("ignore")  # TRL's own
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        step = step_of(candidate, options, directory)
        before = re.search(r"VmRSS:\s+(\d+)", status.read_text())
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        step()
        step()
        after = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        return (int(after[1]) - int(before[1])) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 2048), ("vocab", 151_936), ("hidden", 896), ("rounds", 5),
                        ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # TRL's own
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_of, (name, options)) for name in CANDIDATES}
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        steps = {name: step_of(name, options, directory) for name in CANDIDATES}
        loss, gradient = steps["TRL"]()
        gradient = gradient.clone()
        for name in CANDIDATES[1:]:
            value, other = steps[name]()
            torch.testing.assert_close(value, loss, rtol=1e-3, atol=1e-5)
            assert (other - gradient).norm() <= 1e-3 * gradient.norm(), name
        times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        for _ in range(options.rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    rows = []
    for name in CANDIDATES:
        seconds, peak = statistics.median(times[name]), peaks[name]
        ratios = [ours / theirs for ours, theirs in zip(times[name], times["TRL"], strict=True)]
        ratio = statistics.median(ratios)
        rows.append({"op": "trl_step", "shape": f"{options.tokens} tokens, H {options.hidden}, V {options.vocab}",
                     "implementation": name, "peak_extra_bytes": peak, "median_s": seconds, "ratio": ratio,
                     "rounds": options.rounds, "range_s": [min(times[name]), max(times[name])],
                     "range_of_ratios": [min(ratios), max(ratios)]})
        memory = "" if peak is None else f", {peak / 2**20:.0f} MiB"
        print(f"{name}: {seconds:.3f} s, {ratio:.2f} of TRL's{memory}")
    print(saving.save(rows))


if __name__ == "__main__":
    main()
