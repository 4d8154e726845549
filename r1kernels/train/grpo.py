"""Reinforcement learning as R1-Zero and R1 do it: groups of samples, rewards, GRPO.

`GRPOTrainer.train_step` is the algorithm: one rollout and the updates on it. The state is complete between any two
updates, and a checkpoint holds all of it, the rollout included. Random numbers depend only on the seed and on the
position in the run. So a resumed run equals one that was never interrupted.

The setting `advantages` can name a function that makes an object to replace group advantages. The object is called with
rewards (B,), tokens, old and reference log-probs, and returns advantages (B,) per sample or (B, T) per token, and
metrics. Its `learn(rollout, batches)` runs with each update of the policy, and returns metrics. Checkpoints hold its
`state_dict()`. See examples/ppo.
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

import r1kernels
from r1kernels.rewards import Scores
from r1kernels.train.checkpoint import save_checkpoint
from r1kernels.train.data import Problem, whole_response
from r1kernels.train.errors import ConfigError, Interrupted, TrainingError
from r1kernels.train.evaluate import PARTS, columns, evaluate, measured, reflective_words
from r1kernels.train.log import StepLog
from r1kernels.train.lora import AdapterReference, adapter_state, mergeable
from r1kernels.train.precision import AdamW
from r1kernels.train.recipe import GRPO, PreferenceReward
from r1kernels.train.reward_model import RewardModel, judged_part
from r1kernels.train.rng import permutation, torch_seeded
from r1kernels.train.rollout import Completions, Sampling, TransformersSampler, end_tokens
from r1kernels.train.stage import Stage
from r1kernels.train.update import Rollout, completion_logprobs, importance_weights, minibatch_gradient, optimizer_step
from r1kernels.train.vllm import VLLMSampler

RATIO_TOLERANCE = 1e-2  # difference of the first ratio from 1: the same weights computed both log-probs


class GRPOTrainer:
    """Trains the model of one stage, from its last checkpoint if there is one."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.settings, self.seed, self.console = stage, stage.settings, stage.recipe.seed, stage.console
        settings, recipe = stage.settings, stage.recipe
        model, self.tokenizer, state = stage.start()
        self.model = model.eval()  # dropout would make the first ratio differ from 1
        stage.enable_checkpointing(self.model)
        self.template = stage.template(self.tokenizer)
        problems = stage.problems(settings.problems)
        self.pools = {"all": problems, "checkable": [problem for problem in problems if problem.kind != "open"]}
        self.test_problems = stage.problems(recipe.eval_problems, "test")
        self.local_sampler = TransformersSampler(self.model, self.tokenizer, stage.interrupt.check)
        self.sampler: TransformersSampler | VLLMSampler = self.local_sampler
        if settings.sampler.kind == "vllm":
            self.sampler = VLLMSampler(settings.sampler, self.tokenizer, end_tokens(self.model, self.tokenizer),
                                       device=self.model.device, check=stage.interrupt.check)
        self.reward_models = {
            item.model: RewardModel(stage.model_path(item.model), template=recipe.template, device=recipe.device,
                                    dtype=recipe.dtype)
            for item in settings.preference}
        self.objective = settings.objective.build()
        self.optimizer = AdamW(self.model, recipe.dtype, lr=settings.learning_rate, weight_decay=0.0)
        self.reference: Any = None
        if self.objective.kl_coef:
            self.reference = (AdapterReference(self.model) if settings.lora
                              else copy.deepcopy(self.model).requires_grad_(False))
        own = settings.advantages
        try:
            self.advantages = own.load()(self, **own.options) if own else None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'advantages.options' cannot be used: {error}") from error
        parts = {"optimizer": self.optimizer, "reference": self.reference, "advantages": self.advantages}
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.step, self.timing = state.pop("step", 0), {"total": 0.0}  # seconds of this step
        self.rollout: Rollout | None = None
        self.metrics: dict[str, Any] = {}  # of this step, before its updates
        self.updates: list[dict[str, float]] = []  # metrics of the updates on this rollout
        if "rollout" in state:
            tensors, self.metrics, self.updates, self.timing = state.pop("rollout")
            self.rollout = Rollout(**{key: None if value is None else value.to(recipe.device)
                                      for key, value in tensors.items()})
        for name, part_state in state.items():
            self.parts[name].load_state_dict(part_state)

    def run(self) -> dict[str, Any]:
        """Trains to the last step; returns the stage's summary. Raises Interrupted after it wrote a checkpoint."""
        settings = self.settings
        self.log, self.scorer = StepLog(self.stage, first_step=self.step), self.stage.scorer(settings.rewards)
        with self.log, contextlib.closing(self.sampler), self.scorer:
            try:
                self.sampler.update(self.model)
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
        minibatches = [minibatch for epoch in range(self.settings.epochs) for minibatch in self.minibatches(epoch)]
        with self.timed("updates"):
            while len(self.updates) < len(minibatches):
                self.stage.interrupt.check()
                self.updates.append(self.update(self.rollout, minibatches[len(self.updates)]))
        self.finish_step()

    def roll_out(self) -> tuple[Rollout, dict[str, Any]]:
        """Samples and scores completions, chooses groups, and computes old and reference log-probs and advantages."""
        settings, limit = self.settings, self.settings.limit(self.step)
        evaluated = {} if self.step % self.stage.recipe.eval.every else measured(self.evaluate())
        problems = [problem for problem in self.next_questions() for _ in range(settings.group_size)]
        completions, scores = self.sample_and_score(problems, limit)
        preference, judged = self.preference_rewards(problems, completions.texts)
        rewards = torch.tensor(scores.total, dtype=torch.float64) + preference
        rows, spread = choose_groups(rewards, settings)
        rewards, kept = rewards.float().to(self.model.device), completions.rows(rows)
        self.console.say(f"  [{rewards[0]:g}] {problems[0].question} -> {completions.texts[0][:600]!r}")
        with self.timed("logprobs"):
            batches = [batch for minibatch in self.minibatches(0) for batch in minibatch]
            old_logprobs, ref_logprobs = completion_logprobs(self.model, kept, batches, settings.temperature), None
            if self.reference is not None:
                shared = isinstance(self.reference, AdapterReference)
                with self.reference.in_place() if shared else contextlib.nullcontext(self.reference) as model:
                    ref_logprobs = completion_logprobs(model, kept, batches, settings.temperature)
            weights, gap = importance_weights(kept.logprobs, old_logprobs, kept.mask, settings.importance)
            if self.advantages is None:
                advantages, learned = r1kernels.group_advantages(
                    rewards[rows], settings.group_size, scale=settings.advantage_scale), {}
            else:
                advantages, learned = self.advantages(rewards[rows], kept, old_logprobs, ref_logprobs)
        metrics = measure(completions, rewards, scores) | judged | spread | gap | learned | {"limit": limit}
        return Rollout(kept.prompt_ids, kept.prompt_mask, kept.token_ids, kept.mask, advantages=advantages,
                       old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, importance_weights=weights
                       ), evaluated | metrics

    def next_questions(self) -> list[Problem]:
        """The questions of this step. It includes open problems only if something judges them. Every epoch visits the
        whole pool, in its own order."""
        judged = any(weight and ":" in name for name, weight in self.settings.rewards.items())
        pools = ["all" if judged or self.preferences(step) else "checkable" for step in range(self.step + 1)]
        pool, before = pools[-1], pools[:-1].count(pools[-1])
        problems, count = self.pools[pool], self.settings.questions * self.settings.oversample
        if not problems:
            raise TrainingError(f"step {self.step}: all problems are open, and nothing judges them yet; use other "
                                "problems, a reward function, or a 'preference' for all steps")
        places = (divmod(place, len(problems)) for place in range(before * count, (before + 1) * count))
        return [problems[permutation(len(problems), self.seed, "questions", pool, epoch)[index]]
                for epoch, index in places]

    def preferences(self, step: int) -> list[PreferenceReward]:
        """The reward models that count at a step."""
        steps = self.settings.steps
        return [item for item in self.settings.preference if step >= steps - (item.last_steps or steps)]

    def sample_and_score(self, problems: list[Problem], limit: int) -> tuple[Completions, Scores]:
        """A completion of each problem, and its scores."""
        settings = self.settings
        prompts = [self.template.render(problem.question) for problem in problems]
        with self.timed("sampling"), torch_seeded(self.seed, settings.name, "rollout", self.step):
            sampling = Sampling(settings.temperature, limit, batch_size=settings.rollout_batch_size)
            completions = self.sampler.sample(prompts, sampling)
        with self.timed("scoring"):
            scores = self.scorer.score(completions.texts, **columns(problems, prompts), limit=[limit] * len(prompts),
                                       lengths=completions.lengths.tolist())
        if any(scores.unscorable.values()):
            self.console.say(f"step {self.step}: samples that could not be scored, by reward: {scores.unscorable}",
                             warning=True)
        return completions, scores

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
                scores = torch.tensor(model.score(questions, responses), dtype=torch.float64)
                # Where summaries are judged, never ending a thought must not beat a poor summary.
                missing = torch.tensor([not judged_part(model.target, text).strip() for text in responses]).bool()
                others = scores.masked_fill(missing | scores.isnan(), math.inf).tolist()
                column[rows] = torch.where(missing, scores.clamp(max=min(others, default=math.inf)), scores)
                means[f"reward_{item.model}"] = column.float().nanmean().item()
                total[rows] += item.weight * column[rows]
        return total, means

    def minibatches(self, epoch: int) -> list[list[Tensor]]:
        """Rows of each minibatch of a pass over this step's rollout, as micro-batches."""
        count = self.settings.questions * self.settings.group_size
        order = torch.tensor(permutation(count, self.seed, "minibatches", self.step, epoch))
        size = self.settings.micro_batch_size or count
        return [list(rows.split(size)) for rows in order.chunk(self.settings.minibatches)]

    def update(self, rollout: Rollout, batches: list[Tensor]) -> dict[str, float]:
        """One optimizer step on a minibatch, given as micro-batches."""
        settings, number = self.settings, len(self.updates)
        self.optimizer.zero_grad()
        metrics = minibatch_gradient(self.model, rollout, batches, self.objective, settings.temperature)
        if self.advantages is not None:
            metrics |= self.advantages.learn(rollout, batches)
        where, done = f"step {self.step}, minibatch {number}", self.step * settings.updates + number + 1
        if number == 0 and not metrics["ratio_deviation"] <= RATIO_TOLERANCE:
            raise TrainingError(f"{where}: the ratio to the policy of the rollout differs from 1 by "
                                f"{metrics['ratio_deviation']:.2g} before any update; log-probs are not reproducible")
        rate = settings.learning_rate * min(1.0, done / max(1, settings.warmup_updates))
        return metrics | optimizer_step(self.optimizer, metrics["loss"], rate, settings.grad_clip, where)

    def finish_step(self) -> None:
        """Writes the step's line and moves on to the next step."""
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
        self.rollout, self.metrics, self.updates = None, {}, []
        if self.reference is not None and self.step % self.settings.ref_refresh_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.sampler.update(self.model)
        if self.step % self.stage.recipe.checkpoint.every == 0 or self.step == self.settings.steps:
            self.save()

    def evaluate(self) -> dict[str, Any]:
        """An evaluation of the current model."""
        if self.step == 0 and self.stage.before:
            return self.stage.before
        with self.timed("evaluation"), self.stage.scorer(PARTS) as scorer:
            return evaluate(self.local_sampler, self.test_problems, scorer, self.stage.recipe.eval,
                            template=self.template, seed=self.seed)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Shows the current activity, and adds its seconds to the timing."""
        self.console.phase(f"{self.settings.name}, step {self.step}: {name}")
        started = time.monotonic()
        yield
        for key in (name, "total"):
            self.timing[key] = self.timing.get(key, 0.0) + time.monotonic() - started

    def save(self) -> None:
        state = {"step": self.step} | {name: part.state_dict() for name, part in self.parts.items()}
        if self.rollout is not None:
            state["rollout"] = vars(self.rollout), self.metrics, self.updates, self.timing
        number = self.step * self.settings.updates + len(self.updates)
        with self.optimizer.float32_model():
            save_checkpoint(self.stage.directory, number, model=mergeable(self.model), tokenizer=self.tokenizer,
                            state=state | adapter_state(self.model), keep=self.stage.recipe.checkpoint.keep)


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
