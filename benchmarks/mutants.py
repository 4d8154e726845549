"""The mutants of `mutation.py`: one wrong formula each, and the tests that should notice it."""

from __future__ import annotations

from typing import NamedTuple

from mutants_training import TRAINING


class Mutant(NamedTuple):
    """`old` is once in `file`, and `new` takes its place."""

    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def backend(self) -> str:
        kinds = {"r1kernels/triton/": "triton", "r1kernels/train/": "train"}
        return next((kind for folder, kind in kinds.items() if self.file.startswith(folder)), "cpu")


Change = tuple[str, str, str]  # old, new, what it is


def of_file(file: str, tests: tuple[str, ...], *changes: Change) -> list[Mutant]:
    return [Mutant(file, old, new, what, tests) for old, new, what in changes]


ANY_LOGITS, ANY_LOSSES, ANY_HEAD = (
    f"tests/hardening/test_any_{name}.py" for name in ("logits", "losses", "head")
)
POLICY = (f"{ANY_LOSSES}::test_policy_loss", "tests/losses/test_policy_loss_edges.py",
          "tests/losses/test_policy_loss.py")
STATISTICS = (f"{ANY_LOGITS}::test_log_probs_and_entropy", f"{ANY_LOGITS}::test_all_statistics",
              f"{ANY_HEAD}::test_log_probs_and_entropy", "tests/kernels/test_token_stats.py",
              "tests/kernels/test_token_stats_edges.py")
DIVERGENCE = (f"{ANY_LOGITS}::test_distillation", "tests/kernels/test_divergence.py",
              "tests/losses/test_distillation_loss.py")
# In Triton's interpreter, any input takes minutes; these take seconds and find most.
TRITON_STATISTICS = ("tests/kernels/test_token_stats.py::test_values_and_gradients",
                     "tests/kernels/test_token_stats.py::test_a_common_offset_costs_no_gradient",
                     "tests/kernels/test_token_statistics.py::test_values_and_gradients",
                     "tests/kernels/test_shifted_gradient.py", *STATISTICS)
TRITON_DIVERGENCE = ("tests/kernels/test_divergence.py::test_values_and_gradients", *DIVERGENCE)
ADVANTAGES = (f"{ANY_LOSSES}::test_group_advantages", "tests/losses/test_group_advantages.py")
REWARDS = (f"{ANY_LOSSES}::test_several_rewards_and_the_best_of_k", "tests/losses/test_reward_combinations.py")

MUTANTS: list[Mutant] = [
    *of_file(
        "r1kernels/ops/policy_loss_reference.py", POLICY,
        ("clipped_high = (advantages > 0) & (ratio > up)", "clipped_high = (advantages > 0) & (ratio >= up)",
         "the gradient stops on the upper bound"),
        ("clipped_low = (advantages < 0) & (ratio < low)", "clipped_low = (advantages > 0) & (ratio < low)",
         "the lower bound holds for the other sign of the advantage"),
        ("variable(1 + objective.clip_high), variable(1 - objective.clip_low)\n    largest",
         "variable(1 + objective.clip_low), variable(1 - objective.clip_high)\n    largest", "bounds swapped"),
        ("capped = (advantages < 0) & (ratio > down)", "capped = (advantages > 0) & (ratio > down)",
         "the cap of the two-sided clip holds for the other sign"),
        ("gate = torch.sigmoid(tau * (log_ratio.clamp(max=80).exp() - 1))",
         "gate = torch.sigmoid(tau * log_ratio.clamp(max=80).exp())", "SAPO's gate without - 1"),
        ("-4 / tau * gate * advantages", "-4 * gate * advantages", "SAPO without 1 / tau"),
        ("tau * pulled.square() - gain", "tau * pulled.square() + gain", "IPO's gain with the other sign"),
        ("(tau + power * log_w - tau * log_w.exp()).exp()", "(tau + power * log_w - log_w.exp()).exp()",
         "VESPO's weight without tau in the last term"),
        ("of_rest = torch.where(rest_old <= 0, 0, rest_old * (rest_old.log() - rest.log()))",
         "of_rest = torch.where(rest_old <= 0, 0, rest_old * (rest.log() - rest_old.log()))",
         "binary KL with its second term reversed"),
        ("per_token = per_token - objective.entropy_coef * entropy",
         "per_token = per_token + objective.entropy_coef * entropy", "the entropy bonus is a penalty"),
        ("per_token = per_token + objective.kl_coef * kl", "per_token = per_token - objective.kl_coef * kl",
         "the KL penalty is a bonus"),
        ("mean = (sequences.sum(log_ratio) / sequences.lengths(counts))[sequences.index]",
         "mean = sequences.sum(log_ratio)[sequences.index]", "the sequence's ratio is a product, not a mean"),
        ("denominator = sequences.whole(counts.sum()).clamp(min=1) if", "denominator = counts.numel() if",
         "the token mean divides by masked tokens too"),
        ("number * float(objective.max_length or 1) if", "float(objective.max_length or 1) if",
         "the constant aggregate without the number of sequences"),
        ("return self.whole(per_token.new_zeros(self.count).index_add(0, self.index, per_token))",
         "return self.whole(per_token.new_ones(self.count).index_add(0, self.index, per_token))",
         "sums of sequences start at 1"),
        ("advantages = torch.where(importance == 0, 0, advantages)", "advantages = torch.where(importance < 0, 0, "
         "advantages)", "a weight of 0 meets a ratio that overflowed"),
    ),
    *of_file(
        "r1kernels/ops/kl_estimate.py", (f"{ANY_LOSSES}::test_kl_estimate", "tests/losses/test_kl_estimate.py"),
        ("return d.square() / 2", "return d.square()", "k2 without 1/2"),
        ("    d = ref_logprobs - logprobs\n    if", "    d = logprobs - ref_logprobs\n    if",
         "the KL of the other direction"),
        ("exact = torch.expm1(far) - far", "exact = torch.expm1(far) + far", "k3 with + d"),
        ("for n in range(order - 1, 1, -1):", "for n in range(order - 1, 2, -1):", "the series of k3 ends too early"),
        ("return grad_logprobs, -grad_logprobs, None, None", "return grad_logprobs, grad_logprobs, None, None",
         "the reference's gradient has the wrong sign"),
    ),
    *of_file(
        "r1kernels/ops/token_stats.py", STATISTICS,
        ("return x / _row_temperatures(x, rows, temperature, temperatures)", "return x", "statistics without 1 / T"),
        ("grad = grad - eta[source, None] * p * (finite_log_p + entropy[source, None].to(x.dtype))",
         "grad = grad - eta[source, None] * p * finite_log_p", "the entropy's gradient without H"),
        ("        grad = grad / t\n        if softcap", "        if softcap", "the gradient without 1 / T"),
        ("            grad = grad * (1 - (x / softcap).square())\n        active", "            pass\n        active",
         "the gradient without the soft cap's slope"),
    ),
    *of_file(
        "r1kernels/ops/target_terms.py",
        (f"{ANY_LOGITS}::test_cross_entropy", f"{ANY_HEAD}::test_cross_entropy", f"{ANY_HEAD}::test_several_targets",
         "tests/losses/test_target_terms.py"),
        ("g = -total * (1 + 2 * self.z_loss_coef * lse)", "g = -total * (1 + self.z_loss_coef * lse)",
         "the z-loss's gradient without 2"),
        ("pulls = (1 - self.label_smoothing) * pulls", "pulls = 1 * pulls", "the target keeps its whole weight"),
        ("(total * (-self.label_smoothing / vocab))", "(total * (self.label_smoothing / vocab))",
         "the smoothed part with the wrong sign"),
        ("smooth = lse - mean.double()[:, None]", "smooth = lse + mean.double()[:, None]", "smoothing with + mean"),
        ("grads[:, None, :], 0).sum(-1)", "grads[:, :, None], 0).sum(-1)", "equal targets counted by themselves"),
    ),
    *of_file(
        "r1kernels/ops/linear/head.py", (f"{ANY_HEAD}::test_log_probs_and_entropy", f"{ANY_HEAD}::test_grpo_loss"),
        ("return self.temperature if self.softcap > 0 else self.temperature / self.logit_scale",
         "return self.temperature / self.logit_scale", "the logit scale counts twice with a soft cap"),
        ("return self.logit_scale if self.softcap > 0 else 1.0", "return 1.0", "the scale is missing in the gradient"),
    ),
    *of_file(
        "r1kernels/ops/linear/passes.py",
        (f"{ANY_HEAD}::test_log_probs_and_entropy", f"{ANY_HEAD}::test_grpo_loss",
         "tests/linear/test_linear_compaction.py"),
        ("active = g != 0 if eta is None else (g != 0) | (eta != 0)",
         "active = g != 0 if eta is None else (g != 0) & (eta != 0)", "rows with one of two gradients are skipped"),
    ),
    *of_file(
        "r1kernels/ops/group_advantages.py", ADVANTAGES,
        ("centred = centred * (n / (n - 1).clamp(min=1))[groups]", "centred = centred * 1",
         "leave-one-out is the mean of all"),
        ("centred = centred / (std[groups] + eps)", "centred = centred / std[groups].clamp(min=eps)",
         "eps is a bound and not added"),
        ("weighted / torch.where(total > 0, total, 1))", "weighted / total.clamp(min=1))",
         "OPO's baseline divides by at least 1"),
    ),
    *of_file(
        "r1kernels/ops/pass_at_k_advantages.py", REWARDS,
        ("chance = (_choose(rank - 1, k - 1) - _choose(n, k)).exp()", "chance = (_choose(rank, k - 1) - "
         "_choose(n, k)).exp()", "the rank of the best answer is off by one"),
        ("with_it = _choose(n - 1, k - 1)", "with_it = _choose(n, k - 1)", "subsets of n instead of n - 1 answers"),
        ("std = expected((r - mean).square()).sqrt()", "std = expected((r - mean).square())", "variance, not std"),
    ),
    *of_file(
        "r1kernels/ops/multi_reward_advantages.py", REWARDS,
        ("total += factor * reference(column, group_ids", "total += reference(column, group_ids",
         "the weights of rewards are ignored"),
        ("result = reference(total, None, max(len(total), 1), \"group_std\", ddof, eps)", "result = total",
         "no normalisation over the batch"),
    ),
    *of_file(
        "r1kernels/ops/importance_weights.py",
        (f"{ANY_LOSSES}::test_importance_weights", "tests/losses/test_importance_weights.py"),
        ("gap = torch.where(counts & (old != sampler), old - sampler, 0)",
         "gap = torch.where(counts & (old != sampler), sampler - old, 0)", "the inverse weight"),
        ("inside = (weights >= floor) & (weights <= cap) & ~broken", "inside = (weights >= floor) & (weights < cap) & "
         "~broken", "the cap itself is cut"),
        ("* sums.counted  # quotients", "* sums.tokens  # quotients", "the mean weight over tokens, not sequences"),
        ("lengths.clamp(min=1) if level == \"sequence_mean\" else 1", "1", "the geometric mean is a product"),
    ),
    *of_file(
        "r1kernels/ops/divergence.py", DIVERGENCE,
        ("return beta * of_teacher + (1 - beta) * of_student", "return (1 - beta) * of_teacher + beta * of_student",
         "JSD's weights swapped"),
        ("return (1 - beta if kind == \"jsd\" else 1) * weights", "return weights", "JSD's gradient without 1 - beta"),
        ("p * (log_ratio - torch.where(infinite, 0, inner))", "p * log_ratio", "the gradient without its mean"),
        ("        return p - log_q.exp()\n", "        return log_q.exp() - p\n", "forward KL's gradient reversed"),
    ),
    *of_file(
        "r1kernels/ops/topk_divergence.py",
        (f"{ANY_LOGITS}::test_distillation", f"{ANY_HEAD}::test_distillation", "tests/losses/test_distillation_loss.py",
         "tests/losses/test_student_topk.py"),
        ("lse = torch.logaddexp(lse_rest, z_top.logsumexp(-1))", "lse = z_top.logsumexp(-1)",
         "the student's tail is missing in the normaliser"),
        ("top = weights[:, :-1] / temperature", "top = weights[:, :-1]", "listed tokens' gradient without 1 / T"),
        ("within = torch.where(empty, 0, log_p_rest.exp() * entropy_rest)", "within = 0 * entropy_rest",
         "the entropy without that of the tail"),
    ),
    *of_file(
        "r1kernels/ops/token_filters.py", ("tests/losses/test_token_filters.py",),
        ("kept = values >= ordered.gather", "kept = values > ordered.gather", "tokens at the quantile are dropped"),
        ("place = (1 - top) * (", "place = top * (", "the share of tokens that is kept is 1 - top"),
        ("gap = (old_logprobs.detach().double() - logprobs.detach().double())",
         "gap = (logprobs.detach().double() - old_logprobs.detach().double())", "the divergence has the other sign"),
        ("covariance * (value - total / n.clamp(min=1))", "covariance * value", "the covariance without means"),
        ("(share * n).floor().clamp(min=1)", "(share * n).ceil().clamp(min=1)", "the number of tokens is rounded up"),
    ),
    *of_file(
        "r1kernels/ops/global_normalizer.py", ("tests/losses/test_global_normalizer.py",),
        ("number * (objective.max_length or 1), dtype", "number, dtype", "the normaliser ignores max_length"),
        ("for value in masks]).sum()", "for value in masks]).max()", "only the largest micro-batch counts"),
    ),
    *of_file(
        "r1kernels/ops/teacher_mixture.py",
        ("tests/linear/test_several_teachers.py", "tests/losses/test_distillation_loss.py"),
        ("(weight.log() - lse) * temperature", "weight.log() - lse * temperature", "the weights of teachers without T"),
        ("return result.mul_(temperature)", "return result", "the mixture's logits are divided by T twice"),
    ),
    *of_file(
        "r1kernels/ops/token_local.py", ("tests/linear/test_linear_token_local.py", "tests/losses/test_token_local.py"),
        ("loss = loss - objective.entropy_coef * h", "loss = loss + objective.entropy_coef * h",
         "the entropy bonus is a penalty"),
        ("loss = loss * importance", "loss = loss * 1", "importance weights are not used"),
    ),
    *of_file(
        "r1kernels/ops/linear/sums.py",
        ("tests/linear/test_linear_precision.py", "tests/linear/test_linear_multi_target.py"),
        ("                add_rows(self._weight, column, factors, hidden)", "                pass",
         "the rounding errors of the tokens' entries stay in the gradient of the weight"),
        ("lost = torch.where(is_repeated(ids), 0, lost)", "lost = lost * 1", "equal targets add their rounding twice"),
    ),
    *of_file(
        "csrc/common/objective.h", POLICY,
        ("if (ratio > bound) return {-bound * advantage, 0, false, true, false};",
         "if (ratio >= bound) return {-bound * advantage, 0, false, true, false};", "no gradient on the upper bound"),
        ("const float bound = cap < high ? high : cap;", "const float bound = cap;",
         "a cap below the upper bound holds for negative advantages"),
        ("const float weight = (clipped_high ? high : clipped_low ? low : ratio) * advantage;",
         "const float weight = (clipped_high ? high : ratio) * advantage;", "CISPO without its lower bound"),
        ("return {-4.0f / tau * sigma * advantage, -4.0f * bump * advantage, false, false, false};",
         "return {-4.0f / tau * sigma * advantage, -4.0f / tau * bump * advantage, false, false, false};",
         "SAPO's slope with 1 / tau"),
        ("2.0f * pull - gain", "pull - gain", "IPO's slope without 2"),
        ("tau + power * log_w - tau * std::exp(log_w)", "tau + power * log_w + tau * std::exp(log_w)",
         "VESPO's weight grows with the ratio"),
        ("return {0.5f * d * d, -d};", "return {0.5f * d * d, d};", "k2's slope has the wrong sign"),
        ("d * (0.5f * d - 1.0f)", "d * (0.5f * d + 1.0f)", "the slope of ratio times k2"),
    ),
    *of_file(
        "csrc/common/policy_terms.h", POLICY,
        ("loss -= static_cast<double>(objective.entropy_coef) * token.entropy;",
         "loss += static_cast<double>(objective.entropy_coef) * token.entropy;", "the entropy bonus is a penalty"),
        ("sums.active += gradient.g != 0 || gradient.eta != 0;", "sums.active += gradient.g != 0;",
         "tokens with an entropy gradient alone are not active"),
        ("slope += kl_slope;", "", "the KL term has no gradient"),
    ),
    *of_file(
        "csrc/cpu/policy_loss.cpp", POLICY,
        ("shared_slope, slope_sum / length);", "shared_slope, slope_sum);", "a sequence's slope is not averaged"),
        ("args.mask[token]; }", "!args.mask[token]; }", "the mask is inverted"),
    ),
    *of_file(
        "csrc/cpu/group_advantages.cpp", ADVANTAGES,
        ("std::sqrt(squares / static_cast<double>(count - ddof))", "std::sqrt(squares / static_cast<double>(count))",
         "ddof is ignored"),
        # Without `if (low == high)` nothing changes: sums of equal float32 numbers are exact in float64.
        ("std::isnan(centred) || centred == 0;", "std::isnan(centred);", "a constant group without eps is 0 times inf"),
        ("sum / static_cast<double>(count);", "sum / static_cast<double>(end - begin);",
         "the mean counts answers without a score"),
    ),
    *of_file(
        "csrc/cpu/token_stats.cpp", STATISTICS,
        ("const double logprob = (target - state.max) * inv_temperature - log_sum;",
         "const double logprob = (target - state.max) - log_sum;", "the token's logit without 1 / T"),
        ("grad -= in.eta * std::exp(logprob) * (logprob + in.entropy);",
         "grad -= in.eta * std::exp(logprob) * logprob;",
         "the token's entropy gradient without H"),
        ("two_zeta_ = broadcast(canonical(2 * in.zeta * inv_temperature));",
         "two_zeta_ = broadcast(canonical(in.zeta * inv_temperature));", "the slope of the sum of squares without 2"),
        ("return (1.0f - tanh) * (1.0f + tanh);", "return 1.0f - tanh;", "the soft cap's slope without 1 + tanh"),
    ),
    *of_file(
        "csrc/cpu/divergence.cpp", DIVERGENCE,
        ("grad = g_ * (entry.q_is_big ? -difference : difference);", "grad = g_ * difference;",
         "forward KL's gradient has one sign"),
        ("args.beta * sums.teacher + (1 - args.beta) * args.inner[n]", "args.beta * sums.teacher + args.inner[n]",
         "JSD without 1 - beta"),
    ),
    *of_file(
        "r1kernels/triton/objective.py", POLICY,
        ("high = up & (ratio > up_bound)", "high = up & (ratio > low_bound)", "the lower bound in the upper's place"),
        ("capped = down & ~low & (ratio > down_bound)", "capped = down & (ratio > down_bound) & False",
         "the two-sided clip has no cap"),
        ("return -4.0 / tau * sigma * advantage, -4.0 * bump * advantage",
         "return -4.0 / tau * sigma * advantage, 4.0 * bump * advantage", "SAPO's slope has the wrong sign"),
        ("slope = 2.0 * pull - gain", "slope = 2.0 * pull + gain", "IPO's slope with + r A"),
        ("k3 = tl.where(small, series, (em1 - d.to(tl.float64)).to(tl.float32))",
         "k3 = tl.where(small, series, em1.to(tl.float32))", "k3 without - d"),
    ),
    *of_file(
        "r1kernels/triton/policy_loss.py", POLICY,
        ("eta = tl.where(counts, -weight * entropy_factor, 0.0)",
         "eta = tl.where(counts, weight * entropy_factor, 0.0)",
         "the entropy's gradient has the wrong sign"),
    ),
    *of_file(
        "r1kernels/triton/token_stats_backward.py", TRITON_STATISTICS,
        ("factor += minus_eta * (d * slope + offset)", "factor += minus_eta * (d * slope)",
         "the entropy's gradient without the offset"),
        ("unit = ratio * inv_t", "unit = inv_t", "p is relative to a rounded log-sum-exp"),
        ("gradient = gradient * ((1.0 - tanh) * (1.0 + tanh))", "gradient = gradient * (1.0 - tanh)",
         "the soft cap's slope without 1 + tanh"),
    ),
    *of_file(
        "r1kernels/triton/token_stats_kernels.py", TRITON_STATISTICS,
        ("rest = factor * tl.where(is_raised, rest + count, rest)", "rest = factor * rest",
         "equal maxima are lost when a larger one comes"),
        ("    if full < size:\n        x = load_tile(start, full",
         "    if full + 1 < size:\n        x = load_tile(start, full", "a last tile of one entry is skipped"),
    ),
    *of_file(
        "r1kernels/triton/divergence_math.py", TRITON_DIVERGENCE,
        ("grad = factor * tl.where(q_is_big, -difference, difference)",
         "grad = factor * tl.where(q_is_big, difference, -difference)", "forward KL's gradient reversed"),
        ("log_ratio = tl.where(q_is_big, -distance, distance)", "log_ratio = tl.where(q_is_big, distance, distance)",
         "reverse KL's log-ratio without its sign"),
    ),
    *of_file(
        "r1kernels/triton/group_advantages.py", ADVANTAGES,
        ("        if AFTER:\n            before = found <= value",
         "        if AFTER:\n            before = found < value",
         "a group ends before it begins"),
    ),
    *(mutant for file, tests, changes in TRAINING for mutant in of_file(file, tests, *changes)),
]
