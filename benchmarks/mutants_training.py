"""Mutants of the trainer and of the rewards, for `mutants.py`: file, tests, and changes (old, new, what it is)."""

from __future__ import annotations

UPDATE, LOOP = "tests/train/test_update.py", "tests/train/test_grpo.py"

TRAINING: list[tuple[str, tuple[str, ...], list[tuple[str, str, str]]]] = [
    ("r1kernels/train/update.py", (UPDATE, LOOP), [
        ("old_logprobs=tokens_of(batch.old_logprobs)", "old_logprobs=None", "the ratio is always 1"),
        ("ref_logprobs=tokens_of(batch.ref_logprobs) if", "ref_logprobs=tokens_of(batch.old_logprobs) if",
         "the KL is to the policy of the rollout, not to the reference"),
        ("importance_weights=tokens_of(batch.importance_weights), normalizer",
         "importance_weights=None, normalizer", "importance weights are not used"),
        ("mask.sum() if objective.aggregate", "mask.numel() if objective.aggregate",
         "the normaliser of the token mean counts padding"),
        ("mask, names = rollout.mask[rows], []", "mask, names = rollout.mask, []",
         "the normaliser of a minibatch is that of the whole rollout"),
        ("len(mask) * (objective.max_length or 1)", "len(mask)", "the normaliser ignores max_length"),
        ("temperature, normalizer, route)\n        names[:]",
         "temperature, normalizer / len(batches), route)\n        names[:]",
         "the gradient grows with the number of micro-batches"),
        ("normalizer=normalizer, temperature=temperature", "normalizer=normalizer, temperature=1.0",
         "the loss without the temperature of sampling"),
        ("max(max(values[\"ratio_max\"] - 1, 1 - values[\"ratio_min\"]) for", "max(values[\"ratio_max\"] - 1 for",
         "a ratio below 1 is no deviation"),
        ("values[name] * (values[\"tokens\"] / tokens)", "values[name] / len(micro)",
         "metrics are means over micro-batches, not over tokens"),
        ("r1kernels.importance_weights(trained, sampled,", "r1kernels.importance_weights(sampled, trained,",
         "the inverse importance weights"),
        ("[copies, -1:]", "[copies, -2:-1]", "the first token is scored by the state before the prompt's last token"),
    ]),
    ("r1kernels/train/grpo.py", (LOOP, "tests/train/test_lora.py"), [
        ("                       old_logprobs=old_logprobs,", "                       old_logprobs=kept.logprobs,",
         "the old log-probs are those of the sampler"),
        ("importance_weights(kept.logprobs, old_logprobs,", "importance_weights(old_logprobs, old_logprobs,",
         "importance weights are 1"),
        ("rewards[rows], settings.group_size, baseline", "rewards[: len(rows)], settings.group_size, baseline",
         "the advantages are of the first groups, not of those that are kept"),
        ("scale=settings.advantage_scale)", "scale=\"group_std\")", "the scale of advantages is always group_std"),
        ("rewards = torch.tensor(scores.total, dtype=torch.float64) + preference",
         "rewards = torch.tensor(scores.total, dtype=torch.float64)", "the rewards of reward models are not used"),
        ("total[rows] += item.weight * column[rows]", "total[rows] += column[rows]",
         "the weights of reward models are ignored"),
        ("amax(-1) <= groups", "amax(-1) < groups", "groups of equal rewards count as different"),
        ("with without_adapters(self.policy):", "with contextlib.nullcontext():", "the reference has the adapters"),
        ("self.seed, \"minibatches\", self.step, epoch", "self.seed, \"minibatches\", self.step, 0",
         "every epoch has the same minibatches"),
        ("if self.reference is not None and self.step % self.settings.ref_refresh_every == 0:",
         "if self.reference is not None:", "the reference is new after every step"),
        ("            settings.temperature, settings.limit(step), settings.top_p",
         "            1.0, settings.limit(step), settings.top_p", "sampling ignores the temperature"),
    ]),
    ("r1kernels/train/rollout.py", ("tests/train/test_rollout.py",), [
        (".log() - mass.log()", ".log()", "log-probs of samples are not normalised"),
        ("compress(drawn, active.tolist())", "compress(drawn, (active & ~torch.isin(tokens, stops)).tolist())",
         "the end token is no part of the completion"),
        ("positions[:, -1:] + 1", "positions[:, -1:]", "all sampled tokens have one position"),
        ("uniform_at(seeds[rows], step)", "uniform_at(seeds[rows], 0)", "all tokens of a row draw one random number"),
        ("end = int(self.mask[index].sum(-1).max())", "end = int(self.mask[index].sum(-1).min())",
         "rows are cut to the shortest completion"),
    ]),
    ("r1kernels/train/packing.py", ("tests/train/test_packing.py",), [
        ("place >= first", "place > first", "the first token of a response is not learned"),
        ("ids.where(learned, IGNORED).roll(-1)", "ids.where(learned, IGNORED)", "a token is its own target"),
    ]),
    ("r1kernels/train/supervised.py", ("tests/train/test_supervised.py", "tests/train/test_distill.py"), [
        ("tokens = sum(len(ids) - first for", "tokens = sum(len(ids) for", "the normaliser counts prompts"),
        ("mask=targets != IGNORED,", "mask=targets == targets,", "prompts are distilled, too"),
    ]),
    ("r1kernels/train/policy.py", ("tests/train/test_parallel.py::test_clipping_is_that_of_torch", UPDATE), [
        ("(largest / (norm + 1e-6)).clamp(max=1.0)", "(largest / (norm + 1e-6))", "small gradients are scaled up"),
        ("(value if len(batch) else 0.0 * value).backward()", "value.backward()",
         "an empty micro-batch adds the gradient of the spare one"),
    ]),
    ("r1kernels/train/reward_model.py", ("tests/train/test_reward_model.py",), [
        ("F.softplus(-margins).sum() / len(pairs)", "F.softplus(-margins).sum() / len(some)",
         "micro-batches of pairs are added up as means"),
        ("F.softplus(-margins).sum()", "F.softplus(margins).sum()", "the rejected response is preferred"),
    ]),
    ("r1kernels/train/evaluate.py", ("tests/train/test_evaluate.py",), [
        ("/ math.sqrt(len(known))", "/ math.sqrt(k * len(known))", "the standard error counts samples, not questions"),
        ("vote for vote in votes if vote is not None", "vote for vote in votes", "texts without an answer vote"),
    ]),
    ("r1kernels/train/reject.py", ("tests/train/test_filters.py", "tests/train/test_reject.py"), [
        ("and sample.accuracy != 1:", "and sample.accuracy == 0:", "samples without a score are kept"),
    ]),
    ("r1kernels/rewards/scorer.py", ("tests/rewards/test_scorer.py",), [
        ("math.fsum(weight * parts[name][index]", "math.fsum(parts[name][index]", "the weights of rewards are ignored"),
        ("if weight and applies[name][index])", "if weight)", "open problems have an accuracy"),
    ]),
    ("r1kernels/rewards/text.py", ("tests/rewards/test_text.py",), [
        ("_, end, after = completion.rpartition(THINK_END)", "_, end, after = completion.partition(THINK_END)",
         "what follows the first thought is the answer, further thoughts included"),
        ("if tags != (1, 1) or not end", "if not end", "one of several answers counts"),
        ("text.count(tag) != 1 for tag", "text.count(tag) < 1 for tag", "tags may be repeated"),
    ]),
    ("r1kernels/rewards/language.py", ("tests/rewards/test_language.py",), [
        ("word_counts((thought if end else completion)", "word_counts(completion", "the answer's words count, too"),
        ("/ total if total else 1.0", "/ total if total else 0.0", "a thought without words has no language"),
    ]),
    ("r1kernels/rewards/__init__.py", ("tests/rewards/test_rewards_api.py", "tests/rewards/test_scorer.py"), [
        ("(length - (most - buffer)) / buffer", "(length - most) / buffer", "the penalty begins at the limit"),
    ]),
    ("r1kernels/rewards/math.py", ("tests/rewards/test_math.py",), [
        ("return equal and not _is_undone(given, expected)", "return equal", "a sum that is not worked out counts"),
        ("left.remove(match)", "pass", "an item of a list may match twice"),
    ]),
    ("r1kernels/rewards/choice.py", ("tests/rewards/test_choice.py",), [
        ("_OTHER.search(rest) or _CHANGED.search(rest)", "_OTHER.search(rest)", "a letter that is taken back counts"),
    ]),
    ("r1kernels/rewards/code.py", ("tests/rewards/test_code.py",), [
        ("(defining or python or usable or [\"\"])[-1]", "(defining or python or usable or [\"\"])[0]",
         "the first program of a completion counts, not the last"),
    ]),
]
