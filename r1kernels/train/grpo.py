"""The loop of reinforcement learning, as R1-Zero and R1 do it: groups of samples, rewards, GRPO.

A step is one rollout and the updates on it:

    questions -> G completions each -> rewards -> group advantages -> log-probs under the old policy and the
    reference -> `minibatches` updates, of which all but the first are off-policy

Completions are scored in worker processes while the next ones are sampled. Between any two updates the trainer's state
is whole, and a checkpoint holds all of it, the rollout included; random numbers depend only on seed and position (see
`randomness`). So a resumed run equals one that never stopped.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from r1kernels.train.data import Problem
from r1kernels.train.evaluate import MEASURED, PARTS, eval_problems, evaluate, make_sample
from r1kernels.train.groups import advantages_of, choose
from r1kernels.train.importance import importance_weights
from r1kernels.train.interrupt import Interrupted, TrainingError
from r1kernels.train.language_stats import reflective_words
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.preferences import Preferences
from r1kernels.train.rng import permutation, torch_seeded
from r1kernels.train.rewards import Scores
from r1kernels.train.rollout import Completions, Sampler, Sampling, TransformersSampler, end_tokens
from r1kernels.train.stage import Stage
from r1kernels.train.steplog import StepLog
from r1kernels.train.update import Rollout, minibatch_gradient, rollout_logprobs
from r1kernels.train.vllm import VLLMSampler

# With the log-probs of the rollout just recomputed in the same batches, only unordered sums can differ.
RATIO_TOLERANCE = 1e-2
# Steps in a row without any group to learn from, after which the console warns.
IDLE_STEPS = 5


class GRPOTrainer:
    """Trains the model of one stage; in its directory it finds what was done before, if anything was."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.settings, self.seed = stage, stage.config, stage.seed
        self.console, self.interrupt = stage.console, stage.interrupt
        path = latest_checkpoint(stage.directory)
        if path is None:
            model, self.tokenizer, state = *stage.load_model(self.settings.model), None
        else:
            checkpoint = load_checkpoint(path)
            model = load_model(checkpoint.model_dir, device=stage.recipe.device)
            self.tokenizer, state = load_tokenizer(checkpoint.model_dir), checkpoint.state
        # Evaluation mode throughout: dropout would make the first ratio differ from 1.
        self.model = model.eval()
        self.template = stage.template(self.tokenizer)
        problems = stage.problems(self.settings.problems)
        self.pools = {
            "all": problems,
            "checkable": [problem for problem in problems if problem.kind != "open"],
        }
        self.test_problems = eval_problems(stage.recipe)
        self.local_sampler = TransformersSampler(self.model, self.tokenizer, self.interrupt.check)
        self.sampler = self._make_sampler()
        self.preferences = Preferences(stage, self.settings, self.template)
        self.objective = self.settings.objective.build()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.settings.learning_rate, weight_decay=0.0)
        self.reference = copy.deepcopy(model).requires_grad_(False) if self.objective.kl_coef else None
        self.step = self.minibatch = self.idle_steps = 0
        self.cursors = dict.fromkeys(self.pools, 0)  # questions asked so far of each pool
        self.seconds = 0.0
        self.rollout: Rollout | None = None
        self.measured: dict[str, float] = {}  # of this step, before its updates
        self.evaluation: dict[str, Any] | None = None  # the last one
        self.examples: list[dict[str, Any]] = []
        self.updates: list[dict[str, float]] = []
        if state is not None:
            self.restore(state)
        self._clock = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Trains to the last step; returns the stage's summary.

        Raises:
            Interrupted: after a checkpoint has been written.
            TrainingError: a loss or gradient is not finite, or the first ratio is not 1.
        """
        stage, settings = self.stage, self.settings
        self.log = StepLog(stage, first_step=self.step)
        with self.log, contextlib.closing(self.sampler), stage.scorer(settings.rewards) as self.scorer:
            self.sampler.update(self.model)
            try:
                if self.rollout is None and self.step % stage.recipe.eval.every and self.step < settings.steps:
                    self.measured, self.examples = {}, []  # of what was the last step when there were fewer
                while self.step < settings.steps:
                    if self.rollout is None:
                        self._evaluate_if_due()
                        self._roll_out()
                    while self.minibatch < settings.updates:
                        self._update()
                    self._finish_step()
                self._evaluate_if_due()
                self.save()
            except Interrupted:
                self.save()
                raise
            self.log.write({"step": self.step, **self.measured, "seconds_total": self.seconds})
            self.log.examples(self.step, self.examples)
        return {"steps": self.step, "questions": sum(self.cursors.values()), "evaluation": self.evaluation}

    def _make_sampler(self) -> Sampler:
        settings = self.settings.sampler
        if settings.kind == "transformers":
            return self.local_sampler
        return VLLMSampler(
            settings.url, self.tokenizer, end_tokens(self.model, self.tokenizer), model=settings.served_name,
            weights_dir=settings.weights_dir, device=self.model.device, requests=settings.requests,
            timeout_s=settings.timeout_s, check=self.interrupt.check,
        )

    # ---- what other algorithms change ---

    def advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """(B,), or (B, T) for one a token; a sample without a reward (NaN) gets 0."""
        settings = self.settings
        return advantages_of(
            rewards, settings.group_size, min_spread=settings.min_spread, scale=settings.advantage_scale
        )

    def gradient(self, rows: list[Tensor]) -> dict[str, float]:
        """Adds the gradient of one minibatch, given as micro-batches; returns its metrics."""
        return minibatch_gradient(
            self.model, self.rollout, rows, self.objective,
            temperature=self.settings.temperature, check=self.interrupt.check,
        )

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model."""
        return {
            "step": self.step,
            "minibatch": self.minibatch,
            "idle_steps": self.idle_steps,
            "cursors": self.cursors,
            "seconds": self._elapsed(),
            "rollout": None if self.rollout is None else dataclasses.asdict(self.rollout),
            "measured": self.measured,
            "examples": self.examples,
            "evaluation": self.evaluation,
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name in (
            "step", "minibatch", "idle_steps", "cursors", "seconds", "measured", "examples", "evaluation", "updates"
        ):
            setattr(self, name, state[name])
        if state["rollout"] is not None:
            self.rollout = Rollout(**{
                name: None if value is None else value.to(self.model.device) for name, value in state["rollout"].items()
            })
        self.optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    # ---- the loop ---

    def save(self) -> Path:
        self.log.sync()
        return save_checkpoint(
            self.stage.directory, self.step, model=self.model, tokenizer=self.tokenizer, state=self.state(),
            keep=self.stage.recipe.checkpoint.keep,
        )

    def _elapsed(self) -> float:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return self.seconds

    def _phase(self, text: str) -> None:
        self.console.phase(f"{self.settings.name}, step {self.step}: {text}")

    def _evaluate_if_due(self) -> None:
        last = self.step == self.settings.steps
        due = self.step % self.stage.recipe.eval.every == 0 or last
        if not due or "pass_at_1" in self.measured:
            return
        started = time.monotonic()
        if self.step == 0 and self.stage.before:
            evaluation = self.stage.before
        else:
            self._phase("evaluating")
            with self.stage.scorer(PARTS) as scorer:
                evaluation = evaluate(
                    self.local_sampler, self.test_problems, scorer, self.stage.recipe.eval,
                    template=self.template, seed=self.seed,
                ).as_dict()
        self.measured = {new: evaluation[old] for old, new in MEASURED.items()}
        self.measured["seconds_evaluation"] = time.monotonic() - started
        self.examples, self.evaluation = evaluation["examples"], evaluation

    def _pool(self) -> str:
        """Open problems are asked where something judges their answers: the reward of a judge, or of preferences."""
        return "all" if self.settings.judges_open or self.preferences.apply(self.step) else "checkable"

    def _questions(self) -> list[Problem]:
        """The next questions: every epoch visits all of a pool in an order of its own."""
        pool = self._pool()
        problems, first = self.pools[pool], self.cursors[pool]
        if not problems:
            raise TrainingError(
                f"step {self.step}: no problem has a checkable answer, and for the others neither the reward 'judge' "
                "nor a 'preference' counts yet"
            )
        places = range(first, first + self.settings.questions * self.settings.oversample)
        orders = {epoch: permutation(len(problems), self.seed, "questions", pool, epoch)
                  for epoch in {place // len(problems) for place in places}}
        return [problems[orders[place // len(problems)][place % len(problems)]] for place in places]

    def _sample(self, problems: list[Problem]) -> tuple[Completions, Scores]:
        """Completions and their scores, which are made while others are still sampled."""
        settings, limit = self.settings, self.settings.limit(self.step)
        prompts = [self.template.render(problem.question) for problem in problems]
        pending: list[tuple[list[int], Future[Scores]]] = []

        def submit(rows: list[int], texts: list[str], lengths: list[int]) -> None:
            pending.append((rows, self.scorer.submit([
                make_sample(problems[row], prompts[row], text, tokens=length, limit=limit)
                for row, text, length in zip(rows, texts, lengths, strict=True)
            ])))

        with torch_seeded(self.seed, self.settings.name, "rollout", self.step):
            completions = self.sampler.sample(
                prompts,
                Sampling(settings.temperature, limit, batch_size=settings.rollout_batch_size),
                on_batch=submit,
            )
        self._sampled = time.monotonic()
        return completions, Scores.joined([future.result() for _, future in pending], [rows for rows, _ in pending])

    def _roll_out(self) -> None:
        """Samples and scores this step's completions, and fixes what its updates are measured against."""
        settings, started = self.settings, time.monotonic()
        self._phase("sampling")
        questions = self._questions()
        problems = [problem for problem in questions for _ in range(settings.group_size)]
        completions, scores = self._sample(problems)
        preference = self.preferences.score(self.step, problems, completions.texts)
        scored = time.monotonic()
        rewards = torch.tensor(scores.total, dtype=torch.float64) + torch.tensor(preference.total, dtype=torch.float64)
        chosen, spread_shares = choose(
            rewards, settings.group_size, settings.questions, min_spread=settings.min_spread
        )
        rewards = rewards.float().to(self.model.device)
        zeros = torch.zeros_like(completions.logprobs)
        rollout = Rollout(
            prompt_ids=completions.prompt_ids,
            prompt_mask=completions.prompt_mask,
            token_ids=completions.token_ids,
            mask=completions.mask,
            advantages=torch.zeros_like(rewards),
            old_logprobs=zeros,
            ref_logprobs=zeros,
        ).rows(chosen)
        self._phase("log-probs of the rollout")
        batches = [rows for minibatch in self._minibatches() for rows in minibatch]
        policies = {"old_logprobs": self.model, "ref_logprobs": self.reference}
        rollout = dataclasses.replace(rollout, **{
            name: rollout_logprobs(
                model, rollout, batches, temperature=settings.temperature, check=self.interrupt.check
            )
            for name, model in policies.items() if model is not None
        })
        sampled_logprobs = completions.logprobs[chosen][:, : rollout.token_ids.shape[1]]
        try:
            weights, gap = importance_weights(sampled_logprobs, rollout.old_logprobs, rollout.mask, settings.importance)
        except ValueError as error:
            raise TrainingError(f"step {self.step}: {error}") from error
        rollout = dataclasses.replace(rollout, importance_weights=weights)
        self.rollout = dataclasses.replace(rollout, advantages=self.advantages(rewards[chosen], rollout))
        parts, known = {**scores.parts, **preference.parts}, rewards[~rewards.isnan()]
        measured = {
            "reward": rewards.nanmean().item(),
            "reward_std": known.std().item() if len(known) > 1 else math.nan,
            **{f"reward_{name}": torch.tensor(part).nanmean().item() for name, part in parts.items()},
            "length": completions.lengths.float().mean().item(),
            "limit": settings.limit(self.step),
            "truncated": 1 - completions.finished.float().mean().item(),
            **spread_shares,
            "reflective": sum(map(reflective_words, completions.texts)) / len(problems),
            "unscorable": int(rewards.isnan().sum()),
            "timeouts": scores.timeouts,
            "crashes": scores.crashes,
            "endpoint_failures": scores.endpoint_failures,
            **gap,
            "completion_tokens": int(completions.mask.sum()),
            "seconds_sampling": self._sampled - started,
            "seconds_scoring": scored - self._sampled,
            "seconds_logprobs": time.monotonic() - scored,
        }
        self.cursors[self._pool()] += len(questions)
        self.measured |= measured
        self.minibatch, self.updates = 0, []
        self.console.samples([
            (problems[i].question, completions.texts[i], rewards[i].item())
            for i in range(0, len(problems), math.ceil(len(problems) / 3))
        ])
        if measured["unscorable"]:
            reasons = ", ".join(f"{name} {count}" for name, count in scores.unscorable.items() if count)
            if scores.endpoint_error:
                reasons += f"; the endpoint: {scores.endpoint_error}"
            self.console.say(
                f"step {self.step}: {measured['unscorable']} samples could not be scored ({reasons}; {scores.timeouts} "
                f"timeouts, {scores.crashes} crashes); their advantage is 0", warning=True,
            )

    def _minibatches(self, epoch: int = 0) -> list[list[Tensor]]:
        """Rows of each minibatch of a pass over this step's rollout, as micro-batches."""
        count = self.settings.questions * self.settings.group_size
        order = torch.tensor(permutation(count, self.seed, "minibatches", self.step, epoch))
        size = self.settings.micro_batch_size or count
        return [list(rows.split(size)) for rows in order.chunk(self.settings.minibatches)]

    def _update(self) -> None:
        """One optimiser step, on the next minibatch of the rollout."""
        started, settings = time.monotonic(), self.settings
        self._phase(f"update {self.minibatch + 1}/{settings.updates}")
        epoch, place = divmod(self.minibatch, settings.minibatches)
        self.optimizer.zero_grad()
        metrics = self.gradient(self._minibatches(epoch)[place])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip).item()
        self._check_update(metrics, norm)
        done = self.step * settings.updates + self.minibatch + 1
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, done / max(1, settings.warmup_updates))
        self.optimizer.step()
        self.updates.append({**metrics, "grad_norm": norm, "seconds_updates": time.monotonic() - started})
        self.minibatch += 1
        every = self.stage.recipe.checkpoint.every_updates
        if every and done % every == 0 and self.minibatch < settings.updates:
            self.save()

    def _check_update(self, metrics: dict[str, float], norm: float) -> None:
        where = f"step {self.step}, minibatch {self.minibatch}"
        if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
            raise TrainingError(f"{where}: loss {metrics['loss']}, gradient norm {norm}, expected finite numbers")
        if self.minibatch == 0:
            self.measured["first_ratio_deviation"] = metrics["ratio_deviation"]
            if not metrics["ratio_deviation"] <= RATIO_TOLERANCE:
                raise TrainingError(
                    f"{where}: the ratio to the policy of the rollout differs from 1 by "
                    f"{metrics['ratio_deviation']:.2g} before any update: the model does not repeat its log-probs"
                )

    def _finish_step(self) -> None:
        """Writes the step's line, and moves on to the next step."""
        totals = {name: [update[name] for update in self.updates] for name in self.updates[0]}
        seconds = sum(totals.pop("seconds_updates"))
        metrics = {
            "step": self.step,
            **self.measured,
            **{name: sum(values) / len(values) for name, values in totals.items()},
            "ratio_deviation": max(totals["ratio_deviation"]),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds_updates": seconds,
            "seconds_total": self._elapsed(),
        }
        busy = seconds + sum(metrics[f"seconds_{name}"] for name in ("sampling", "scoring", "logprobs"))
        metrics["tokens_per_second"] = metrics["completion_tokens"] / busy
        self.idle_steps = self.idle_steps + 1 if metrics["zero_spread"] == 1 else 0
        if self.idle_steps and self.idle_steps % IDLE_STEPS == 0:
            self.console.say(
                f"step {self.step}: for {self.idle_steps} steps all samples of every group have had the same reward, "
                "so there is nothing to learn from; the questions are too hard or too easy", warning=True,
            )
        self.log.write(metrics)
        self.log.examples(self.step, self.examples)
        self.console.step(metrics, self.settings.steps)
        self.step, self.minibatch, self.rollout = self.step + 1, 0, None
        self.measured, self.examples, self.updates = {}, [], []
        if self.reference is not None and self.step % self.settings.ref_refresh_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.sampler.update(self.model)
        if self.step % self.stage.recipe.checkpoint.every == 0 and self.step < self.settings.steps:
            self.save()
