r"""Several teachers as one: the mixture of their distributions, with weights a token.

    q_t = sum_m c_tm q_tm,    sum_m c_tm = 1

A row of weights with a single 1 chooses a teacher; what the others have there does not matter. The mixture is computed
as logits, so that every divergence takes it as it takes a single teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels.ops._checks import check_floating, values_are_free
from r1kernels.ops.topk_choice import log_sum_exp

ROUNDING = 1e-3  # how far from 1 the weights of a token may add up


def is_several(teacher: Any) -> bool:
    return isinstance(teacher, (list, tuple))


def check_coefs(
    coefs: Any, name: str, teacher: Any, shape: tuple[int, ...], like: Tensor, mask: Tensor | None, group: Any
) -> Tensor | None:
    """The weights (..., M) in float64, each row scaled to the sum 1; None if there is a single teacher. `name`,
    `teacher`: the argument that has the teachers."""
    if not is_several(teacher):
        if coefs is not None:
            raise ValueError(
                f"teacher_coefs is given and {name} is a {type(teacher).__name__}, expected a list of teachers"
            )
        return None
    count = len(teacher)
    if coefs is None or count == 0:
        raise ValueError(f"{name} has {count} teachers and teacher_coefs is "
                         f"{'None' if coefs is None else 'given'}, expected a weight for each of them")
    if group is not None:
        raise ValueError(f"{name} is a list and process_group is given, expected one of them")
    check_floating("teacher_coefs", coefs, like)
    if coefs.shape not in ((count,), (*shape, count)):
        raise ValueError(f"teacher_coefs has shape {tuple(coefs.shape)}, expected {(count,)} or {(*shape, count)}: one "
                         f"weight for each of {name}")
    coefs = coefs.detach().double().expand(*shape, count)
    if mask is not None:
        coefs = torch.where(mask.unsqueeze(-1), coefs, 1 / count)
    total = coefs.sum(-1, keepdim=True)
    if values_are_free(coefs):
        bad = ~((coefs >= 0).all(-1) & ((total - 1).abs() <= ROUNDING).squeeze(-1))
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"teacher_coefs of token {list(at)} are {coefs[at].tolist()}, expected weights >= 0 that "
                             "add up to 1")
    return coefs / total


@torch.no_grad()
def mixed_logits(
    teachers: list[Tensor], coefs: Tensor, mask: Tensor | None, temperature: float, in_place: bool = False
) -> Tensor:
    """(..., V) logits T log q of the mixture, in float32 (or float64). in_place: the logits, of that dtype, are
    overwritten, and the first of them has the result."""
    dtype = torch.float64 if any(logits.dtype == torch.float64 for logits in teachers) else torch.float32
    result = None
    for logits, weight in zip(teachers, coefs.unbind(-1), strict=True):
        lse = log_sum_exp(logits, mask, temperature)
        part = logits if in_place else logits.to(dtype, copy=True)
        # In the end T log q is wanted, so T stays a factor.
        part.add_(((weight.log() - lse) * temperature).unsqueeze(-1).to(dtype))
        part.masked_fill_((weight == 0).unsqueeze(-1), -torch.inf)
        result = part if result is None else _log_add(result, part, temperature)
    return result


def _log_add(result: Tensor, part: Tensor, temperature: float) -> Tensor:
    """T log(e^(result / T) + e^(part / T)), in the memory of the result."""
    if temperature == 1:
        return torch.logaddexp(result, part, out=result)
    torch.logaddexp(result.div_(temperature), part.div_(temperature), out=result)
    return result.mul_(temperature)
