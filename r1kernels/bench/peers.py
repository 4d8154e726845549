"""Other libraries, as functions with the arguments of our cases. A loader imports its library and may fail.

The calls are those of TRL 1.16, Liger 0.8.5, verl 0.9.1, QuACK 0.6.5, cut-cross-entropy 25.1 and torch 2.13.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TRL, LIGER, VERL, CCE, QUACK = "TRL", "Liger", "verl", "cce", "QuACK"
LIGER_PLAIN = "Liger, not compiled"
TORCH_HEAD, COMPILED, EAGER = "torch linear_cross_entropy", "torch.compile", "torch eager"
DISTRIBUTIONS = {TRL: "trl", LIGER: "liger-kernel", LIGER_PLAIN: "liger-kernel", VERL: "verl", CCE: "cut-cross-entropy",
                 QUACK: "quack-kernels"}
TRL_TILE = 32_768  # entries of the vocabulary in a tile, as TRL's trainers set it
QUACK_CHUNK = 4_096  # tokens

Function = Callable[..., Any]


class Peer(NamedTuple):
    """`load` gives the function. `only_cuda`: its kernels run on a GPU only. `compiles`: it calls torch.compile, which
    takes seconds for each shape. `otherwise`: what is measured where this one does not run."""

    implementation: str
    load: Callable[[], Function]
    only_cuda: bool = False
    compiles: bool = False
    otherwise: Peer | None = None


class Missing(Exception):
    """A peer that cannot run here; the message says why. `everywhere`: it can run in no case."""

    def __init__(self, why: str, everywhere: bool = False) -> None:
        super().__init__(why)
        self.everywhere = everywhere


def load(peer: Peer, device: torch.device) -> Function:
    """The function of a peer.

    Raises:
        Missing: it is not installed, needs a GPU, or its import fails.
    """
    name = DISTRIBUTIONS.get(peer.implementation)
    if name is not None:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise Missing(f"not installed: pip install {name}", everywhere=True) from None
    if peer.only_cuda and device.type != "cuda":
        raise Missing("its kernels need a CUDA device")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of an import are the peer's
        try:
            return peer.load()
        except Exception as error:  # an import can fail in any way: another version of a library, no driver
            raise Missing(f"its import fails: {one_line(error)}") from error


def compiled(function: Function) -> Peer:
    """torch.compile for one shape."""

    def load() -> Function:
        forget_compiled()
        return torch.compile(function, dynamic=False)

    return Peer(COMPILED, load, compiles=True)


def forget_compiled(wanted: bool = True) -> None:
    """Drops earlier compilations: after a few shapes of one function, torch would run it without compiling, and say
    nothing."""
    if wanted:
        torch._dynamo.reset()


def one_line(error: BaseException) -> str:
    """The type and the first line of an error's message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# ---- log-probs and entropy from logits ------------------------------------------------------------------------


def trl_logprobs() -> Function:
    function = named("trl.trainer.utils", "selective_log_softmax")
    return lambda logits, token_ids: function(logits, token_ids)


def trl_logprobs_and_entropy() -> Function:
    function = named("trl.trainer.utils", "selective_log_softmax_and_entropy")
    return lambda logits, token_ids: function(logits, token_ids, entropy_requires_grad=True)


def verl_logprobs() -> Function:
    function = named("verl.utils.torch_functional", "logprobs_from_logits_v2")
    return lambda logits, token_ids: function(logits, token_ids)


def verl_entropy() -> Function:
    module = importlib.import_module("verl.utils.torch_functional")
    return lambda logits, token_ids: (
        module.logprobs_from_logits_v2(logits, token_ids), module.entropy_from_logits(logits))


# ---- cross-entropy --------------------------------------------------------------------------------------------


def liger_cross_entropy() -> Function:
    function = named("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda logits, targets, **terms: function(logits, targets, **_liger_terms(terms))


def _liger_terms(terms: dict[str, float]) -> dict[str, float]:
    names = {"z_loss_coef": "lse_square_scale"}
    return {names.get(name, name): value for name, value in terms.items()}


def quack_cross_entropy() -> Function:
    function = named("quack.cross_entropy", "cross_entropy")
    return lambda logits, targets: function(logits, targets, reduction="mean")


def torch_linear_cross_entropy() -> Function:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    return lambda hidden, weight, targets, **given: F.linear_cross_entropy(hidden, weight, targets, **given)


def trl_linear_cross_entropy() -> Function:
    head = trl_head(())
    return lambda hidden, weight, targets: -head(hidden, weight, targets)[0].mean()


def liger_linear_cross_entropy() -> Function:
    function = named("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda hidden, weight, targets: function(hidden, weight, targets)


def cce_linear_cross_entropy() -> Function:
    """Its default leaves out gradients that it takes for too small."""
    function = named("cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, targets: function(hidden, weight, targets, impl="cce")


def quack_linear_cross_entropy() -> Function:
    function = named("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, targets: function(hidden, weight, targets, chunk_size=QUACK_CHUNK)


# ---- heads of the policy --------------------------------------------------------------------------------------


def trl_head(outputs: tuple[str, ...] = ("entropy",)) -> Function:
    """What TRL's chunked head runs: (hidden (N, H), weight, token_ids) -> (log-probs, entropy).

    The entropy is None if it is not among `outputs`.
    """
    function = named("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    return lambda hidden, weight, token_ids: function.apply(
        hidden, weight, None, token_ids, 1.0, TRL_TILE, None, 1.0, outputs)[:2]


def verl_head() -> Function:
    """verl's head in torch: (hidden (N, H), weight, token_ids) -> (log-probs, entropy). It always computes both."""
    head = named("verl.utils.experimental.torch_functional", "FusedLinearForPPO")(impl_backend="torch")
    return lambda hidden, weight, token_ids: head(hidden, weight, token_ids)


def liger(load: Callable[[bool], Function]) -> Peer:
    """Liger as it comes, with torch.compile; where that does not run, without."""
    return Peer(LIGER, partial(load, True), compiles=True, otherwise=Peer(LIGER_PLAIN, partial(load, False)))


def liger_grpo(compile: bool) -> Function:
    """Chunks of a sequence."""
    head = named("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0, compiled=compile, use_ref_model=False, loss_type="grpo")
    forget_compiled(compile)

    def loss(hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
        mask = torch.ones_like(old_logprobs)
        return head(hidden, weight, token_ids, mask, advantages, old_per_token_logps=old_logprobs)[0]

    return loss


def liger_jsd(compile: bool) -> Function:
    loss = named("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compile)
    forget_compiled(compile)

    def run(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        ids = torch.zeros(len(student_hidden), dtype=torch.int64, device=student_hidden.device)
        return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, ids)

    return run


# ---- arithmetic of tokens and answers -------------------------------------------------------------------------


def _verl_algorithms() -> Any:
    return importlib.import_module("verl.trainer.ppo.core_algos")


def verl_kl() -> Function:
    penalty = _verl_algorithms().kl_penalty_forward
    return lambda logprobs, ref_logprobs: penalty(logprobs, ref_logprobs, "low_var_kl")


def verl_advantages() -> Function:
    """Rewards (P, G) as verl has them: one per token, of answers with one token each."""
    import numpy as np

    function = _verl_algorithms().compute_grpo_outcome_advantage

    def run(rewards: Tensor) -> Tensor:
        prompts, answers = rewards.shape
        index = np.repeat(np.arange(prompts), answers)
        per_token = rewards.reshape(-1, 1)
        return function(per_token, torch.ones_like(per_token), index, epsilon=1e-4)[0].reshape(rewards.shape)

    return run
