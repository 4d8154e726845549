"""Policy-gradient objectives: one frozen dataclass and a preset per published algorithm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Unpack

SURROGATES = ("clip", "cispo", "sapo", "reinforce", "dppo_tv", "dppo_kl", "ipo", "vespo", "gmpo")
RATIOS = ("token", "sequence", "sequence_token", "sequence_product")
CAPPED = ("clip", "dppo_tv", "dppo_kl")  # surrogates with a ratio_cap
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATES = ("sequence_mean", "token_mean", "constant")


@dataclasses.dataclass(frozen=True)
class TokenLocal:
    """A user's `function(logprobs, entropies, tokens) -> loss` of single tokens: see `Objective.token_local`."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    @property
    def name(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)


@dataclasses.dataclass(frozen=True)
class Objective:
    r"""A description of the loss that `policy_loss` computes from log-probs.

    With r = exp(l - l_old) and advantage A, the loss of a token is

        surrogate(r, A, l) * importance_weight + kl_coef * kl(l, l_ref) - entropy_coef * H

    with r kl in place of kl if `kl_ratio`, and `aggregate` says how the losses of all tokens become one number. Here
    p = e^l and p_old = e^l_old.

    Attributes:
        surrogate: "clip" -min(rA, clip(r, 1 - clip_low, 1 + clip_high) A);
            "cispo" -sg[clamp(r, 1 - clip_low, 1 + clip_high)] A l;
            "sapo" -(4/tau) sigmoid(tau (r - 1)) A with tau by the sign of A; "reinforce" -A l;
            "dppo_tv" -sg[min(r, ratio_cap)] A l, and 0 where A > 0 and p - p_old > clip_high, or A < 0 and
            p_old - p > clip_low; "dppo_kl" the same with KL(Bernoulli(p_old) || Bernoulli(p)) in place of the
            difference's size, in the same directions;
            "ipo" -rA + tau (log r)^2, without its first term where p - p_old > clip_high or p_old - p > clip_low;
            "vespo" -sg[phi(w)] A l, log phi(w) = tau + k log w - tau w with w the ratio within [1e-8, e^20], and k
            and tau by the sign of A;
            "gmpo" -sA with the sequence's s = exp(mean_t d_t), where d = l - l_old is clipped before the mean: to
            at most clip_high if A > 0, to at least -clip_low if A < 0. A callable `(logprobs, batch) -> per-token loss`
            is differentiated by autograd (see `policy_loss`); `Objective.token_local` is for functions of single
            tokens.
        ratio: "token"; "sequence" for one ratio s = exp(mean_t (l - l_old)) per sequence (GSPO); "sequence_token" for
            sg[s] e^(l - sg[l]), whose value is s and whose gradient is the token's own (GSPO-token);
            "sequence_product" for the constant exp(sum_t (l - l_old)), only for "vespo".
        clip_low, clip_high: distances of the bounds from 1, >= 0. `clip_low` may exceed 1 (R1 used 10), and with
            "cispo" `clip_high` may be negative, >= -clip_low and >= -1: the upper bound is any number >= 0. They bound
            p - p_old with "dppo_tv" and "ipo", the KL divergence with "dppo_kl", and log r with "gmpo"; "sapo", "vespo"
            and "reinforce" do not use them.
        ratio_cap: > 0. "clip": two-sided ("dual") clip -min(min(r, ratio_cap) A, clip(r, ...) A), which limits the
            ratio if A < 0; a cap below 1 + clip_high limits it if A > 0, and 1 + clip_high if A < 0. "dppo_tv",
            "dppo_kl": the largest weight of a token. None: no cap.
        tau_pos, tau_neg: for A > 0 and for A <= 0: SAPO temperatures and decays of VESPO, > 0; weights of (log r)^2 of
            IPO, >= 0.
        power_pos, power_neg: exponents k of VESPO, >= 0.
        kl: estimator of KL(pi || ref) on sampled tokens, with d = l_ref - l: "k1" -d, "k2" d^2/2,
            "k3" e^d - d - 1. In the loss, k1 has expected gradient 0 (it regularises nothing), k2 has the
            gradient of KL(pi || ref), and k3 has the gradient of KL(ref || pi).
        kl_coef: weight of the KL term, >= 0. If it is not 0, the loss needs `ref_logprobs`.
        kl_ratio: multiply the KL term by the ratio, before any bound, and let the gradient flow through both
            (DeepSeek-V3.2, arXiv 2512.02556, eq. 7; TRL's `use_bias_correction_kl`). With the token's ratio, r k1 and
            r k3 are unbiased for KL(pi || ref) and its gradient when samples come from the old policy.
        entropy_coef: weight of the entropy bonus, which is a mean of entropies under every aggregate: over the tokens
            with "token_mean", else over sequences of the mean over their tokens. If it is not 0, the loss needs the
            entropy.
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
    power_pos: float = 2.0
    power_neg: float = 3.0
    kl: str = "k3"
    kl_coef: float = 0.0
    kl_ratio: bool = False
    entropy_coef: float = 0.0
    aggregate: str = "sequence_mean"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.surrogate):
            self._check_choice("surrogate", SURROGATES)
        self._check_choice("ratio", RATIOS)
        self._check_choice("kl", KL_ESTIMATORS)
        self._check_choice("aggregate", AGGREGATES)
        for field in ("clip_low", "power_pos", "power_neg", "kl_coef"):
            self._check_number(field, minimum=0.0)
        self._check_number("clip_high", minimum=-min(1.0, self.clip_low) if self.surrogate == "cispo" else 0.0)
        self._check_number("entropy_coef")
        for field in ("tau_pos", "tau_neg"):
            self._check_number(field, minimum=0.0, strict=self.surrogate != "ipo")
        if self.ratio_cap is not None:
            if self.surrogate not in CAPPED:
                raise ValueError(f"ratio_cap is {self.ratio_cap!r} with surrogate {self.surrogate!r}, "
                                 f"expected None: only {', '.join(CAPPED)} have a cap")
            self._check_number("ratio_cap", minimum=0.0, strict=True)
        self._check_ratio()
        if self.aggregate == "constant":
            if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
                raise ValueError(f"max_length is {self.max_length!r}, expected a positive integer with aggregate "
                                 "'constant'")
        elif self.max_length is not None:
            raise ValueError(f"max_length is {self.max_length!r} with aggregate {self.aggregate!r}, expected None: "
                             "only 'constant' uses it")

    def _check_ratio(self) -> None:
        unused = callable(self.surrogate) or self.surrogate == "reinforce"
        if self.ratio != "token" and (unused or self.surrogate in ("dppo_tv", "dppo_kl", "ipo")):
            why = "which does not use this ratio" if unused else "which compares the probabilities of a token"
            raise ValueError(f"ratio is {self.ratio!r} with surrogate {self.surrogate!r}, {why}; expected 'token'")
        if (self.ratio == "sequence_product") != (self.surrogate == "vespo"):
            expected = "'sequence_product'" if self.surrogate == "vespo" else "another one: only 'vespo' uses it"
            raise ValueError(f"ratio is {self.ratio!r} with surrogate {self.surrogate!r}, expected {expected}")
        if self.surrogate == "gmpo" and self.ratio != "sequence":
            raise ValueError(f"ratio is {self.ratio!r} with surrogate 'gmpo', expected 'sequence': it is "
                             "a mean over the sequence")
        if not isinstance(self.kl_ratio, bool):
            raise ValueError(f"kl_ratio is {self.kl_ratio!r}, expected True or False")
        if self.kl_ratio and self.surrogate == "gmpo":
            raise ValueError("kl_ratio is True with surrogate 'gmpo', expected False: its ratio is clipped")
        if self.kl_ratio and self.ratio == "sequence_product":
            raise ValueError("kl_ratio is True with ratio 'sequence_product', expected False: a product over a "
                             "sequence is no weight of one token's KL")

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

    @staticmethod
    def token_local(function: Callable[..., Any], **overrides: Any) -> Objective:
        r"""An objective from a function of single tokens, which costs no more than a preset does.

            loss = sum_t w_t (iw_t f(l_t, H_t, tokens_t) + kl_coef kl_t - entropy_coef H_t)

        From hidden states, the gradient is computed in the same walk as the log-probs, and tokens whose derivative is
        exactly 0 cost no backward products (with `kl_coef` and `entropy_coef` 0). A callable of the whole batch, given
        as `surrogate`, needs a second walk.

        Args:
            function: `(logprobs, entropies, tokens) -> loss`, all of shape (n,), for any n tokens at a time: those of
                one chunk, or all. autograd differentiates it with respect to logprobs and entropies (nats, float32;
                float64 for float64 inputs; entropies are None if `policy_loss` gets none). `tokens` is a `PolicyBatch`
                of constants with one value per token: `advantages`, `old_logprobs`, `ref_logprobs`,
                `importance_weights`; what the caller did not give is None. The loss of a token must depend on nothing
                but that token: `r1kernels.testing.check_token_local` finds functions that mix tokens. The function is
                called several times (for gradients and for metrics, of chunks and of all tokens), and must return the
                same each time. Values behind the mask are 0.
            **overrides: `kl`, `kl_coef`, `kl_ratio`, `entropy_coef`, `aggregate` ("token_mean" by default) and
                `max_length` of `Objective`; no other field has an effect here.

        `importance_weights` multiply all that the function returns, also a KL term in it. The term of `kl_coef` is not
        multiplied: use that field, or divide by `tokens.importance_weights`, if the correction shall not weigh the KL.

        Raises:
            TypeError: function is not callable.
            ValueError: as `Objective`, or a field without effect. When the loss is computed, ValueError: the function
                returns no floating-point tensor of shape (n,) or one without a gradient, changes its inputs in place,
                or, on CPUs, its loss or derivative is NaN. The metric `nonfinite_tokens` counts what is inf, and on
                GPUs also NaN (compiled, that of the loss alone).

        Equivalent to: `Objective(surrogate=lambda logprobs, batch: function(logprobs, batch.entropy, batch), ...)`.
        """
        if not callable(function):
            raise TypeError(f"function is {function!r}, expected a callable (logprobs, entropies, tokens)")
        for field, value in overrides.items():
            if field in _FIELDS and field not in _FIELDS_OF_ANY:
                raise ValueError(f"Objective.token_local: {field} is {value!r}, which nothing would use, because the "
                                 f"function is the surrogate; expected only {', '.join(_FIELDS_OF_ANY)}")
        return _with_overrides("Objective.token_local", overrides, surrogate=TokenLocal(function),
                               aggregate="token_mean")

    @property
    def is_token_local(self) -> bool:
        """Whether the surrogate is a function given to `token_local`."""
        return isinstance(self.surrogate, TokenLocal)

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels know the surrogate. They do not know callables; and in "gmpo" the ratio of a sequence has
        a gradient at some of its tokens only, while kernels give all tokens of a sequence the same share. Plain PyTorch
        computes these on [tokens], on any device."""
        return not callable(self.surrogate) and self.surrogate != "gmpo"

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss depends on where sequences begin and end."""
        return self.ratio != "token" or self.aggregate != "token_mean"

    @property
    def zero_without_advantage(self) -> bool:
        """Whether a token of advantage 0 has loss 0 and no gradient."""
        return self.kl_coef == 0 and self.entropy_coef == 0 and self.surrogate != "ipo"


_FIELDS = tuple(field.name for field in dataclasses.fields(Objective))
_FIELDS_OF_ANY = ("kl", "kl_coef", "kl_ratio", "entropy_coef", "aggregate", "max_length")  # whatever the surrogate


class OverridesWithoutLength(TypedDict, total=False):
    """The fields of `Objective`, but not `max_length`, as keywords of a preset."""

    surrogate: str | Callable[..., Any]
    ratio: str
    clip_low: float
    clip_high: float
    ratio_cap: float | None
    tau_pos: float
    tau_neg: float
    power_pos: float
    power_neg: float
    kl: str
    kl_coef: float
    kl_ratio: bool
    entropy_coef: float
    aggregate: str


class Overrides(OverridesWithoutLength, total=False):
    """The fields of `Objective`, as keywords of a preset."""

    max_length: int | None


def _with_overrides(name: str, overrides: Mapping[str, Any], **defaults: Any) -> Objective:
    for field in overrides:
        if field not in _FIELDS:
            raise ValueError(f"{name}: unknown field {field!r}, expected one of {', '.join(_FIELDS)}")
    return Objective(**{**defaults, **overrides})


def _preset(name: str, overrides: Mapping[str, Any], **defaults: Any) -> Objective:
    return _with_overrides(f"objectives.{name}", overrides, **defaults)


def grpo(**overrides: Unpack[Overrides]) -> Objective:
    """GRPO: token ratio, clip 0.2, mean over sequences of the mean over tokens (arXiv 2402.03300, eq. 3).

    DeepSeekMath used `kl_coef=0.04`; the default here is 0, as in most trainers today.
    """
    return _preset("grpo", overrides)


def r1(**overrides: Unpack[Overrides]) -> Objective:
    """DeepSeek-R1: GRPO with clip 10 and `kl_coef=0.001` (arXiv 2501.12948 v2).

    The paper prints a sequence-level ratio without 1/|o|. Like every implementation, this preset uses the token ratio
    and the 1/|o| of DeepSeekMath. At clip 10 the lower bound is -9, so it never takes effect.
    """
    return _preset("r1", overrides, clip_low=10.0, clip_high=10.0, kl_coef=0.001)


def bnpo(**overrides: Unpack[Overrides]) -> Objective:
    """GRPO averaged over the tokens of the batch (TRL's "bnpo")."""
    return _preset("bnpo", overrides, aggregate="token_mean")


def dr_grpo(max_length: int, **overrides: Unpack[OverridesWithoutLength]) -> Objective:
    """Dr. GRPO: sum over tokens / (sequences * max_length), no length bias (arXiv 2503.20783)."""
    return _preset("dr_grpo", overrides, aggregate="constant", max_length=max_length)


def dapo(**overrides: Unpack[Overrides]) -> Objective:
    """DAPO: clip-higher (0.2, 0.28) and token mean (arXiv 2503.14476).

    Its overlong filter is a matter of the `mask`: set it to False for all tokens of a truncated sequence. They then
    count neither in the loss nor in the number of tokens.
    """
    return _preset("dapo", overrides, clip_low=0.2, clip_high=0.28, aggregate="token_mean")


def gspo(**overrides: Unpack[Overrides]) -> Objective:
    """GSPO: one ratio per sequence, clip (3e-4, 4e-4) (arXiv 2507.18071)."""
    return _preset("gspo", overrides, ratio="sequence", clip_low=3e-4, clip_high=4e-4)


def gspo_token(**overrides: Unpack[Overrides]) -> Objective:
    """GSPO-token: the value of GSPO's ratio, sg[s] e^(l - sg[l]), with token advantages (arXiv 2507.18071, eq. 13).

    With one advantage per sequence, the gradient is that of `gspo`.
    """
    return _preset("gspo_token", overrides, ratio="sequence_token", clip_low=3e-4, clip_high=4e-4)


def gmpo(**overrides: Unpack[Overrides]) -> Objective:
    """GMPO: the geometric mean of the token ratios, each clipped beforehand to e^-0.4 .. e^0.4 (arXiv 2507.20673).

    A token is clipped only in the direction of its advantage. The definition is that of the paper, of verl's "geo_mean"
    and of TRL's `GMPOTrainer`; `clip_low` and `clip_high` are their bounds of log r. With advantages of tokens, each
    token has its own sign and weight, where verl takes their mean. `importance_weights` multiply the loss; verl takes
    the geometric mean of those of tokens.
    """
    return _preset("gmpo", overrides, surrogate="gmpo", ratio="sequence", clip_low=0.4, clip_high=0.4)


def luspo(**overrides: Unpack[Overrides]) -> Objective:
    """LUSPO: GSPO with each sequence's loss multiplied by its length (arXiv 2602.05261).

    This is the sum over tokens / the number of sequences: `aggregate="constant"` with `max_length=1`.
    """
    return _preset("luspo", overrides, ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="constant",
                   max_length=1)


def cispo(**overrides: Unpack[Overrides]) -> Objective:
    """CISPO: the clipped ratio is a constant weight of the log-prob (arXiv 2506.13585).

    The bound is 1 + clip_high = 5; TRL's `epsilon_high` is that absolute bound, so its 0.2 is `clip_high=-0.8`. The
    lower bound is 1 - clip_low = 0, which never holds.
    """
    return _preset("cispo", overrides, surrogate="cispo", clip_low=1.0, clip_high=4.0, aggregate="token_mean")


def sapo(**overrides: Unpack[Overrides]) -> Objective:
    """SAPO: a sigmoid gate instead of a clip (arXiv 2511.20347)."""
    return _preset("sapo", overrides, surrogate="sapo")


def dppo(divergence: str = "tv", **overrides: Unpack[Overrides]) -> Objective:
    """DPPO: a trust region of probabilities instead of ratios, token mean (arXiv 2602.04879).

    -sg[min(r, 20)] A l, and 0 for tokens that have moved too far in the direction of A. `divergence` is "tv", by
    abs(p - p_old) with the bound 0.15, or "kl", by KL(Bernoulli(p_old) || Bernoulli(p)) with the bound 0.05.
    `clip_high` is the bound if A > 0, `clip_low` if A < 0. Bounds and cap are those of verl (examples/dppo_trainer, and
    `clip_ratio_c` of its "dppo_tv"); prime-rl had bounds of 0.2.
    """
    bounds = {"tv": 0.15, "kl": 0.05}
    if divergence not in bounds:
        raise ValueError(f"objectives.dppo: divergence is {divergence!r}, expected one of {', '.join(bounds)}")
    bound = bounds[divergence]
    return _preset("dppo", overrides, surrogate=f"dppo_{divergence}", clip_low=bound, clip_high=bound, ratio_cap=20.0,
                   aggregate="token_mean")


def ipo(**overrides: Unpack[Overrides]) -> Objective:
    """IPO of prime-rl: -rA without the tokens whose probability moved by more than 0.1, + 0.001 (log r)^2, token mean.

    The bound holds in both directions, whatever the sign of A. `tau_pos` and `tau_neg` weigh (log r)^2, of which every
    counted token has a gradient. 0.1 and 0.001 are the defaults of the `IPOLossConfig` that has `kl_tau`; later
    releases have a bound of 0.3 and no (log r)^2: `ipo(clip_low=0.3, clip_high=0.3, tau_pos=0.0, tau_neg=0.0)`.
    """
    return _preset("ipo", overrides, surrogate="ipo", clip_low=0.1, clip_high=0.1, tau_pos=1e-3, tau_neg=1e-3,
                   aggregate="token_mean")


def vespo(**overrides: Unpack[Overrides]) -> Objective:
    """VESPO: a smooth constant weight phi(w) of the log-prob, w = prod_t r_t, token mean (arXiv 2602.10693).

    log phi(w) = tau + k log w - tau w, so that phi(1) = 1; (k, tau) is (2, 3) if A > 0 and (3, 2) if A < 0.
    `importance_weights` multiply the loss; TRL multiplies w by them instead.
    """
    return _preset("vespo", overrides, surrogate="vespo", ratio="sequence_product", tau_pos=3.0, tau_neg=2.0,
                   aggregate="token_mean")


def reinforce(**overrides: Unpack[Overrides]) -> Objective:
    """REINFORCE: -A l, token mean, no ratio."""
    return _preset("reinforce", overrides, surrogate="reinforce", aggregate="token_mean")
