"""Pure reinforcement learning as R1-Zero does it: groups of samples, rule rewards, GRPO.

A step is one rollout and the updates on it:

    questions -> G completions each -> rewards -> group advantages -> log-probs under the old policy and the
    reference -> `minibatches` updates, of which all but the first are off-policy

Between any two updates the trainer's state is whole, and a checkpoint holds all of it, the rollout included;
random numbers depend only on seed and position (see `randomness`). So a resumed run equals one that never stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.train.checkpoint import save_checkpoint
from r1kernels.train.config import Config
from r1kernels.train.console import Console
from r1kernels.train.data import Problem
from r1kernels.train.evaluate import evaluate
from r1kernels.train.interrupt import Interrupt, Interrupted
from r1kernels.train.metrics import MetricsLog
from r1kernels.train.prompt import render
from r1kernels.train.randomness import permutation, torch_seeded
from r1kernels.train.rewards import Sample, Scorer
from r1kernels.train.rollout import Sampling, TransformersSampler
from r1kernels.train.update import Rollout, minibatch_gradient, rollout_logprobs

# With the log-probs of the rollout just recomputed in the same batches, only unordered sums can differ.
RATIO_TOLERANCE = 1e-2
# Steps in a row without any group to learn from, after which the console warns.
IDLE_STEPS = 5


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is untouched."""


class GRPOTrainer:
    """Trains `model` on `train_problems`, measuring it on `test_problems`.

    Args:
        state: what an earlier trainer saved in its checkpoint, whose model is given as `model`; None starts anew.
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train_problems: Sequence[Problem],
        test_problems: Sequence[Problem],
        scorer: Scorer,
        console: Console,
        interrupt: Interrupt,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.settings = config, config.grpo
        self.run_dir = Path(config.run_dir)
        # Evaluation mode throughout: dropout would make the first ratio differ from 1.
        self.model, self.tokenizer = model.eval(), tokenizer
        self.train_problems, self.test_problems = train_problems, test_problems
        self.scorer, self.console, self.interrupt = scorer, console, interrupt
        self.sampler = TransformersSampler(model, tokenizer, interrupt.check)
        self.objective = config.grpo.objective.build()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.settings.learning_rate, weight_decay=0.0)
        self.reference = copy.deepcopy(model).requires_grad_(False) if self.objective.kl_coef else None
        self.step = self.minibatch = self.idle_steps = 0
        self.seconds = 0.0
        self.rollout: Rollout | None = None
        self.measured: dict[str, float] = {}  # of this step, before its updates
        self.examples: list[dict[str, Any]] = []
        self.updates: list[dict[str, float]] = []
        if state is not None:
            self._restore(state)
        self._clock = time.monotonic()

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            Interrupted: after a checkpoint has been written.
            TrainingError: a loss or gradient is not finite, or the first ratio is not 1.
        """
        log = MetricsLog(self.run_dir / "metrics.jsonl", first_step=self.step)
        samples = MetricsLog(self.run_dir / "samples.jsonl", first_step=self.step)
        try:
            with log, samples:
                while self.step < self.settings.steps:
                    if self.rollout is None:
                        self._evaluate_if_due()
                        self._roll_out()
                    while self.minibatch < self.settings.minibatches:
                        self._update()
                    self._finish_step(log, samples)
                self._evaluate_if_due()
                self.save()
                log.write({"step": self.step, **self.measured, "seconds_total": self.seconds})
                self._write_examples(samples)
        except Interrupted:
            self.save()
            raise

    def save(self) -> Path:
        state = {
            "step": self.step,
            "minibatch": self.minibatch,
            "idle_steps": self.idle_steps,
            "seconds": self._elapsed(),
            "rollout": None if self.rollout is None else dataclasses.asdict(self.rollout),
            "measured": self.measured,
            "examples": self.examples,
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
        }
        return save_checkpoint(
            self.run_dir,
            self.step,
            model=self.model,
            tokenizer=self.tokenizer,
            state=state,
            keep=self.config.checkpoint.keep,
        )

    def _restore(self, state: dict[str, Any]) -> None:
        for name in ("step", "minibatch", "idle_steps", "seconds", "measured", "examples", "updates"):
            setattr(self, name, state[name])
        device = self.model.device
        if state["rollout"] is not None:
            self.rollout = Rollout(**{name: value.to(device) for name, value in state["rollout"].items()})
        self.optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    def _elapsed(self) -> float:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return self.seconds

    def _evaluate_if_due(self) -> None:
        due = self.step % self.config.eval.every == 0 or self.step == self.settings.steps
        if not due or "pass_at_1" in self.measured:
            return
        self.console.phase(f"step {self.step}: evaluating")
        result = evaluate(
            self.sampler,
            self.test_problems,
            self.scorer,
            self.config.eval,
            max_new_tokens=self.settings.max_new_tokens,
            open_think=self.settings.open_think,
            seed=self.config.seed,
        )
        self.measured = result.metrics()
        names = ("question", "answer", "completion", "accuracy")
        self.examples = [dict(zip(names, example, strict=True)) for example in result.examples]

    def _questions(self) -> list[Problem]:
        """The questions of this step: every epoch visits all of them in an order of its own."""
        count, first = len(self.train_problems), self.step * self.settings.questions
        places = range(first, first + self.settings.questions)
        orders = {epoch: permutation(count, self.config.seed, "questions", epoch)
                  for epoch in {place // count for place in places}}
        return [self.train_problems[orders[place // count][place % count]] for place in places]

    def _roll_out(self) -> None:
        """Samples and scores this step's completions, and fixes what its updates are measured against."""
        settings, started = self.settings, time.monotonic()
        self.console.phase(f"step {self.step}: sampling")
        problems = [problem for problem in self._questions() for _ in range(settings.group_size)]
        prompts = [render(problem.question, open_think=settings.open_think) for problem in problems]
        with torch_seeded(self.config.seed, "rollout", self.step):
            sampling = Sampling(
                settings.temperature, settings.max_new_tokens, batch_size=settings.rollout_batch_size
            )
            completions = self.sampler.sample(prompts, sampling)
        sampled = time.monotonic()
        scores = self.scorer.score([
            Sample(prompt, text, problem.answer)
            for prompt, text, problem in zip(prompts, completions.texts, problems, strict=True)
        ])
        scored = time.monotonic()
        rewards = torch.tensor(scores.total, device=self.model.device)
        zeros = torch.zeros_like(completions.logprobs)
        rollout = Rollout(
            prompt_ids=completions.prompt_ids,
            prompt_mask=completions.prompt_mask,
            token_ids=completions.token_ids,
            mask=completions.mask,
            advantages=r1kernels.group_advantages(rewards, settings.group_size),
            old_logprobs=zeros,
            ref_logprobs=zeros,
        )
        self.console.phase(f"step {self.step}: log-probs of the rollout")
        batches = [rows for minibatch in self._minibatches() for rows in minibatch]
        policies = {"old_logprobs": self.model, "ref_logprobs": self.reference}
        rollout = dataclasses.replace(rollout, **{
            name: rollout_logprobs(
                model, rollout, batches, temperature=settings.temperature, check=self.interrupt.check
            )
            for name, model in policies.items() if model is not None
        })
        gap = (completions.logprobs - rollout.old_logprobs)[completions.mask].abs()
        idle = (rollout.advantages.view(-1, settings.group_size) == 0).all(-1)
        measured = {
            "reward": rewards.nanmean().item(),
            **{f"reward_{name}": torch.tensor(part).nanmean().item() for name, part in scores.parts.items()},
            "length": completions.lengths.float().mean().item(),
            "truncated": 1 - completions.finished.float().mean().item(),
            "zero_spread": idle.float().mean().item(),
            "unscorable": int(rewards.isnan().sum()),
            "timeouts": scores.timeouts,
            "crashes": scores.crashes,
            "logprob_gap_mean": gap.mean().item(),
            "logprob_gap_max": gap.max().item(),
            "seconds_sampling": sampled - started,
            "seconds_scoring": scored - sampled,
            "seconds_logprobs": time.monotonic() - scored,
            "completion_tokens": int(completions.mask.sum()),
        }
        self.measured |= measured
        self.rollout, self.minibatch, self.updates = rollout, 0, []
        self.console.samples([
            (problems[i].question, completions.texts[i], scores.total[i])
            for i in range(0, len(problems), math.ceil(len(problems) / 3))
        ])
        if measured["unscorable"]:
            self.console.say(
                f"step {self.step}: {measured['unscorable']} samples could not be scored ({scores.timeouts} "
                f"timeouts, {scores.crashes} crashes); their advantage is 0", warning=True,
            )

    def _minibatches(self) -> list[list[Tensor]]:
        """Rows of each minibatch of this step, as micro-batches."""
        count = self.settings.questions * self.settings.group_size
        order = torch.tensor(permutation(count, self.config.seed, "minibatches", self.step))
        size = self.settings.micro_batch_size or count
        return [list(rows.split(size)) for rows in order.chunk(self.settings.minibatches)]

    def _update(self) -> None:
        """One optimiser step, on the next minibatch of the rollout."""
        started, settings = time.monotonic(), self.settings
        self.console.phase(f"step {self.step}: update {self.minibatch + 1}/{settings.minibatches}")
        self.optimizer.zero_grad()
        metrics = minibatch_gradient(
            self.model,
            self.rollout,
            self._minibatches()[self.minibatch],
            self.objective,
            temperature=settings.temperature,
            check=self.interrupt.check,
        )
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip).item()
        self._check_update(metrics, norm)
        done = self.step * settings.minibatches + self.minibatch + 1
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, done / max(1, settings.warmup_updates))
        self.optimizer.step()
        self.updates.append({**metrics, "grad_norm": norm, "seconds_updates": time.monotonic() - started})
        self.minibatch += 1

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

    def _finish_step(self, log: MetricsLog, samples: MetricsLog) -> None:
        """Writes the step's line, and moves on to the next step."""
        totals = {name: [update[name] for update in self.updates] for name in self.updates[0]}
        seconds = sum(totals.pop("seconds_updates"))
        metrics = {
            "step": self.step,
            **self.measured,
            **{name: sum(values) / len(values) for name, values in totals.items()},
            "ratio_deviation": max(totals["ratio_deviation"]),
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
        log.write(metrics)
        self._write_examples(samples)
        self.console.step(metrics, self.settings.steps)
        self.step, self.minibatch, self.rollout = self.step + 1, 0, None
        self.measured, self.updates = {}, []
        if self.reference is not None and self.step % self.settings.ref_refresh_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        if self.step % self.config.checkpoint.every == 0 and self.step < self.settings.steps:
            self.save()

    def _write_examples(self, samples: MetricsLog) -> None:
        for example in self.examples:
            samples.write({"step": self.step, **example})
        self.examples = []
