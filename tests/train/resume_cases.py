"""A chain with every kind of stage, on a model of noise, and a process that starts it again and again.

Run as a program, this file imports everything once and then forks a process for each line on its standard input. The
line says which recipe to run, and before which operation on files of the run the process is to be killed, or from
which one on the disk is to be full (0: never).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from forking import ForkingProgram

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = """
run_dir: {run_dir}
precision: fp32
seed: 3
threads: 1
import_from: [{examples}, {here}]
data:
  sums: {{kind: function, function: "tiny_world:sums", options: {{min_terms: 2, max_terms: 3, train_size: 16}}}}
  open: {{kind: jsonl, path: {folder}/open.jsonl}}
  pairs: {{kind: jsonl, path: {folder}/pairs.jsonl}}
scoring: {{timeout_s: 60}}
eval: {{every: 2, questions: 4, samples: 2, batch_size: 4, max_new_tokens: 6}}
checkpoint: {{every: 2, supervised_every: 2, keep: 1}}
stages:
  base: {{kind: pretrain, steps: 6, batch_size: 2, window: 64,
    architecture: {{function: "tiny_world:architecture", options: {{
      text: {{max_terms: 3}}, hidden_size: 16, intermediate_size: 32, layers: 1, heads: 2}}}},
    corpus: {{function: "tiny_world:corpus", options: {{max_terms: 3}}}}}}
  rl: &rl {{kind: grpo, model: base, problems: [sums], rewards: {{"resume_cases:parity": 1.0, accuracy: 1.0}},
    steps: 4, questions: 4, group_size: 4, oversample: 2, minibatches: 2, micro_batch_tokens: 600,
    learning_rate: 1.0e-3,
    warmup_updates: 4, max_new_tokens: 6, length_schedule: {{2: 8}},
    ref_refresh_every: 2, objective: {{preset: r1, options: {{entropy_coef: 0.001}}}}}}
  traces: {{kind: reject, model: rl, problems: [open], samples_per_question: 4, questions_per_batch: 2,
    max_new_tokens: 40, filters: {{format: false, language: null}}}}
  cold: {{kind: sft, model: base, samples: [traces], batch_size: 4, window: 256, learning_rate: 1.0e-3}}
  scores: {{kind: preference, model: cold, pairs: pairs, batch_size: 2, learning_rate: 1.0e-3}}
  r1: {{<<: *rl, model: cold, problems: [sums, open], oversample: 1, steps: 2,
    rewards: {{accuracy: 1.0}}, preference: [{{model: scores, last_steps: 1}}]}}
  ppo: {{<<: *rl, steps: 2, oversample: 1, group_size: 2, epochs: 2, micro_batch_tokens: null,
    advantages: {{function: "ppo:critic", options: {{value_learning_rate: 1.0e-3, kl_coef: 0.01}}}},
    objective: {{preset: grpo, options: {{aggregate: token_mean}}}}}}
  small: {{kind: distill, model: base, teacher: r1, method: logits, samples: [traces], epochs: 1,
    batch_size: 4, window: 256, learning_rate: 1.0e-3}}
"""
STAGES = ("base", "rl", "traces", "cold", "scores", "r1", "ppo", "small")


def parity(completions: list[str], **columns: Any) -> list[float]:
    """A reward that a model of noise gets half of the time."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def write_recipe(folder: Path, run_dir: Path) -> Path:
    questions = [f"Say {word}" for word in ("one", "two", "three", "four", "five", "six")]
    rows = {
        "open": [{"question": question, "kind": "open"} for question in questions],
        "pairs": [{"question": question, "chosen": " It is 4.", "rejected": " <think>7+1"} for question in questions],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(run_dir=run_dir, folder=folder, examples=EXAMPLES, here=Path(__file__).parent))
    return path


def stop_at(count: int, run_dir: Path, *, full: bool) -> None:
    """Kills this process before its `count`-th operation on a file of the run. With `full`, the disk is full from then
    on: nothing can be made there, but files can be deleted."""
    left, prefix = count, str(run_dir)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        makes = event in ("os.rename", "os.mkdir") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        removes = event in ("os.remove", "os.rmdir", "os.truncate")
        if (makes or removes) and str(arguments[0]).startswith(prefix):
            left -= 1
            if left <= 0 and full and makes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            if left == 0 and not full:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def serve() -> None:
    import torch

    from r1kernels.train import chain, report  # noqa: F401  (the chain imports all stages)
    from r1kernels.train.cli import main

    report.write_report = lambda *given, **options: []  # figures would take half of the time

    torch.set_num_threads(1)
    assert threading.active_count() == 1
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code: Any = 0
            with contextlib.suppress(SystemExit), open(request["output"], "a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                count = request["kill_at"] or request["full_at"]
                if count:
                    stop_at(count, Path(request["run_dir"]), full=bool(request["full_at"]))
                try:
                    main(["train", request["recipe"]])
                except SystemExit as end:
                    code = end.code
                    if not isinstance(code, int):
                        print(code)
                        code = 1
            sys.stdout.flush()
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Server(ForkingProgram):
    """The process that forks; one run at a time."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def start(self, recipe: Path, run_dir: Path, *, kill_at: int = 0, full_at: int = 0) -> int:
        """Starts `r1kernels train`; returns the process id. Its output is added to a file beside the recipe."""
        output = str(recipe.with_name(f"{run_dir.name}.out"))
        return int(self.ask({"recipe": str(recipe), "run_dir": str(run_dir), "kill_at": kill_at, "full_at": full_at,
                             "output": output}))

    def wait(self) -> int:
        """The exit status of the run, negative for a signal."""
        return int(self.answer())

    def run(self, recipe: Path, run_dir: Path, **options: int) -> int:
        self.start(recipe, run_dir, **options)
        return self.wait()


if __name__ == "__main__":
    serve()
