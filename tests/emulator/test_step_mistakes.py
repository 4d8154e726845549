"""Mistakes planted into the fused GRPO step: the emulator notices each of them under every order of events.

Each library of operators needs a process, because torch registers an operator once.
"""

import os
import re
import shutil
import subprocess
import sys

import cuda_emulation
import pytest
from backends import host_code

CUDA, SUPPORT = cuda_emulation.CSRC / "cuda", cuda_emulation.SUPPORT
pytestmark = [host_code, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]

# A masked row, and rows that start late in a vector; in place, so that neighbours share vectors. There is memory behind
# the last row, for mistakes that write there.
PROGRAM = """
import torch
from grpo_step_cases import batch, device, seed, step
from r1kernels import objectives, testing

inputs = batch(torch.bfloat16, 3003, (2, 3)) | {"mask": torch.tensor([[True, False, True], [True, True, True]])}
for order in range(6):
    device(processors=8)
    seed(order)
    logits = torch.empty(inputs["logits"].numel() + 64, dtype=torch.bfloat16)[:-64].view(2, 3, 3003)
    taken = inputs | {"logits": logits.copy_(inputs["logits"])}
    try:
        step(taken, objectives.grpo(entropy_coef=0.01), (4,), out=taken["logits"])
        print("nothing was noticed")
    except RuntimeError as error:
        print(str(error).replace(chr(10), " "))
"""

RACE = "race in (shared|global) memory"
# name: (file, text, text instead, what is noticed)
MISTAKES = {
    "none": ("grpo_step.cu", "  sync_block();\n", "  sync_block();\n", "nothing was noticed"),
    "blocks that have not begun": (
        "grpo_step.cu", "  wait_cluster();  //", "  //",
        "has begun|may not have begun|uninit|which has ended",
    ),
    "a block that does not arrive": ("grpo_step.cu", "  arrive_cluster();  //", "  //", "arrive_cluster"),
    "a token that has not been read": (
        "grpo_step.cu", "has its barriers\n  sync_block();\n", "has its barriers\n", f"{RACE}|uninitialised",
    ),
    "logits that have not arrived": ("grpo_step.cu", "  barrier_wait(&shared.arrived, 0);\n", "", RACE),
    "sums that are not waited for": (
        "grpo_step.cu", "    barrier_wait_cluster(&shared.published, 0);", "    //",
        f"{RACE}|before it ends|which has ended",
    ),
    "a wait for the own block": (
        "grpo_step.cu", "barrier_wait_cluster(&shared.published, 0)", "barrier_wait(&shared.published, 0)",
        "barrier_wait_cluster",
    ),
    "fewer bytes than come": (
        "grpo_step.cu", "parts * sizeof(shared.sums[0]) + sizeof(shared.own)", "parts * sizeof(shared.sums[0])",
        f"{RACE}|bytes|next phase has ended|before it ends",
    ),
    "more bytes than come": (
        "grpo_step.cu", "parts * sizeof(shared.sums[0]) + sizeof(shared.own)", "(parts + 1) * sizeof(shared.sums[0])",
        "deadlock",
    ),
    "a plan that is not there": ("grpo_step.cu", "  sync_block();\n\n  const RowPlan", "\n  const RowPlan", RACE),
    "the own entry written twice": ("grpo_step.cu", "  sync_block();  // its vector", "  //", RACE),
    "the own entry read late": (
        "grpo_step.cu", "    sync_warp();\n    if (lane_id() == 0) D::store", "    if (lane_id() == 0) D::store", RACE,
    ),
    "barriers that copies do not know": ("grpo_step.cu", "    fence_barrier_init();\n", "", "fence_barrier_init"),
    "weights that are not there": ("step_token.cuh", "  wait_for_previous_kernel();\n", "", RACE),
    "a neighbour's entries": (
        "step_part.cuh", "count_ - (after_ != 0 ? 1 : 0)", "count_", f"{RACE}|bulk_load",
    ),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.slow(reason="compiles kernels with mistakes")
def test_mistakes_are_noticed(mistake: str) -> None:
    name, text, instead, noticed = MISTAKES[mistake]
    changed = {each: (CUDA / each).read_text(encoding="utf-8") for each in {"grpo_step.cu", name}}
    assert changed[name].count(text) >= 1
    changed[name] = changed[name].replace(text, instead)
    environment = os.environ | {
        "R1KERNELS_BACKEND": "cuda", "R1KERNELS_CUDA_EMULATOR": str(cuda_emulation.operators(changed=changed)),
        "PYTHONPATH": f"{cuda_emulation.ROOT}{os.pathsep}{SUPPORT}",
    }
    completed = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    lines = completed.stdout.splitlines()
    assert len(lines) == 6, completed.stdout + completed.stderr
    for line in lines:
        assert re.search(noticed, line), line
