"""Reinforcement learning as R1-Zero and R1 do it: groups of samples, rewards, GRPO.

`GRPOTrainer.train_step` is the algorithm: one rollout and the updates on it. The state is complete between any two
updates, and a checkpoint holds all of it, the rollout included. Random numbers depend only on the seed and on the
position in the run. So a resumed run equals one that was never interrupted.

The setting `advantages` can name a function that makes an object to replace group advantages. The object is called with
rewards (B,), tokens, old and reference log-probs, and returns advantages (B,) per sample or (B, T) per token, and
metrics. Its `learn(rollout, rows)` runs with each update of the policy, and returns metrics. Tensors are on the CPU,
and the same on all ranks, where the object must do the same. Checkpoints hold its `state_dict()`. See examples/ppo.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import r1kernels
from r1kernels.rewards import Scorer, Scores
from r1kernels.train import update
from r1kernels.train.checkpoint import latest_checkpoint, load_state, save_checkpoint, shards_of
from r1kernels.train.data import Problem, Template, whole_response
from r1kernels.train.errors import Interrupted, TrainingError
from r1kernels.train.evaluate import PARTS, evaluate, measured, reflective_words, score
from r1kernels.train.log import Console, StepLog
from r1kernels.train.lora import without_adapters
from r1kernels.train.packing import keeps_apart, micro_batches
from r1kernels.train.parallel import check, report_activity, shared
from r1kernels.train.policy import Policy, make_optimizer
from r1kernels.train.recipe import GRPO, PreferenceReward
from r1kernels.train.reward_model import RewardModel, judged_part
from r1kernels.train.rng import permutation, seed_at
from r1kernels.train.rollout import Collector, Completions, Sampler, Sampling, Tokens, collect
from r1kernels.train.stage import Stage
from r1kernels.train.update import Rollout, choose_route, completion_logprobs, importance_weights, optimizer_step

RATIO_TOLERANCE = 1e-2  # difference of the first ratio from 1: the same weights computed both log-probs


class GRPOTrainer:
    """Trains the model of one stage, from its last checkpoint if there is one."""

    stage: Stage
    settings: Any
    seed: int
    console: Console
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    pools: dict[str, list[Problem]]
    optimizer: torch.optim.Optimizer
    step: int
    timing: dict[str, float]
    threads: ThreadPoolExecutor
    ahead: Future[Collector] | None
    log: StepLog
    scorer: Scorer

    def __init__(self, stage: Stage) -> None:
        self.stage, self.settings, self.seed, self.console = stage, stage.settings, stage.recipe.seed, stage.console
        settings, recipe = stage.settings, stage.recipe
        self.policy, self.tokenizer, state = stage.start()
        self.apart: Any = self.policy(keeps_apart)
        self.template: Template = stage.template(self.tokenizer)
        problems = stage.problems(settings.problems)
        self.pools = {"all": problems, "checkable": [problem for problem in problems if problem.kind != "open"]}
        self.test_problems: list[Problem] = stage.problems(recipe.eval_problems, "test")
        self.sampler: Sampler = stage.sampler(settings.model, loaded=False, replay=settings.replays)
        self.reward_models: dict[str, RewardModel] = {
            item.model: RewardModel(stage.model_path(item.model), template=recipe.template, device=recipe.device,
                                    dtype=recipe.dtype)
            for item in settings.preference}
        self.objective: Any = settings.objective.build()
        self.optimizer = make_optimizer(self.policy, recipe.optimizer_state, lr=settings.learning_rate,
                                        weight_decay=0.0)
        self.reference: Policy | None = None  # with LoRA, the policy without its adapters
        if self.objective.kl_coef and not settings.lora:
            self.reference = stage.frozen(settings.model)
        self.advantages: Any | None = settings.advantages.call(self) if settings.advantages else None
        self.step, self.timing = state.get("step", 0), {"total": 0.0}  # seconds of this step
        self.rollout: Rollout | None = None
        self.threads, self.ahead = ThreadPoolExecutor(1), None  # a future: completions of the next step
        self.sampled: Completions | None = None  # what that gave
        self.metrics: dict[str, Any] = {}  # of this step, before its updates
        self.updates: list[dict[str, float]] = []  # metrics of the updates on this rollout
        if "rollout" in state:
            tensors, self.metrics, self.updates, self.timing = state["rollout"]
            self.rollout = Rollout(**tensors)
        if "sampled" in state:
            self.sampled = Completions(**state["sampled"])
        if state:
            load_state(latest_checkpoint(stage.directory), self.policy, self.optimizer, self.reference)
            if self.advantages is not None:
                self.advantages.load_state_dict(state["advantages"])

    def run(self) -> dict[str, Any]:
        """Trains to the last step; returns the stage's summary. Raises Interrupted after it wrote a checkpoint."""
        settings = self.settings
        self.log, self.scorer = StepLog(self.stage, first_step=self.step), self.stage.scorer(settings.rewards)
        with self.log, contextlib.closing(self.sampler), self.scorer:
            try:
                self.sampler.sleep() if self.rollout else self.sampler.update(self.policy)
                while self.step < settings.steps:
                    self.train_step()
                evaluation = self.evaluate()
            except Interrupted:
                self.save()
                raise
            self.log.write({"step": self.step, **measured(evaluation), "timing": self.timing})
        questions = settings.steps * settings.questions * settings.oversample
        return {"steps": settings.steps, "questions": questions, "evaluation": evaluation}

    def train_step(self) -> None:
        """A rollout, and the updates of the policy on it."""
        if self.rollout is None:  # else it comes from a checkpoint between two updates
            self.rollout, self.metrics = self.roll_out()
        self.sample_ahead()
        minibatches = [rows for epoch in range(self.settings.epochs) for rows in self.minibatches(epoch)]
        with self.timed("updates"):
            while len(self.updates) < len(minibatches):
                check(self.stage.interrupt)
                self.updates.append(self.update(self.rollout, minibatches[len(self.updates)]))
        self.finish_step()

    def roll_out(self) -> tuple[Rollout, dict[str, Any]]:
        """Samples and scores completions, chooses groups, and computes old and reference log-probs and advantages."""
        settings, limit = self.settings, self.settings.limit(self.step)
        evaluated = {} if self.step % self.stage.recipe.eval.every else measured(self.evaluate())
        problems = self.questions(self.step)
        with self.timed("sampling"):
            completions = self.sampled or collect(self.sampling(self.step))
            self.sampler.sleep()
        self.sample_ahead()
        scores = self.score(problems, completions, limit)
        preference, judged = self.preference_rewards(problems, completions.texts)
        rewards = torch.tensor(scores.total, dtype=torch.float64) + preference
        rows, spread = choose_groups(rewards, settings)
        rewards, kept = rewards.float(), completions.rows(rows)
        self.console.say(f"  [{rewards[0]:g}] {problems[0].question} -> {completions.texts[0][:600]!r}")
        with self.timed("logprobs"):
            batches = [batch for rows in self.minibatches(0) for batch in self.micro_batches(kept, rows)]
            options = kept, batches, settings.temperature, choose_route(self.policy, kept, self.apart)
            old_logprobs = completion_logprobs(self.policy, *options)
            reference = self.policy if self.reference is None and self.objective.kl_coef else self.reference
            with without_adapters(self.policy):
                ref_logprobs = None if reference is None else completion_logprobs(reference, *options)
            weights, gap = importance_weights(kept.logprobs, old_logprobs, kept.mask, settings.importance)
            if self.advantages is None:
                lengths = kept.lengths if settings.advantage_baseline == "length_weighted" else None
                advantages, learned = r1kernels.group_advantages(
                    rewards[rows], settings.group_size, baseline=settings.advantage_baseline, lengths=lengths,
                    scale=settings.advantage_scale), {}
            else:
                advantages, learned = self.advantages(rewards[rows], kept, old_logprobs, ref_logprobs)
        metrics = measure(completions, rewards, scores) | judged | spread | gap | learned | {"limit": limit}
        return Rollout(kept.prompt_ids, kept.prompt_mask, kept.token_ids, kept.mask, advantages=advantages,
                       old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, importance_weights=weights,
                       supports=kept.supports), evaluated | metrics

    def questions(self, step: int) -> list[Problem]:
        """The problems of a step, each once for every completion. It includes open ones only if something judges them.
        Every epoch visits the whole pool, in its own order."""
        judged = any(weight and ":" in name for name, weight in self.settings.rewards.items())
        pools = ["all" if judged or self.preferences(earlier) else "checkable" for earlier in range(step + 1)]
        pool, before = pools[-1], pools[:-1].count(pools[-1])
        problems, count = self.pools[pool], self.settings.questions * self.settings.oversample
        if not problems:
            raise TrainingError(f"step {step}: all problems are open, and nothing judges them yet; use other "
                                "problems, a reward function, or a 'preference' for all steps")
        places = (divmod(place, len(problems)) for place in range(before * count, (before + 1) * count))
        chosen = [problems[permutation(len(problems), self.seed, "questions", pool, epoch)[index]]
                  for epoch, index in places]
        return [problem for problem in chosen for _ in range(self.settings.group_size)]

    def preferences(self, step: int) -> list[PreferenceReward]:
        """The reward models that count at a step."""
        steps = self.settings.steps
        return [item for item in self.settings.preference if step >= steps - (item.last_steps or steps)]

    def sample_ahead(self) -> None:
        """Starts to sample the next step, unless that was done. A resumed run does it again, from newer weights."""
        if self.settings.rollout_ahead and self.ahead is None and self.step + 1 < self.settings.steps:
            self.ahead = self.threads.submit(self.sampling(self.step + 1))

    def sampling(self, step: int) -> Callable[[], Collector]:
        """A function that samples this rank's share of the completions of a step."""
        settings = self.settings
        prompts = [self.template.render(problem.question) for problem in self.questions(step)]
        return partial(self.sampler.draw, prompts, Sampling(
            settings.temperature, settings.limit(step), settings.top_p, settings.rollout_batch_size,
            seed_at(self.seed, settings.name, "rollout", step), settings.top_k, settings.min_p, settings.replays))

    def score(self, problems: list[Problem], completions: Completions, limit: int) -> Scores:
        """The scores of the completions."""
        prompts = [self.template.render(problem.question) for problem in problems]
        with self.timed("scoring"):
            scores = score(self.scorer, completions.texts, problems, prompts, limit=[limit] * len(prompts),
                           lengths=completions.lengths.tolist())
        if any(scores.unscorable.values()):
            self.console.say(f"step {self.step}: samples that could not be scored, by reward: {scores.unscorable}",
                             warning=True)
        return scores

    def preference_rewards(self, problems: list[Problem], texts: list[str]) -> tuple[Tensor, dict[str, float]]:
        """Weighted scores (B,) by the reward models that count now, and the mean score of each. As in the paper, only
        open problems have them."""
        total, means = torch.zeros(len(texts), dtype=torch.float64), {}
        rows = [row for row, problem in enumerate(problems) if problem.kind == "open"]
        questions = [problems[row].question for row in rows]
        responses = [whole_response(self.template.render(problems[row].question), texts[row]) for row in rows]
        with self.timed("scoring"):
            for item in self.preferences(self.step):
                model, column = self.reward_models[item.model], torch.full_like(total, math.nan)
                scores = torch.tensor(shared(model.score, questions, responses), dtype=torch.float64)
                # Where summaries are judged, never ending a thought must not beat a poor summary.
                missing = torch.tensor([not judged_part(model.target, text).strip() for text in responses]).bool()
                others = scores.masked_fill(missing | scores.isnan(), math.inf).tolist()
                column[rows] = torch.where(missing, scores.clamp(max=min(others, default=math.inf)), scores)
                means[f"reward_{item.model}"] = column.float().nanmean().item()
                total[rows] += item.weight * column[rows]
        return total, means

    def minibatches(self, epoch: int) -> list[Tensor]:
        """Rows of each minibatch of a pass over this step's rollout."""
        count = self.settings.questions * self.settings.group_size
        order = torch.tensor(permutation(count, self.seed, "minibatches", self.step, epoch))
        return list(order.chunk(self.settings.minibatches))

    def micro_batches(self, tokens: Tokens, rows: Tensor) -> list[Tensor]:
        """This rank's rows of a minibatch, by the tokens that are computed at once."""
        sizes = (tokens.prompt_mask[rows].sum(-1) + tokens.mask[rows].sum(-1)).tolist()
        data = self.policy.data
        parts = micro_batches(sizes, self.settings.micro_batch_tokens, data.size())[data.get_local_rank()]
        return [rows[places] for places in parts]

    def update(self, rollout: Rollout, rows: Tensor) -> dict[str, float]:
        """One optimizer step on a minibatch."""
        settings, number, batches = self.settings, len(self.updates), self.micro_batches(rollout, rows)
        metrics = update.minibatch_gradient(self.policy, rollout, rows, batches, self.objective, settings.temperature,
                                            choose_route(self.policy, rollout, self.apart))
        if self.advantages is not None:
            metrics |= self.advantages.learn(rollout, rows)
        where, done = f"step {self.step}, minibatch {number}", self.step * settings.updates + number + 1
        if number == 0 and not metrics["ratio_deviation"] <= RATIO_TOLERANCE:
            raise TrainingError(f"{where}: the ratio to the policy of the rollout differs from 1 by "
                                f"{metrics['ratio_deviation']:.2g} before any update; log-probs are not reproducible")
        rate = settings.learning_rate * min(1.0, done / max(1, settings.warmup_updates))
        return metrics | optimizer_step(self.policy, self.optimizer, metrics["loss"], rate, settings.grad_clip, where)

    def finish_step(self) -> None:
        """Writes the step's line and moves on to the next step."""
        with self.timed("sampling"):
            sampled = None if self.ahead is None else collect(self.ahead.result)  # a stop here changes no state
        columns = {name: [update[name] for update in self.updates] for name in self.updates[0]}
        busy = sum(self.timing[name] for name in ("sampling", "scoring", "logprobs", "updates"))
        line = {
            "step": self.step,
            **self.metrics,
            **{name: sum(values) / len(values) for name, values in columns.items()},
            "first_ratio_deviation": columns["ratio_deviation"][0],
            "ratio_deviation": max(columns["ratio_deviation"]),
            "learning_rate": columns["learning_rate"][-1],
            "timing": {**self.timing, "tokens_per_second": self.metrics["completion_tokens"] / busy},
        }
        self.log.write(line)
        self.console.step(self.settings.name, line, self.settings.steps)
        self.step, self.timing = self.step + 1, {"total": 0.0}
        self.rollout, self.metrics, self.updates, self.sampled, self.ahead = None, {}, [], sampled, None
        if self.reference is not None and self.step % self.settings.ref_refresh_every == 0:
            self.reference.refresh(self.policy)
        self.sampler.update(self.policy)
        if self.step % self.stage.recipe.checkpoint.every == 0 or self.step == self.settings.steps:
            self.save()

    def evaluate(self) -> dict[str, Any]:
        """An evaluation of the current model."""
        if self.step == 0 and self.stage.before:
            return self.stage.before
        with self.timed("evaluation"), self.stage.scorer(PARTS) as scorer:
            return evaluate(self.sampler, self.test_problems, scorer, self.stage.recipe.eval,
                            template=self.template, seed=self.seed)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of an activity to the timing."""
        started = time.monotonic()
        report_activity(f"{self.settings.name}, step {self.step}: {name}")
        yield
        for key in (name, "total"):
            self.timing[key] = self.timing.get(key, 0.0) + time.monotonic() - started

    def save(self) -> None:
        state = {"step": self.step, "advantages": None if self.advantages is None else self.advantages.state_dict()}
        if self.rollout is not None:
            state["rollout"] = vars(self.rollout), self.metrics, self.updates, self.timing
        elif self.sampled is not None:
            state["sampled"] = vars(self.sampled)
        number = self.step * self.settings.updates + len(self.updates)
        save_checkpoint(self.stage.directory, number, policy=self.policy, tokenizer=self.tokenizer, state=state,
                        shards=shards_of(self.policy, self.optimizer, self.reference),
                        keep=self.stage.recipe.checkpoint.keep)


def choose_groups(rewards: Tensor, settings: GRPO) -> tuple[Tensor, dict[str, float]]:
    """Rows of the groups to train on, and the share of groups whose rewards are equal, apart from NaN.

    If there are more groups than needed, it prefers groups whose rewards differ, and then earlier ones.
    """
    groups = rewards.view(-1, settings.group_size)
    flat = groups.nan_to_num(-math.inf).amax(-1) <= groups.nan_to_num(math.inf).amin(-1)
    kept = torch.argsort(flat.long(), stable=True)[: settings.questions].sort().values
    rows = torch.arange(rewards.numel()).view(groups.shape)[kept].flatten()
    return rows, {"zero_spread": flat.double().mean().item()}


def measure(completions: Completions, rewards: Tensor, scores: Scores) -> dict[str, float]:
    """Metrics of all completions of a step, whether trained on or not."""
    known = rewards[~rewards.isnan()]
    return {
        "reward": rewards.nanmean().item(),
        "reward_std": known.std().item() if len(known) > 1 else math.nan,
        **{f"reward_{name}": torch.tensor(part).nanmean().item() for name, part in scores.parts.items()},
        "length": completions.lengths.float().mean().item(),
        "truncated": 1 - completions.finished.float().mean().item(),
        "reflective": sum(map(reflective_words, completions.texts)) / len(completions.texts),
        "unscorable": len(rewards) - len(known),
        "timeouts": scores.timeouts,
        "crashes": scores.crashes,
        "completion_tokens": int(completions.mask.sum()),
    }
