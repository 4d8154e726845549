"""Reinforcement learning as R1-Zero and R1 do it: groups of samples, rewards, GRPO.

`GRPOTrainer.train_step` is the algorithm: one rollout and the updates on it. Its state is complete between any two
updates, and a checkpoint holds all of it, the rollout included. Random numbers depend only on the seed and on the
position in the run. So a resumed run equals one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1kernels.rewards import Scores
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from r1kernels.train.data import Problem, whole_response
from r1kernels.train.errors import ConfigError, Interrupted, TrainingError
from r1kernels.train.evaluate import PARTS, columns, eval_problems, evaluate, measured, reflective_words
from r1kernels.train.log import StepLog
from r1kernels.train.model import load_model, load_tokenizer
from r1kernels.train.recipe import PreferenceReward
from r1kernels.train.reward_model import RewardModel, judged_part
from r1kernels.train.rng import permutation, torch_seeded
from r1kernels.train.rollout import Completions, Sampler, Sampling, Tokens, TransformersSampler, end_tokens
from r1kernels.train.stage import Stage
from r1kernels.train.update import (
    Rollout,
    choose_groups,
    completion_logprobs,
    group_advantages,
    importance_weights,
    minibatch_gradient,
)

RATIO_TOLERANCE = 1e-2  # of the first ratio to 1: the same weights just computed the same log-probs in the same batches
PROGRESS = ("step", "measured", "updates", "timing", "evaluation")  # attributes that a checkpoint holds


class Advantages:
    """Turns rewards into advantages. This one is GRPO's: it compares samples in groups and learns nothing.

    `settings.advantages` can name a function that makes another, with the same four methods; `examples/ppo` is one.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.settings = trainer.settings

    def __call__(
        self, rewards: Tensor, tokens: Tokens, old_logprobs: Tensor, ref_logprobs: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages, (B,) of samples or (B, T) of tokens, and metrics. A sample without a reward (NaN) gets 0."""
        return group_advantages(rewards, self.settings), {}

    def learn(self, rollout: Rollout, batches: list[Tensor]) -> dict[str, float]:
        """An update of its own on a minibatch, right before that of the policy; returns metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GRPOTrainer:
    """Trains the model of one stage, from its last checkpoint if there is one."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.settings, self.seed = stage, stage.settings, stage.seed
        self.console, self.check = stage.console, stage.interrupt.check
        path = latest_checkpoint(stage.directory)
        if path is None:
            state, (model, self.tokenizer) = None, stage.load_model(self.settings.model)
        else:
            model_dir, state = load_checkpoint(path)
            model, self.tokenizer = load_model(model_dir, device=stage.recipe.device), load_tokenizer(model_dir)
        self.model = model.eval()  # dropout would make the first ratio differ from 1
        self.template = stage.template(self.tokenizer)
        self.problems = stage.problems(self.settings.problems)
        self.test_problems = eval_problems(stage.recipe)
        self.local_sampler = TransformersSampler(self.model, self.tokenizer, self.check)
        self.sampler = self.make_sampler()
        self.reward_models: dict[str, RewardModel] = {}  # by stage, loaded when they first count
        self.objective = self.settings.objective.build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings.learning_rate, weight_decay=0.0)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if self.objective.kl_coef else None
        own = self.settings.advantages
        try:
            self.advantages = own.load()(self, **own.options) if own else Advantages(self)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'advantages.options' cannot be used: {error}") from error
        self.step = 0
        self.rollout: Rollout | None = None  # of this step
        self.measured: dict[str, Any] = {}  # in this step, before its updates
        self.updates: list[dict[str, float]] = []  # metrics of this step's updates
        self.timing = {"total": 0.0}  # seconds of this step
        self.evaluation: dict[str, Any] | None = None  # the last one
        if state is not None:
            self.restore(state)

    def run(self) -> dict[str, Any]:
        """Trains to the last step; returns the stage's summary. Raises Interrupted after it wrote a checkpoint."""
        self.log, self.scorer = StepLog(self.stage, first_step=self.step), self.stage.scorer(self.settings.rewards)
        with self.log, contextlib.closing(self.sampler), self.scorer:
            try:
                self.sampler.update(self.model)
                while self.step < self.settings.steps:
                    self.train_step()
                self.evaluate_if_due()
            except Interrupted:
                self.save()
                raise
            self.write(self.measured)
        questions = self.settings.steps * self.settings.questions * self.settings.oversample
        return {"steps": self.settings.steps, "questions": questions, "evaluation": self.evaluation}

    # ---- one step ----

    def train_step(self) -> None:
        """Samples and scores completions, computes what the updates are measured against, and updates the policy."""
        settings = self.settings
        if self.rollout is None:  # a checkpoint between two updates holds the rollout
            self.evaluate_if_due()
            problems = [problem for problem in self.next_questions() for _ in range(settings.group_size)]
            completions, scores = self.sample_and_score(problems)
            preference, judged = self.preference_rewards(problems, completions.texts)
            rewards = torch.tensor(scores.total, dtype=torch.float64) + preference
            rows, spread = choose_groups(rewards, settings)
            rewards, kept = rewards.float().to(self.model.device), completions.rows(rows)
            with self.timed("logprobs", "log-probs of the rollout"):
                old_logprobs = self.logprobs(self.model, kept)
                ref_logprobs = None if self.reference is None else self.logprobs(self.reference, kept)
                weights, gap = importance_weights(kept.logprobs, old_logprobs, kept.mask, settings.importance)
                advantages, learned = self.advantages(rewards[rows], kept, old_logprobs, ref_logprobs)
            self.rollout = Rollout(
                kept.prompt_ids, kept.prompt_mask, kept.token_ids, kept.mask, advantages=advantages,
                old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, importance_weights=weights)
            self.measured |= measure(completions, rewards, scores, judged) | spread | gap | learned
            self.measured["limit"] = settings.limit(self.step)
            self.console.say(f"  [{rewards[0]:g}] {problems[0].question} -> {completions.texts[0][:600]!r}")
            self.warn(scores)
        while len(self.updates) < settings.updates:
            epoch, place = divmod(len(self.updates), settings.minibatches)
            self.update(self.rollout, self.minibatches(epoch)[place])
        self.finish_step()

    def next_questions(self) -> list[Problem]:
        """The questions of this step. Open problems are among them from the step on at which something judges them.
        Every epoch visits all problems, in an order of the epoch."""
        settings = self.settings
        judged = any(weight and (name == "judge" or ":" in name) for name, weight in settings.rewards.items())
        first = 0 if judged else min(map(self.first_step, settings.preference), default=settings.steps)
        pool, step = ("all", self.step - first) if self.step >= first else ("checkable", self.step)
        problems = [problem for problem in self.problems if pool == "all" or problem.kind != "open"]
        if not problems:
            raise TrainingError(f"step {self.step}: all problems are open, and nothing judges them yet; expected problems "
                                "with answers, the reward 'judge', a reward function, or a 'preference' for all steps")
        count = settings.questions * settings.oversample
        places = (divmod(place, len(problems)) for place in range(step * count, (step + 1) * count))
        return [problems[permutation(len(problems), self.seed, "questions", pool, epoch)[index]]
                for epoch, index in places]

    def first_step(self, item: PreferenceReward) -> int:
        """The first step at which a reward model counts."""
        return self.settings.steps - (item.last_steps or self.settings.steps)

    def sample_and_score(self, problems: list[Problem]) -> tuple[Completions, Scores]:
        """A completion of each problem, and its scores, which are computed while others are still sampled."""
        settings, limit, pending = self.settings, self.settings.limit(self.step), []
        prompts = [self.template.render(problem.question) for problem in problems]

        def submit(rows: list[int], texts: list[str], lengths: list[int]) -> None:
            given = columns([problems[row] for row in rows], [prompts[row] for row in rows])
            pending.append((self.scorer.submit(texts, **given, lengths=lengths, limit=[limit] * len(rows)), rows))

        with self.timed("sampling", "sampling"), torch_seeded(self.seed, settings.name, "rollout", self.step):
            sampling = Sampling(settings.temperature, limit, batch_size=settings.rollout_batch_size)
            completions = self.sampler.sample(prompts, sampling, on_batch=submit)
        with self.timed("scoring", "scoring"):
            return completions, Scores.joined([future.result() for future, _ in pending], [rows for _, rows in pending])

    def preference_rewards(self, problems: list[Problem], texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted scores (B,) of open problems by the reward models that count now, and the scores of each model.

        Problems with a checkable answer keep to the rules, as in the paper.
        """
        total, parts = torch.zeros(len(texts), dtype=torch.float64), {}
        rows = [row for row, problem in enumerate(problems) if problem.kind == "open"]
        questions = [problems[row].question for row in rows]
        responses = [whole_response(self.template.render(problems[row].question), texts[row]) for row in rows]
        with self.timed("scoring", "scoring"):
            for item in (item for item in self.settings.preference if self.step >= self.first_step(item)):
                if item.model not in self.reward_models:
                    path, recipe = self.stage.model_path(item.model), self.stage.recipe
                    self.reward_models[item.model] = RewardModel(path, template=recipe.template, device=recipe.device)
                scores = preference_scores(self.reward_models[item.model], questions, responses)
                parts[item.model] = torch.full_like(total, math.nan)
                parts[item.model][rows] = scores
                total[rows] += item.weight * scores
        return total, parts

    def logprobs(self, model: PreTrainedModel, tokens: Tokens) -> Tensor:
        """Log-probs (B, T) of the rollout, in the batches of its first updates."""
        batches = [rows for minibatch in self.minibatches(0) for rows in minibatch]
        return completion_logprobs(model, tokens, batches, temperature=self.settings.temperature, check=self.check)

    def minibatches(self, epoch: int) -> list[list[Tensor]]:
        """Rows of each minibatch of a pass over this step's rollout, as micro-batches."""
        count = self.settings.questions * self.settings.group_size
        order = torch.tensor(permutation(count, self.seed, "minibatches", self.step, epoch))
        size = self.settings.micro_batch_size or count
        return [list(rows.split(size)) for rows in order.chunk(self.settings.minibatches)]

    def update(self, rollout: Rollout, batches: list[Tensor]) -> None:
        """One optimizer step on a minibatch, given as micro-batches."""
        settings, number = self.settings, len(self.updates)
        with self.timed("updates", f"update {number + 1}/{settings.updates}"):
            self.optimizer.zero_grad()
            metrics = minibatch_gradient(
                self.model, rollout, batches, self.objective, temperature=settings.temperature,
                measure_all=settings.measure_all, check=self.check)
            metrics |= self.advantages.learn(rollout, batches)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip).item()
            where = f"step {self.step}, minibatch {number}"
            if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
                raise TrainingError(f"{where}: loss {metrics['loss']}, gradient norm {norm}; expected finite numbers")
            if number == 0:
                self.measured["first_ratio_deviation"] = deviation = metrics["ratio_deviation"]
                if not deviation <= RATIO_TOLERANCE:
                    raise TrainingError(f"{where}: the ratio to the policy of the rollout differs from 1 by "
                                        f"{deviation:.2g} before any update; log-probs are not reproducible")
            done = self.step * settings.updates + number + 1
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, done / max(1, settings.warmup_updates))
            self.optimizer.step()
        self.updates.append({**metrics, "grad_norm": norm})
        every = self.stage.recipe.checkpoint.every_updates
        if every and done % every == 0 and number + 1 < settings.updates:
            self.save()

    def finish_step(self) -> None:
        """Writes the step's line and moves on to the next step."""
        updates = {name: [update[name] for update in self.updates] for name in self.updates[0]}
        busy = sum(self.timing[name] for name in ("sampling", "scoring", "logprobs", "updates"))
        self.timing["tokens_per_second"] = self.measured["completion_tokens"] / busy
        self.console.step(self.settings.name, self.write({
            **self.measured,
            **{name: mean(values) for name, values in updates.items()},
            "ratio_deviation": max(updates["ratio_deviation"]),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }), self.settings.steps)
        self.step, self.rollout, self.measured, self.updates, self.timing = self.step + 1, None, {}, [], {"total": 0.0}
        if self.reference is not None and self.step % self.settings.ref_refresh_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.sampler.update(self.model)
        if self.step % self.stage.recipe.checkpoint.every == 0 or self.step == self.settings.steps:
            self.save()

    # ---- around the steps ----

    def make_sampler(self) -> Sampler:
        settings = self.settings.sampler
        if settings.kind == "transformers":
            return self.local_sampler
        from r1kernels.train.vllm import VLLMSampler

        return VLLMSampler(
            settings.url, self.tokenizer, end_tokens(self.model, self.tokenizer), model=settings.served_name,
            weights_dir=settings.weights_dir, device=self.model.device, requests=settings.requests,
            timeout_s=settings.timeout_s, check=self.check)

    def evaluate_if_due(self) -> None:
        due = self.step % self.stage.recipe.eval.every == 0 or self.step == self.settings.steps
        if not due or "pass_at_1" in self.measured:
            return
        self.evaluation = self.stage.before if self.step == 0 else None
        if not self.evaluation:
            with self.timed("evaluation", "evaluating"), self.stage.scorer(PARTS) as scorer:
                self.evaluation = evaluate(self.local_sampler, self.test_problems, scorer, self.stage.recipe.eval,
                                           template=self.template, seed=self.seed)
        self.measured = measured(self.evaluation)

    def warn(self, scores: Scores) -> None:
        """Warns of samples that could not be scored and of a step without anything to learn from."""
        if self.measured["unscorable"]:
            self.console.say(f"step {self.step}: {self.measured['unscorable']} samples could not be scored, so their "
                             f"advantage is 0: {scores.unscorable} {scores.endpoint_error}", warning=True)
        if not self.rollout.advantages.any():
            self.console.say(f"step {self.step}: all advantages are 0, so there is nothing to learn from; the questions "
                             "are too hard or too easy", warning=True)

    def write(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Adds the line of this step to the log, and returns it."""
        line = {"step": self.step, **metrics, "timing": self.timing}
        self.log.write(line)
        if "pass_at_1" in metrics:
            self.log.examples(self.step, self.evaluation["examples"])
        return line

    @contextlib.contextmanager
    def timed(self, name: str, phase: str) -> Iterator[None]:
        """Shows what is going on, and adds its seconds to the timing."""
        self.console.phase(f"{self.settings.name}, step {self.step}: {phase}")
        started = time.monotonic()
        yield
        for key in (name, "total"):
            self.timing[key] = self.timing.get(key, 0.0) + time.monotonic() - started

    def parts(self) -> dict[str, Any]:
        """What has a state of its own, besides the model."""
        parts = {"optimizer": self.optimizer, "reference": self.reference, "advantages": self.advantages}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self) -> None:
        state = {name: getattr(self, name) for name in PROGRESS} | {"rollout": self.rollout and vars(self.rollout)}
        state |= {name: part.state_dict() for name, part in self.parts().items()}
        done = 0 if self.rollout is None else 1 + len(self.updates)
        with self.timed("saving", "saving"):
            save_checkpoint(self.stage.directory, self.step, done, model=self.model, tokenizer=self.tokenizer,
                            state=state, keep=self.stage.recipe.checkpoint.keep)

    def restore(self, state: dict[str, Any]) -> None:
        for name in PROGRESS:
            setattr(self, name, state[name])
        if state["rollout"]:
            self.rollout = Rollout(**{name: None if value is None else value.to(self.model.device)
                                      for name, value in state["rollout"].items()})
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def preference_scores(model: RewardModel, questions: list[str], responses: list[str]) -> Tensor:
    """Scores by a reward model. Where it scores summaries, a response without one gets at most the lowest score of the
    others: else never ending a thought could beat a poor summary."""
    scores = torch.tensor(model.score(questions, responses), dtype=torch.float64)
    missing = torch.tensor([not judged_part(model.target, text).strip() for text in responses], dtype=torch.bool)
    known = scores[~missing & ~scores.isnan()]
    lowest = known.min().item() if len(known) else math.inf
    return torch.where(missing, scores.clamp(max=lowest), scores)


def measure(completions: Completions, rewards: Tensor, scores: Scores, judged: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of all completions of a step, whether trained on or not."""
    known = rewards[~rewards.isnan()]
    parts = {name: torch.tensor(part) for name, part in scores.parts.items()} | judged
    return {
        "reward": rewards.nanmean().item(),
        "reward_std": known.std().item() if len(known) > 1 else math.nan,
        **{f"reward_{name}": part.float().nanmean().item() for name, part in parts.items()},
        "length": completions.lengths.float().mean().item(),
        "truncated": 1 - completions.finished.float().mean().item(),
        "reflective": sum(map(reflective_words, completions.texts)) / len(completions.texts),
        "unscorable": len(rewards) - len(known),
        "timeouts": scores.timeouts,
        "crashes": scores.crashes,
        "endpoint_failures": scores.endpoint_failures,
        "completion_tokens": int(completions.mask.sum()),
    }


def mean(values: list[float]) -> float:
    """The mean of the known values: a minibatch in which no token was measured has NaN."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def run(stage: Stage) -> dict[str, Any]:
    """Trains a stage of kind grpo; returns its summary."""
    return GRPOTrainer(stage).run()
