"""Policy-gradient objectives: one frozen dataclass and a preset per published algorithm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

SURROGATES = ("clip", "cispo", "sapo", "reinforce")
RATIOS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATES = ("sequence_mean", "token_mean", "constant")


@dataclasses.dataclass(frozen=True)
class Objective:
    r"""A description of the loss that `policy_loss` computes from log-probs.

    With r = exp(l - l_old) and advantage A, the loss of a token is

        surrogate(r, A, l) * importance_weight + kl_coef * kl(l, l_ref) - entropy_coef * H

    and `aggregate` says how the losses of all tokens become one number.

    Attributes:
        surrogate: "clip" -min(rA, clip(r, 1 - clip_low, 1 + clip_high) A); "cispo" -sg[min(r, 1 + clip_high)] A l;
            "sapo" -(4/tau) sigmoid(tau (r - 1)) A with tau by the sign of A; "reinforce" -A l. A callable
            `(logprobs, batch) -> per-token loss` is differentiated by autograd (see `policy_loss`).
        ratio: "token", or "sequence" for one ratio exp(mean_t (l - l_old)) per sequence (GSPO).
        clip_low, clip_high: distances of the bounds from 1, >= 0. `clip_low` may exceed 1 (R1 used 10).
        ratio_cap: two-sided ("dual") clip: if A < 0, the ratio is limited to this value, > 1 + clip_high.
        tau_pos, tau_neg: SAPO temperatures, > 0.
        kl: estimator of KL(pi || ref) on sampled tokens, with d = l_ref - l: "k1" -d, "k2" d^2/2,
            "k3" e^d - d - 1. In the loss, k1 has expected gradient 0 (it regularises nothing), k2 has the
            gradient of KL(pi || ref), and k3 has the gradient of KL(ref || pi).
        kl_coef: weight of the KL term, >= 0. If it is not 0, the loss needs `ref_logprobs`.
        entropy_coef: weight of the entropy bonus. If it is not 0, the loss needs the entropy.
        aggregate: "sequence_mean" mean over sequences of the mean over their tokens; "token_mean" sum over
            tokens / number of counted tokens; "constant" sum over tokens / (sequences * max_length).
        max_length: the largest number of tokens of a sequence; only for "constant".

    Raises:
        ValueError: a field out of range or an invalid combination; the message names the field.
    """

    surrogate: str | Callable[..., Any] = "clip"
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    kl: str = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    aggregate: str = "sequence_mean"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.surrogate):
            self._check_choice("surrogate", SURROGATES)
        self._check_choice("ratio", RATIOS)
        self._check_choice("kl", KL_ESTIMATORS)
        self._check_choice("aggregate", AGGREGATES)
        for field in ("clip_low", "clip_high", "kl_coef"):
            self._check_number(field, minimum=0.0)
        self._check_number("entropy_coef")
        for field in ("tau_pos", "tau_neg"):
            self._check_number(field, minimum=0.0, strict=True)
        if self.ratio_cap is not None:
            if self.surrogate != "clip":
                raise ValueError(f"ratio_cap is {self.ratio_cap!r} with surrogate {self.surrogate!r}, "
                                 "expected None: only 'clip' has a cap")
            self._check_number("ratio_cap", minimum=1.0 + self.clip_high, strict=True)
        if self.ratio == "sequence" and (callable(self.surrogate) or self.surrogate == "reinforce"):
            raise ValueError(f"ratio is 'sequence' with surrogate {self.surrogate!r}, which does not use this ratio; "
                             "expected 'token'")
        if self.aggregate == "constant":
            if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
                raise ValueError(f"max_length is {self.max_length!r}, expected a positive integer with aggregate "
                                 "'constant'")
        elif self.max_length is not None:
            raise ValueError(f"max_length is {self.max_length!r} with aggregate {self.aggregate!r}, expected None: "
                             "only 'constant' uses it")

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            raise ValueError(f"{field} is {value!r}, expected one of {', '.join(choices)}")

    def _check_number(self, field: str, minimum: float = -math.inf, strict: bool = False) -> None:
        value = getattr(self, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Only comparisons, because torch.compile can trace them.
        if not number or not (-math.inf < value < math.inf and (value > minimum if strict else value >= minimum)):
            bound = "" if minimum == -math.inf else f" {'>' if strict else '>='} {minimum:g}"
            raise ValueError(f"{field} is {value!r}, expected a finite number{bound}")

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss depends on where sequences begin and end."""
        return self.ratio == "sequence" or self.aggregate != "token_mean"


_FIELDS = tuple(field.name for field in dataclasses.fields(Objective))


def _preset(name: str, overrides: dict[str, Any], **defaults: Any) -> Objective:
    for field in overrides:
        if field not in _FIELDS:
            raise ValueError(f"objectives.{name}: unknown field {field!r}, expected one of {', '.join(_FIELDS)}")
    return Objective(**{**defaults, **overrides})


def grpo(**overrides: Any) -> Objective:
    """GRPO: token ratio, clip 0.2, mean over sequences of the mean over tokens (arXiv 2402.03300, eq. 3).

    DeepSeekMath used `kl_coef=0.04`; the default here is 0, as in most trainers today.
    """
    return _preset("grpo", overrides)


def r1(**overrides: Any) -> Objective:
    """DeepSeek-R1: GRPO with clip 10 and `kl_coef=0.001` (arXiv 2501.12948 v2).

    The paper prints a sequence-level ratio without 1/|o|. Like every implementation, this preset uses the token ratio
    and the 1/|o| of DeepSeekMath. At clip 10 the lower bound is -9, so it never takes effect.
    """
    return _preset("r1", overrides, clip_low=10.0, clip_high=10.0, kl_coef=0.001)


def bnpo(**overrides: Any) -> Objective:
    """GRPO averaged over the tokens of the batch (TRL's "bnpo")."""
    return _preset("bnpo", overrides, aggregate="token_mean")


def dr_grpo(max_length: int, **overrides: Any) -> Objective:
    """Dr. GRPO: sum over tokens / (sequences * max_length), no length bias (arXiv 2503.20783)."""
    return _preset("dr_grpo", overrides, aggregate="constant", max_length=max_length)


def dapo(**overrides: Any) -> Objective:
    """DAPO: clip-higher (0.2, 0.28) and token mean (arXiv 2503.14476)."""
    return _preset("dapo", overrides, clip_low=0.2, clip_high=0.28, aggregate="token_mean")


def gspo(**overrides: Any) -> Objective:
    """GSPO: one ratio per sequence, clip (3e-4, 4e-4) (arXiv 2507.18071)."""
    return _preset("gspo", overrides, ratio="sequence", clip_low=3e-4, clip_high=4e-4)


def cispo(**overrides: Any) -> Objective:
    """CISPO: the clipped ratio is a constant weight of the log-prob (arXiv 2506.13585).

    The bound is 1 + clip_high = 5; TRL's `epsilon_high` is that absolute bound.
    """
    return _preset("cispo", overrides, surrogate="cispo", clip_high=4.0, aggregate="token_mean")


def sapo(**overrides: Any) -> Objective:
    """SAPO: a sigmoid gate instead of a clip (arXiv 2511.20347)."""
    return _preset("sapo", overrides, surrogate="sapo")


def reinforce(**overrides: Any) -> Objective:
    """REINFORCE: -A l, token mean, no ratio."""
    return _preset("reinforce", overrides, surrogate="reinforce", aggregate="token_mean")
