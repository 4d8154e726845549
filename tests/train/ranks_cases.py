"""Runs of several ranks on one machine: their recipes, and a process that forks the ranks.

Run as a program, this file imports everything once, and forks the ranks of each run, which find each other as those of
torchrun do. With arguments, it is the command `r1kernels`, whose ranks torchrun starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from forking import ForkingProgram

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS = 240  # for a run
VARIABLES = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
RECIPE = """
run_dir: {folder}/run
precision: fp32
seed: 3
threads: 1
import_from: [{here}, {examples}]
data:
  sums: {{kind: jsonl, path: {folder}/sums.jsonl, test_path: {folder}/test.jsonl}}
  replies: {{kind: jsonl, path: {folder}/replies.jsonl}}
  pairs: {{kind: jsonl, path: {folder}/pairs.jsonl}}
  ours: {{kind: function, function: "ranks_cases:rows"}}
scoring: {{timeout_s: 60}}
eval: {{every: 20, problems: [sums], questions: 4, samples: 2, batch_size: 4, max_new_tokens: 6}}
checkpoint: {{every: 4, keep: 1}}
stages:
  base: {{kind: model, path: {folder}/base}}
"""
RL = RECIPE + """
  rl: {{kind: grpo, model: base, problems: [sums], rewards: {{"ranks_cases:parity": 1.0, accuracy: 0.0}}, steps: 10,
       questions: 4, group_size: 4, minibatches: 2, micro_batch_tokens: 900, learning_rate: 1.0e-3, warmup_updates: 4,
       max_new_tokens: 6, ref_refresh_every: 2, objective: {{preset: r1, options: {{entropy_coef: 0.001}}}}}}
"""
OTHERS = RECIPE + """
  cold: {{kind: sft, model: base, samples: [replies], epochs: 2, batch_size: 5, window: 600, micro_batch_size: 1,
         learning_rate: 1.0e-3}}
  scores: {{kind: preference, model: base, pairs: pairs, epochs: 2, batch_size: 3, micro_batch_size: 1,
           learning_rate: 1.0e-3}}
  ppo: {{kind: grpo, model: base, problems: [sums], rewards: {{"ranks_cases:parity": 1.0}}, steps: 2, questions: 4,
        group_size: 2, micro_batch_tokens: 600, learning_rate: 1.0e-3, max_new_tokens: 6, minibatches: 2, top_p: 0.9,
        advantages: {{function: "ppo:critic", options: {{value_learning_rate: 1.0e-3, kl_coef: 0.01}}}},
        objective: {{preset: grpo, options: {{aggregate: token_mean}}}}}}
  lora: {{kind: grpo, model: base, problems: [sums], rewards: {{"ranks_cases:parity": 1.0}}, steps: 2, questions: 4,
         group_size: 2, learning_rate: 1.0e-2, max_new_tokens: 6, minibatches: 2, lora: {{r: 2, alpha: 8}}}}
"""
calls = 0


def parity(completions: list[str], **columns: Any) -> list[float]:
    """A reward that a model of noise gets half of the time. On the rank R1K_RANK, its call number R1K_CALL ends, stops
    or hangs the process."""
    global calls
    calls += 1
    what = os.environ.get("R1K_WHAT")
    if what and calls == int(os.environ["R1K_CALL"]) and os.environ["RANK"] == os.environ["R1K_RANK"]:
        if what == "hang":
            time.sleep(SECONDS)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[what])
    return [float(sum(map(ord, text)) % 2) for text in completions]


def rows(split: str, count: int | None, seed: int) -> list[dict[str, str]]:
    """A data set that depends on the rank."""
    return [{"question": f"Compute {os.environ['RANK']}+1", "answer": "1"}]


def write_recipes(folder: Path) -> None:
    from rl_cases import make_model, make_tokenizer

    shape = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    tokenizer = make_tokenizer()
    make_model(tokenizer, end_scale=1.5, **shape).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for rank in range(2):  # machines with other files under the same path
        tokenizer.add_tokens(["one", "two"][: 2 * rank])
        make_model(tokenizer).save_pretrained(folder / f"machine{rank}" / "model")
        tokenizer.save_pretrained(folder / f"machine{rank}" / "model")
    lines = {
        "sums": [{"question": f"Compute {n}+{n + 1}", "answer": str(2 * n + 1)} for n in range(8)],
        "test": [{"question": f"Compute {n}-1", "answer": "3"} for n in range(8)],
        "replies": [{"question": f"Compute {n}+1", "response": f" It is {'one' * n}."} for n in range(7)],
        "pairs": [{"question": f"Add {n}", "chosen": " 4." * (n + 1), "rejected": " 7+1" * (9 - n)} for n in range(8)],
    }
    for name, values in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    for name, text in (("rl", RL), ("others", OTHERS)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder, here=HERE, examples=ROOT / "examples"))


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def torchrun(*options: str, recipe: Path, sets: list[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Starts torchrun. What its ranks say goes to the file `output`."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, "train", str(recipe), "--set", *sets]
    paths = os.pathsep.join(filter(None, sys.path))
    with output.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                env={**os.environ, "PYTHONPATH": paths, **VARIABLES, **variables})


class Server(ForkingProgram):
    """The process that forks; one run at a time."""

    def __init__(self) -> None:
        super().__init__(__file__, **VARIABLES)

    def run(self, recipe: Path, sets: list[list[str]], output: Path, **variables: str) -> list[int]:
        """Runs a recipe on a rank for each list of settings, and returns their exit statuses, negative for signals.
        What rank N says goes to the file `output`N. A rank that works on when others have failed for long is killed."""
        request = {"recipe": str(recipe), "sets": sets, "output": str(output), "variables": variables}
        return json.loads(self.ask(request))


def command(arguments: list[str]) -> Any:
    """The exit status of the command, whose figures would take half of the time."""
    from r1kernels.train import report
    from r1kernels.train.cli import main

    report.write_report = lambda *given, **options: []
    try:
        main(arguments)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, flush=True)
    return 1


def serve() -> None:
    import torch

    from r1kernels.train import chain, cli, report  # noqa: F401  (the chain imports all stages)

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request, port, children = json.loads(line), free_port(), []
        for rank, sets in enumerate(request["sets"]):
            children.append(os.fork())
            if children[-1] == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(request["sets"])),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **request["variables"]}
                os.chdir(os.environ.get("R1K_MACHINES", ".").format(rank))
                with open(f"{request['output']}{rank}", "w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    status = 1
                    with contextlib.suppress(BaseException):
                        status = command(["train", request["recipe"], "--set", *sets])
                    sys.stdout.flush()
                    os._exit(status)
        print(json.dumps(wait(children)), flush=True)


def wait(children: list[int]) -> list[int]:
    codes, end = {}, time.monotonic() + SECONDS
    while len(codes) < len(children):
        for child in (child for child in children if child not in codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:  # the others need some seconds for their message
                    end = min(end, time.monotonic() + 15)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(command(sys.argv[1:]))
    serve()
