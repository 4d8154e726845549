r"""A teacher that is known at K tokens of each row: its ids and log-probs, and the outcomes that are compared.

See `r1kernels.ops.topk_divergence` for the formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.ops._checks import values_are_free

TAILS = ("bucket", "truncate", "renormalize")  # what becomes of the tokens that are not listed
ROUNDING = 1e-3  # how far above 0 a log-prob may be; a teacher's tail below this may count as 0
TAIL_FLOOR = 1e-7  # the smallest tail of a teacher if the student has a tail
TOO_MUCH = 1.01  # log-probs in bfloat16 can add up to a little more than 1


class Teacher(NamedTuple):
    """K tokens a row: ids in [0, V), log-probs in float64, and which entries are present.

    Absent entries have the log-prob -inf, and the id of the row's first present one, or 0 in rows without any. A
    present entry may have the log-prob -inf, too: the teacher forbids the token.
    """

    token_ids: Tensor  # (..., K)
    logprobs: Tensor | None  # (..., K); the gradient does without
    present: Tensor  # (..., K), bool

    def rows(self, rows: slice) -> Teacher:
        return Teacher(*(None if part is None else part[rows] for part in self))

    def tail_mass(self) -> Tensor:
        return (1 - self.logprobs.exp().sum(-1)).clamp(min=0)


def _position(bad: Tensor) -> tuple[int, ...]:
    return tuple(bad.nonzero()[0].tolist())


def check_values(token_ids: Tensor, logprobs: Tensor, vocab: int, mask: Tensor | None) -> None:
    """Raises ValueError for values that no teacher returns. It checks only if that costs no synchronisation."""
    if not values_are_free(token_ids):
        return
    active = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(token_ids)
    bad = active & ~(logprobs <= ROUNDING)
    if bad.any():
        at = _position(bad)
        raise ValueError(f"teacher_logprobs{list(at)} is {float(logprobs[at])}, expected a log-prob <= 0 (or -inf)")
    active = active & (logprobs > -torch.inf)
    bad = active & ((token_ids < 0) | (token_ids >= vocab))
    if bad.any():
        at = _position(bad)
        raise ValueError(f"teacher_token_ids{list(at)} is {int(token_ids[at])}, expected an id in [0, {vocab})")
    # Absent entries get distinct numbers that are not ids.
    absent = -1 - torch.arange(token_ids.shape[-1], device=token_ids.device)
    ordered = torch.where(active, token_ids, absent).sort(-1).values
    bad = ordered[..., 1:] == ordered[..., :-1]
    if bad.any():
        at = _position(bad)
        raise ValueError(
            f"teacher_token_ids{list(at[:-1])} holds {int(ordered[at])} twice, expected distinct ids "
            "(-inf in teacher_logprobs marks an entry as absent)"
        )
    total = torch.where(active, logprobs.double(), -torch.inf).exp().sum(-1)
    bad = total > TOO_MUCH
    if bad.any():
        at = _position(bad)
        raise ValueError(
            f"teacher_logprobs{list(at)} add up to a probability of {float(total[at]):.4g}, expected at most 1"
        )


def make_teacher(
    token_ids: Tensor, logprobs: Tensor, mask: Tensor | None, present: Tensor | None = None
) -> Teacher:
    """Replaces absent entries and all values behind the mask by harmless values. By default, the entries with a
    probability above 0 are present."""
    if present is None:
        present = logprobs > -torch.inf
    if mask is not None:
        present = present & mask.unsqueeze(-1)
    first = torch.where(present, token_ids, 0).gather(-1, present.to(torch.int8).argmax(-1, keepdim=True))
    logprobs = torch.where(present, logprobs.detach().double().clamp(max=0), -torch.inf)
    # A total above 1 is due to rounding: it is scaled down.
    total = logprobs.exp().sum(-1, keepdim=True)
    logprobs = torch.where(total > 1, logprobs - total.log(), logprobs)
    return Teacher(torch.where(present, token_ids, first), logprobs, present)


def teacher_outcomes(teacher: Teacher, log_p_rest: Tensor) -> Tensor:
    """Log-probabilities (..., K + 1) of the teacher's outcomes, the tail last.

    The teacher's tail is at least `TAIL_FLOOR`. If the student has no tail (for example, K = V), a teacher's tail
    within rounding counts as 0 too: otherwise the teacher would be infinitely far away.
    """
    total = teacher.logprobs.exp().sum(-1)
    no_tail = log_p_rest == -torch.inf
    none, least = no_tail & (total > 1 - ROUNDING), ~no_tail & (total > 1 - TAIL_FLOOR)
    log_rest = torch.where(least, math.log(TAIL_FLOOR), torch.log1p(-total.clamp(max=1)))
    log_rest = torch.where(none, -torch.inf, log_rest)
    # The listed probabilities are scaled so that they and the tail add up to 1.
    to_one = -total.log()
    shift = torch.where(least, to_one + math.log1p(-TAIL_FLOOR), torch.where(none, to_one, 0))
    return torch.cat([teacher.logprobs + shift.unsqueeze(-1), log_rest.unsqueeze(-1)], -1)
