"""Oracles in float64: the formulas of each operation's docstring in closed form.

They share no code with `r1kernels.ops`: gradients are written out instead of differentiated, and tokens are Python
floats in a loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels.objectives import Objective
from r1kernels.testing.budget import EPS32, Expected

REPEATED = ("advantages", "importance_weights")  # they have one value per token or one per sequence

# ---- vocabulary statistics --------------------------------------------------------------------------------


class TokenStats(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    log_p: Tensor  # (..., V)


def token_stats(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> TokenStats:
    """Exact log-prob and entropy: l = z_y - lse and H = log S - Q / S.

    z = logits / T, m = max z, S = sum e^(z - m), Q = sum e^(z - m) (z - m).

    Args:
        logits: (..., V), any dtype; computed in float64.
        token_ids: (...).
        temperature: T.

    Returns:
        `logprobs` and `entropy`, each (...), and `log_p`, (..., V), in float64, nats.
    """
    z = logits.detach().double() / temperature
    shifted = z - z.max(-1, keepdim=True).values
    s = shifted.exp().sum(-1, keepdim=True)
    q = torch.where(shifted == -math.inf, 0, shifted.exp() * shifted).sum(-1, keepdim=True)
    log_p = shifted - s.log()
    logprobs = log_p.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1)
    return TokenStats(logprobs, (s.log() - q / s).squeeze(-1), log_p)


def token_stats_gradient(
    logits: Tensor, token_ids: Tensor, g: Tensor, eta: Tensor | float = 0.0, temperature: float = 1.0
) -> Expected:
    """Exact gradient of logits, with its budget: dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T.

    Args:
        logits: x, (..., V), any dtype; computed in float64.
        token_ids: y, (...).
        g: dL/dl, (...).
        eta: dL/dH, (...) or one number.
        temperature: T.

    Returns:
        An `Expected` in float64, (..., V): pass it to `assert_within`.
    """
    _, entropy, log_p = token_stats(logits, token_ids, temperature)
    p, entropy = log_p.exp(), entropy.unsqueeze(-1)
    g, eta = g.double().unsqueeze(-1), torch.as_tensor(eta).double().unsqueeze(-1)
    # 1 - p of the target is computed from the other probabilities, because 1 - p cancels as p goes to 1.
    target = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, token_ids.long().unsqueeze(-1), True)
    rest = torch.where(target, 0, p).sum(-1, keepdim=True)
    finite_log_p = torch.where(p == 0, 0, log_p)
    from_logprob = g * torch.where(target, rest, -p)
    from_entropy = -eta * p * (finite_log_p + entropy)
    # log p + H cancels around p = e^-H. log p, and with it 1 - p of the target, has the error of a float64 rounding of
    # the log-sum-exp. Probabilities below the smallest normal fp32 number may become 0.
    terms = from_logprob.abs() + eta.abs() * p * (finite_log_p.abs() + entropy)
    finite = torch.where(logits.isfinite(), logits.detach().double(), 0)
    magnitude = finite.abs().max(-1, keepdim=True).values / temperature + 1
    terms += (g.abs() * target + eta.abs()) * p * 2 * magnitude * torch.finfo(torch.float64).eps / EPS32
    underflow = torch.finfo(torch.float32).tiny / EPS32 * (g.abs() + eta.abs() * (entropy + 88))
    return Expected((from_logprob + from_entropy) / temperature, (terms + underflow) / temperature)


# ---- policy loss ------------------------------------------------------------------------------------------


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else (x if math.isnan(x) else math.inf)


def _sigmoid(x: float) -> float:
    return 1 / (1 + _exp(-x))


def _product(*factors: float) -> float:
    return 0.0 if 0 in factors else math.prod(factors)


def kl_term(kind: str, d: float) -> tuple[float, float]:
    """(value, derivative with respect to l) of an estimator at d = l_ref - l, from 60 decimal digits."""
    if kind == "k1":
        return -d, 1.0
    if kind == "k2":
        return d * d / 2, -d
    if not math.isfinite(d):
        return math.inf if d == d else d, 1 - _exp(d)
    with localcontext() as context:
        context.prec = 60
        e = Decimal(d).exp()
        return float(e - Decimal(d) - 1), float(1 - e)


class _Token(NamedTuple):
    loss: float
    slope: float  # with respect to log r (clip, sapo) or to l (cispo, reinforce)
    condition: float  # relative error of loss and slope, in units of that of one rounding
    clip: str = ""  # "low", "high" or "cap"


def _surrogate(o: Objective, log_ratio: float, a: float, logp: float) -> _Token:
    r, condition = _exp(log_ratio), 2 + abs(log_ratio)
    high, low, cap = 1 + o.clip_high, 1 - o.clip_low, o.ratio_cap or math.inf
    if o.surrogate == "ipo":
        moved = _exp(logp) - _exp(logp - log_ratio)
        clip = "" if a == 0 else "high" if moved > o.clip_high else "low" if moved < -o.clip_low else ""
        gain, tau = 0 if clip else _product(r, a), o.tau_pos if a > 0 else o.tau_neg
        loss, slope = tau * log_ratio**2 - gain, 2 * tau * log_ratio - gain
        size = abs(gain) * condition + 4 * tau * abs(log_ratio) * (1 + abs(log_ratio))
        return _Token(loss, slope, size / max(min(abs(loss), abs(slope)), 1e-30), clip)
    if a == 0:
        return _Token(0, 0, 1)
    if o.surrogate == "reinforce":
        return _Token(-a * logp, -a, 1)
    if o.surrogate == "cispo":
        weight = min(max(r, low), high)
        clip = "high" if r > high else "low" if r < low else ""
        return _Token(-_product(weight, a, logp), -weight * a, condition, clip)
    if o.surrogate in ("dppo_tv", "dppo_kl"):
        p, q = _exp(logp), _exp(logp - log_ratio)
        moved = abs(p - q)
        if o.surrogate == "dppo_kl":
            moved = -_product(q, log_ratio)
            if q < 1:
                moved += (1 - q) * (math.log1p(-q) - math.log1p(-p)) if p < 1 else math.inf
        if (p - q) * a > 0 and moved > (o.clip_high if a > 0 else o.clip_low):
            return _Token(0, 0, 1, "high" if a > 0 else "low")
        return _Token(-min(r, cap) * a * logp, -min(r, cap) * a, condition, "cap" if r > cap else "")
    if o.surrogate == "vespo":
        tau, power = (o.tau_pos, o.power_pos) if a > 0 else (o.tau_neg, o.power_neg)
        log_w = min(max(log_ratio, math.log(1e-8)), 20.0)
        phi = math.exp(tau + power * log_w - tau * math.exp(log_w))
        sensitive = abs(log_w) * (power + tau * math.exp(log_w))
        return _Token(-_product(phi, a, logp), -phi * a, 3 + tau + 2 * sensitive)
    if o.surrogate == "gmpo":
        return _Token(-r * a, -r * a, condition)
    if o.surrogate == "sapo":
        tau = o.tau_pos if a > 0 else o.tau_neg
        x = tau * (r - 1)
        sigma, other = _sigmoid(x), _sigmoid(-x)
        slope = -4 * _product(sigma, other, r, a)
        return _Token(-4 / tau * sigma * a, slope, condition * (1 + tau * min(r, 100)))
    clipped = min(max(r, low), high)
    loss = -min(min(r, cap) * a, clipped * a)
    if a > 0:
        return _Token(loss, 0, 1, "high") if r > min(high, cap) else _Token(loss, -r * a, condition)
    if r < low:
        return _Token(loss, 0, 1, "low")
    return _Token(loss, 0, 1, "cap") if r > max(high, cap) else _Token(loss, -r * a, condition)


class PolicyExpected(NamedTuple):
    loss: Expected
    grad_logprobs: Expected
    grad_entropy: Expected
    metrics: dict[str, Expected]


def _sequences(inputs: dict[str, Any]) -> Iterator[list[int]]:
    """Flat token positions of each sequence."""
    logprobs, cu_seqlens = inputs["logprobs"], inputs.get("cu_seqlens")
    length = logprobs.shape[-1]
    padded = [length * s for s in range(logprobs.shape[:-1].numel() + 1)]
    for begin, end in itertools.pairwise(padded if cu_seqlens is None else cu_seqlens.tolist()):
        yield list(range(begin, end))


def policy_loss(objective: Objective, **inputs: Any) -> PolicyExpected:
    """loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t), its gradients and metrics."""
    o, shape, n = objective, inputs["logprobs"].shape, inputs["logprobs"].numel()
    sequences = list(_sequences(inputs))
    owner = {t: s for s, tokens in enumerate(sequences) for t in tokens}

    def column(name: str, default: float) -> list[float]:
        value = inputs.get(name)
        if value is None:
            return [default] * n
        flat = value.detach().double().flatten().tolist()
        packed_per_sequence = inputs.get("cu_seqlens") is not None and len(flat) == len(sequences) and name in REPEATED
        return flat if value.shape == shape and not packed_per_sequence else [flat[owner[t]] for t in range(n)]

    logp, a, iw = column("logprobs", 0), column("advantages", 0), column("importance_weights", 1)
    old, ref, entropy = column("old_logprobs", math.nan), column("ref_logprobs", math.nan), column("entropy", 0)
    counts = [m != 0 for m in column("mask", 1)]
    on_policy = inputs.get("old_logprobs") is None
    has_kl, has_entropy = inputs.get("ref_logprobs") is not None, inputs.get("entropy") is not None
    counted = [[t for t in tokens if counts[t]] for tokens in sequences]
    total = sum(map(len, counted))

    normalizer = inputs.get("normalizer")
    if normalizer is None:
        number = max(len(sequences), 1)
        normalizer = {
            "sequence_mean": number, "token_mean": max(total, 1), "constant": number * (o.max_length or 0),
        }[o.aggregate]

    g, g_terms, eta = [0.0] * n, [0.0] * n, [0.0] * n
    sums = dict.fromkeys(("loss", "surrogate_loss", "kl", "entropy", "ratio_mean", "approx_kl"), 0.0)
    terms = dict.fromkeys(sums, 0.0)
    ratios, clips = [], []

    def add(name: str, value: float, condition: float = 1.0) -> None:
        sums[name] += value
        terms[name] += abs(value) * condition

    for tokens in counted:
        weight = 1 / float(normalizer) / (len(tokens) if tokens and o.aggregate == "sequence_mean" else 1)
        # The entropy's term is a mean over tokens, or over sequences, under every aggregate.
        of_entropy = weight * ((o.max_length or 1) / max(len(tokens), 1) if o.aggregate == "constant" else 1)
        log_ratios = {t: 0.0 if on_policy else logp[t] - old[t] for t in tokens}
        held: dict[int, str] = {}
        if o.surrogate == "gmpo":
            for t in tokens:
                held[t] = ("high" if a[t] > 0 and log_ratios[t] > o.clip_high else
                           "low" if a[t] < 0 and log_ratios[t] < -o.clip_low else "")
                log_ratios[t] = {"high": o.clip_high, "low": -o.clip_low}.get(held[t], log_ratios[t])
        if o.ratio != "token":
            size = 1 if o.ratio == "sequence_product" else max(len(tokens), 1)
            log_ratios = dict.fromkeys(tokens, sum(log_ratios.values()) / size)
        shared = o.ratio == "sequence" and o.surrogate in ("clip", "sapo", "gmpo")
        slopes: dict[int, tuple[float, float]] = {}
        kl_share = 0.0  # of the KL's ratio, where it is the sequence's
        for t in tokens:
            token = _surrogate(o, log_ratios[t], a[t] if iw[t] else 0.0, logp[t])  # a weight of 0 rejects the token
            slopes[t] = (_product(iw[t], token.slope), token.condition)
            clips.append(held.get(t, token.clip))
            add("loss", weight * _product(iw[t], token.loss), token.condition)
            add("surrogate_loss", weight * _product(iw[t], token.loss), token.condition)
            ratio = _exp(log_ratios[t])
            ratios.append(Expected(torch.tensor(ratio), torch.tensor(ratio * (1 + abs(log_ratios[t])))))
            add("ratio_mean", ratio, 1 + abs(log_ratios[t]))
            distance = kl_term("k3", log_ratios[t])
            add("approx_kl", distance[0])
            terms["approx_kl"] += abs(_product(distance[1], log_ratios[t]))
            if has_kl:
                d = ref[t] - logp[t]
                value, slope = kl_term(o.kl, d)
                factor, more = (ratio, 1 + abs(log_ratios[t])) if o.kl_ratio else (1.0, 1.0)
                error = factor * abs(slope) + factor * _product(abs(d), _exp(d) + 1)
                if o.kl_ratio and o.ratio == "sequence":
                    kl_share += _product(factor, value)
                elif o.kl_ratio:
                    error += factor * abs(value)
                    slope += value
                add("kl", factor * value, 1 + more)
                terms["kl"] += abs(_product(factor, d, kl_term(o.kl, d)[1]))
                add("loss", weight * _product(o.kl_coef, factor, value), 1 + more)
                terms["loss"] += weight * abs(_product(o.kl_coef, factor, d, kl_term(o.kl, d)[1]))
                g[t] += weight * _product(o.kl_coef, factor, slope)
                g_terms[t] += weight * abs(o.kl_coef) * error * more
            if has_entropy:
                add("entropy", entropy[t])
                add("loss", -of_entropy * o.entropy_coef * entropy[t])
            eta[t] = -of_entropy * o.entropy_coef
        for t in tokens:
            given = [] if held.get(t) else slopes.values() if shared else [slopes[t]]
            g[t] += weight / len(tokens) * o.kl_coef * kl_share
            g_terms[t] += weight / len(tokens) * abs(o.kl_coef * kl_share) * (4 + abs(log_ratios[t]))
            share = weight / len(tokens) if shared else weight
            g[t] += share * sum(slope for slope, _ in given)
            g_terms[t] += share * sum(abs(slope) * condition for slope, condition in given)

    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(shape)

    def exactly(value: float) -> Expected:
        return Expected(torch.tensor(float(value), dtype=torch.float64), torch.tensor(abs(float(value))))

    def total_of(name: str, count: int = 1) -> Expected:
        return Expected(exactly(sums[name] / count).value, exactly(terms[name] / count).value)

    def mean(name: str) -> Expected:
        return total_of(name, max(total, 1))

    def fraction(kind: str) -> Expected:
        return exactly(sum(clip == kind for clip in clips) / max(total, 1))

    one, moving = exactly(1), sum(g[t] != 0 or eta[t] != 0 for tokens in counted for t in tokens)
    metrics = {
        "tokens": exactly(total),
        "sequences": exactly(len(sequences)),
        "surrogate_loss": total_of("surrogate_loss"),
        **({"kl": mean("kl")} if has_kl else {}),
        **({"entropy": mean("entropy")} if has_entropy else {}),
        "ratio_mean": mean("ratio_mean") if total else one,
        "ratio_min": min(ratios, key=lambda r: float(r.value), default=one),
        "ratio_max": max(ratios, key=lambda r: float(r.value), default=one),
        "approx_kl": mean("approx_kl"),
        "clip_fraction": exactly(sum(clip != "" for clip in clips) / max(total, 1)),
        "clip_low_fraction": fraction("low"),
        "clip_high_fraction": fraction("high"),
        "ratio_cap_fraction": fraction("cap"),
        "active_fraction": exactly(moving / max(total, 1)),
        "nonfinite_tokens": exactly(0),
    }
    return PolicyExpected(
        loss=total_of("loss"),
        grad_logprobs=Expected(tensor(g), tensor(g_terms)),
        grad_entropy=Expected(tensor(eta), tensor(eta).abs()),
        metrics=metrics,
    )
