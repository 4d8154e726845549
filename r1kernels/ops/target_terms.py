r"""What the loss of a target has beside its log-prob: label smoothing and the z-loss.

With z = logits / T, p = softmax z, l = z_y - lse, upstream gradients u_d of the targets y_d of one row, U = sum_d u_d:

    loss = -(1 - eps) l + eps (lse - mean_v z_v) + c lse^2
    dL/dz_j = U (1 + 2 c lse) p_j - (1 - eps) sum_d u_d 1[j = y_d] - eps U / V

The first term is what the vocabulary kernels compute from g = -U (1 + 2 c lse), the last one is a shift of the row, and
the one between changes only the entries of the targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels.ops._checks import check_number
from r1kernels.ops.row_statistics import WANTED, Entries
from r1kernels.ops.token_stats import entry_gradients


class TargetSlopes(NamedTuple):
    """The gradient of some rows of logits: dL/dz_j = -g p_j - pulls_d 1[j = ids_d] + shift.

    Attributes:
        ids: (n, D), the targets. g: (n,). pulls: (n, D) float64, the same for equal ids of a row. shift: (n,) or None.
    """

    ids: Tensor
    g: Tensor
    pulls: Tensor
    shift: Tensor | None

    def where(self, counts: Tensor) -> TargetSlopes:
        """0 for the rows where `counts` (n,) is False."""
        shift = None if self.shift is None else torch.where(counts, self.shift, 0)
        return TargetSlopes(
            self.ids, torch.where(counts, self.g, 0), torch.where(counts[:, None], self.pulls, 0), shift
        )

    def owned_by(self, owned: Tensor) -> TargetSlopes:
        """Where `owned` (n,) is False, the only id is the substitute for a token of another shard."""
        return self._replace(pulls=torch.where(owned[:, None], self.pulls, 0))

    def scaled(self, factor: float) -> TargetSlopes:
        shift = None if self.shift is None else self.shift * factor
        return TargetSlopes(self.ids, self.g * factor, self.pulls * factor, shift)

    @property
    def active(self) -> Tensor:
        """(n,), which rows have a gradient."""
        return (self.g != 0) | (self.pulls != 0).any(-1)

    def entries(
        self, logits: Tensor, lse: Tensor, temperature: float, temperatures: Tensor | None, softcap: float
    ) -> Entries:
        """The entries of the targets in the gradient of the logits (n, D)."""
        # -g p - pull = -pull (1 - p) - (g + pull) p
        values = entry_gradients(
            logits, self.ids, lse, lse, added=-self.pulls, others=self.g.double()[:, None] + self.pulls, eta=None,
            temperature=temperature, temperatures=temperatures, softcap=softcap, shift=self.shift,
        )
        return Entries(self.ids, torch.where(self.active[:, None], values, 0))


class TargetTerms(NamedTuple):
    """The coefficients: of the z-loss, c >= 0, and of label smoothing, 0 <= eps <= 1."""

    z_loss_coef: float = 0.0
    label_smoothing: float = 0.0

    @staticmethod
    def checked(z_loss_coef: Any, label_smoothing: Any) -> TargetTerms:
        terms = TargetTerms(
            check_number("z_loss_coef", z_loss_coef, minimum=0.0),
            check_number("label_smoothing", label_smoothing, minimum=0.0),
        )
        if terms.label_smoothing > 1:
            raise ValueError(f"label_smoothing is {label_smoothing!r}, expected a number from 0 to 1")
        return terms

    def __str__(self) -> str:
        """Both terms after the name of a function, for what the ranks of a group must agree on."""
        return f", z_loss_coef {self.z_loss_coef!r}, label_smoothing {self.label_smoothing!r}"

    @property
    def given(self) -> bool:
        return self.z_loss_coef != 0 or self.label_smoothing != 0

    @property
    def wanted(self) -> int:
        """What `row_statistics` computes for the losses beside log-probs and log-sum-exp."""
        return WANTED["mean_logit"] if self.label_smoothing != 0 else 0

    def losses(self, logprobs: Tensor, lse: Tensor, mean: Tensor) -> Tensor:
        """(n, D) float64, from the log-probs of the targets (n, D), the log-sum-exp and the mean of z (n,), which is
        read if it is `wanted`."""
        logprobs, lse = logprobs.double(), lse.double()[:, None]
        losses = -logprobs
        if self.label_smoothing != 0:
            smooth = lse - mean.double()[:, None]
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * smooth
        if self.z_loss_coef != 0:
            losses = losses + self.z_loss_coef * lse.square()
        return losses

    def slopes(self, ids: Tensor, grads: Tensor, lse: Tensor, vocab: int) -> TargetSlopes:
        """The gradient of the logits from those of the losses (n, D). vocab: V, over all shards."""
        dtype, grads = grads.dtype, grads.double()
        total = grads.sum(-1)
        pulls = grads
        if ids.shape[1] > 1:  # equal ids share one entry
            pulls = torch.where(ids[:, :, None] == ids[:, None, :], grads[:, None, :], 0).sum(-1)
        g = -total * (1 + 2 * self.z_loss_coef * lse) if self.z_loss_coef != 0 else -total
        shift = None
        if self.label_smoothing != 0:
            pulls = (1 - self.label_smoothing) * pulls
            shift = (total * (-self.label_smoothing / vocab)).to(dtype)
        return TargetSlopes(ids, g.to(dtype), pulls, shift)


def is_repeated(ids: Tensor) -> Tensor:
    """(n, D), whether the same id is earlier in its row."""
    return (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
