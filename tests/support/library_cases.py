"""The smallest call of each operation, and programs in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import r1kernels

ROW, ID = torch.zeros(1, 4), torch.tensor([2])
OPERATIONS: dict[str, Callable[[], Tensor]] = {
    "token_logprobs": lambda: r1kernels.token_logprobs(ROW, ID),
    "cross_entropy": lambda: r1kernels.cross_entropy(ROW, ID),
    "policy_loss": lambda: r1kernels.policy_loss(-ROW, torch.ones(1)).loss,
    "grpo_loss": lambda: r1kernels.grpo_loss(ROW.unsqueeze(0), ID.unsqueeze(0), torch.ones(1)).loss,
    "group_advantages": lambda: r1kernels.group_advantages(torch.arange(4.0), 2),
    "kl_estimate": lambda: r1kernels.kl_estimate(ROW, ROW + 0.1),
    "distillation_loss": lambda: r1kernels.distillation_loss(ROW, ROW + 0.1).loss,
    "distillation_loss, top-k": lambda: r1kernels.distillation_loss(
        ROW, teacher_token_ids=ID.unsqueeze(0), teacher_logprobs=torch.tensor([[-1.0]])
    ).loss,
}


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
