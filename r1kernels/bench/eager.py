"""The losses as they are written in plain torch: float32 arithmetic, or float64 where the inputs are. They are peers,
references in float64, and what torch.compile gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 0.2


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    return wide(logits).log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def logprobs_and_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of -inf have probability 0 and add nothing to the entropy."""
    log_p = wide(logits).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def statistics(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    """Log-prob, log-sum-exp, entropy, sum of p^2, mean logit, and whether the token is the likeliest."""
    z = wide(logits)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    logprob = log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return (logprob, z.logsumexp(-1), -(p * log_p).sum(-1), p.square().sum(-1), z.detach().mean(-1),
            z.argmax(-1) == token_ids)


def over_support(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits (N, V) with -inf for each id that is not among those of its row (N, K)."""
    return torch.full_like(logits, -math.inf).scatter(-1, ids, logits.gather(-1, ids))


def finite_logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """As trainers write it: a pass less than above, and an entropy of NaN where a logit is -inf."""
    log_p = wide(logits).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def clipped_terms(logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    """The loss of each token, (B, T)."""
    ratio = (logprobs - old_logprobs).exp()
    advantages = advantages.reshape(len(ratio), -1)
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def clipped_loss(logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    """The mean over sequences of the mean over their tokens, of (B, T)."""
    return clipped_terms(logprobs, advantages, old_logprobs).mean(1).mean()


def grpo_loss(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    return clipped_loss(logprobs(logits, token_ids), advantages, old_logprobs)


def grpo_loss_and_entropy(
    logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """With the mean entropy as a metric, from the same log_softmax."""
    logprobs, entropy = finite_logprobs_and_entropy(logits, token_ids)
    return clipped_loss(logprobs, advantages, old_logprobs), entropy.mean()


def linear_grpo_loss(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor
) -> Tensor:
    return grpo_loss(F.linear(hidden, weight), token_ids, advantages, old_logprobs)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss_coef: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    z = wide(logits)
    loss = F.cross_entropy(z, targets, label_smoothing=label_smoothing)
    return loss + z_loss_coef * z.logsumexp(-1).square().mean() if z_loss_coef else loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(F.linear(hidden, weight), targets)


def divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """The mean over rows (N, V)."""
    log_p, log_q = wide(student).log_softmax(-1), wide(teacher).log_softmax(-1)
    if kind == "forward_kl":
        return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    if kind == "reverse_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum(F.kl_div(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q)) / 2


def of_listed(student: Tensor, token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """Forward KL over the listed tokens (N, K) and one outcome for all others."""
    log_p = wide(student).log_softmax(-1)
    rest = log_p.scatter(-1, token_ids, -math.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([log_p.gather(-1, token_ids), rest], -1)
    log_q = torch.cat([logprobs, torch.log1p(-logprobs.exp().sum(-1, keepdim=True))], -1)
    return F.kl_div(log_p, log_q.to(log_p.dtype), log_target=True, reduction="batchmean")


def of_likeliest(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Reverse KL over the student's k likeliest tokens and one outcome for all others."""
    log_p, log_q = wide(student).log_softmax(-1), wide(teacher).log_softmax(-1)
    ids = log_p.detach().topk(k).indices
    outcomes = []
    for x in (log_p, log_q):
        rest = x.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        outcomes.append(torch.cat([x.gather(-1, ids), rest], -1))
    return F.kl_div(outcomes[1], outcomes[0], log_target=True, reduction="batchmean")


# ---- tokens and answers ---------------------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3."""
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def group_advantages(rewards: Tensor) -> Tensor:
    """(P, G) rewards, as trainers write it."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def pass_at_k_advantages(k: int) -> Callable[[Tensor], Tensor]:
    """Of (P, G) rewards. With rewards in increasing order, reward i is the best of C(i, k - 1) subsets of k answers,
    and of C(i - 1, k - 2) of those that have a given smaller one."""

    def run(rewards: Tensor) -> Tensor:
        answers = rewards.shape[1]
        best = [comb(i, k - 1) / comb(answers, k) for i in range(answers)]
        own = [comb(i, k - 1) / comb(answers - 1, k - 1) for i in range(answers)]
        above = [comb(i - 1, k - 2) / comb(answers - 1, k - 1) if i else 0.0 for i in range(answers)]
        best, own, above = (rewards.new_tensor(share) for share in (best, own, above))
        # (G, G): entry (j, i) is the share of reward j in the mean over the subsets that have answer i.
        having = own.diag() + above[:, None].expand(answers, answers).tril(-1)
        order = rewards.argsort(1)
        values = rewards.gather(1, order)
        values = values - values[:, -1:]  # exactly 0 where the best of all subsets is the same
        mean = values @ best
        std = ((values - mean[:, None]).square() @ best).sqrt()
        advantages = (values @ having - mean[:, None]) / (std[:, None] + 1e-4)
        return torch.empty_like(rewards).scatter(1, order, advantages)

    return run
