"""Runs: a directory, what it holds, and the order in which things are checked and done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint
from r1kernels.train.config import Config, dump_config, load_config
from r1kernels.train.console import Console
from r1kernels.train.data import Problem, load_gsm8k
from r1kernels.train.evaluate import evaluate as run_evaluation
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.interrupt import Interrupt, Interrupted
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.metrics import read_metrics
from r1kernels.train.pretrain import pretrain
from r1kernels.train.report import measured, write_report
from r1kernels.train.rewards import Scorer
from r1kernels.train.rollout import TransformersSampler
from r1kernels.train.schema import ConfigError, differences
from r1kernels.train.tiny import arithmetic_problems

CONFIG = "config.yaml"
# What may change when a run is resumed: it alters no step that was already made.
MAY_CHANGE = ("grpo.steps", "checkpoint.", "run_dir", "threads", "reward.workers")
INTERRUPTED = 130


def train(config: Config, *, resume: bool = False, overwrite: bool = False, plain: bool = False) -> int:
    """Trains; returns the exit status: 0, or 130 when interrupted."""
    run_dir, started = Path(config.run_dir), time.monotonic()
    _prepare(config)
    train_problems, test_problems = load_problems(config)
    if config.model.path is not None:
        load_tokenizer(config.model.path)  # a directory without one is refused before anything is deleted
    with make_scorer(config) as scorer, Interrupt() as interrupt, Console(plain) as console:
        _claim(run_dir, config, resume=resume, overwrite=overwrite)
        try:
            path = latest_checkpoint(run_dir)
            checkpoint = load_checkpoint(path) if path else None
            if checkpoint is None:
                model, tokenizer = _base(config, run_dir, console, interrupt)
            else:
                model = load_model(checkpoint.model_dir, device=config.model.device)
                tokenizer = load_tokenizer(checkpoint.model_dir)
            GRPOTrainer(
                config, model, tokenizer, train_problems, test_problems, scorer, console, interrupt,
                state=checkpoint.state if checkpoint else None,
            ).run()
        except Interrupted as signal:
            console.say(f"stopped by {signal}; go on with: r1kernels train {run_dir / CONFIG} --resume")
            return INTERRUPTED
    report, curves = write_report(run_dir)
    points = measured(read_metrics(run_dir / "metrics.jsonl"))
    first, last = points[0], points[-1]
    print(
        f"pass@1 {first['pass_at_1']:.1%} -> {last['pass_at_1']:.1%}, response length {first['eval_length']:.1f} -> "
        f"{last['eval_length']:.1f} tokens, in {time.monotonic() - started:.0f} s\n"
        f"report      {report}\ncurves      {curves}\nmetrics     {run_dir / 'metrics.jsonl'}\n"
        f"checkpoint  {latest_checkpoint(run_dir)}\n"
        f"next: r1kernels eval {run_dir}    r1kernels train {run_dir / CONFIG} --resume --set grpo.steps=N"
    )
    return 0


def evaluate(path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Evaluates a run directory, or a checkpoint inside one."""
    path = Path(path)
    run_dir = next((folder for folder in (path, *path.parents) if (folder / CONFIG).is_file()), None)
    if run_dir is None:
        raise ConfigError(f"{path} is neither a run nor a checkpoint of one: no {CONFIG} in it or above it")
    config = load_config(run_dir / CONFIG, overrides)
    checkpoint_dir = path if (path / "model").is_dir() else latest_checkpoint(path)
    if checkpoint_dir is None:
        raise ConfigError(f"{path} holds no checkpoint")
    _prepare(config)
    checkpoint = load_checkpoint(checkpoint_dir)
    _, problems = load_problems(config)
    model = load_model(checkpoint.model_dir, device=config.model.device)
    tokenizer = load_tokenizer(checkpoint.model_dir)
    with make_scorer(config) as scorer:
        sampler = TransformersSampler(model, tokenizer)
        result = run_evaluation(
            sampler, problems, scorer, config.eval,
            max_new_tokens=config.grpo.max_new_tokens, open_think=config.grpo.open_think, seed=config.seed,
        )
    print(
        f"{checkpoint_dir}\npass@1 {result.pass_at_1:.1%} ± {result.standard_error:.1%} (standard error; "
        f"{len(problems)} questions x {config.eval.samples} samples, T {config.eval.temperature}, "
        f"top-p {config.eval.top_p}, prompts {result.prompt_hash})\n"
        f"length {result.length:.1f} tokens, cut off {result.truncated:.1%}, unscorable {result.unscorable}"
    )
    return 0


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on and the held-out ones, of which there may be fewer than `eval.questions`."""
    data, wanted = config.data, config.eval.questions
    if data.kind == "gsm8k":
        train_problems, test_problems = load_gsm8k(data.path), load_gsm8k(data.test_path)
        asked = {problem.question for problem in train_problems}
        if any(problem.question in asked for problem in test_problems[:wanted]):
            raise ConfigError(
                f"'data.test_path' {data.test_path!r} shares questions with 'data.path' {data.path!r}, expected none"
            )
        return train_problems, test_problems[:wanted]
    bounds = (data.min_terms, data.max_terms, config.seed)
    return (
        arithmetic_problems("train", data.train_size, *bounds),
        arithmetic_problems("test", wanted, *bounds),
    )


def _claim(run_dir: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Makes the run directory, or refuses the one there is."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given, expected at most one")
    saved = run_dir / CONFIG
    if resume:
        if not saved.is_file():
            raise ConfigError(f"--resume: {run_dir} holds no run (no {CONFIG})")
        changed = [
            change for change in differences(load_config(saved), config) if not change.startswith(MAY_CHANGE)
        ]
        if changed:
            raise ConfigError(f"--resume: settings differ from those of {run_dir}: {'; '.join(changed)}")
    elif run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"'run_dir' {str(run_dir)!r} is a file, expected a directory or nothing")
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        if not saved.is_file():
            raise ConfigError(f"'run_dir' {str(run_dir)!r} holds files that are not a run's; name another directory")
        if not overwrite:
            raise ConfigError(f"'run_dir' {str(run_dir)!r} holds a run; give --resume or --overwrite")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    aside = run_dir / f".{CONFIG}"
    aside.write_text(dump_config(config), encoding="utf-8")
    aside.replace(saved)


def _base(
    config: Config, run_dir: Path, console: Console, interrupt: Interrupt
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that RL starts from."""
    if config.model.path is not None:
        model = load_model(config.model.path, device=config.model.device)
        return model, load_tokenizer(config.model.path)
    model, tokenizer = pretrain(config, run_dir / "base", console, interrupt)
    return model.to(config.model.device), tokenizer


def make_scorer(config: Config) -> Scorer:
    """The rewards; none of their workers runs yet."""
    reward = config.reward
    try:
        return Scorer(reward.parts, workers=reward.workers, timeout_s=reward.timeout_s)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"'reward': {error}") from error


def _prepare(config: Config) -> None:
    """Threads as configured, and no progress bars of transformers through the live table."""
    if config.threads:
        torch.set_num_threads(config.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
