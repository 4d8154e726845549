"""Runs: a directory, what it holds, and the order in which things are checked and done."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint
from r1kernels.train.config import Config, load_config
from r1kernels.train.console import Console
from r1kernels.train.data import Problem, load_gsm8k
from r1kernels.train.evaluate import evaluate as run_evaluation
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.interrupt import Interrupt, Interrupted
from r1kernels.train.loading import check_device, load_model, load_tokenizer
from r1kernels.train.metrics import read_metrics
from r1kernels.train.pretrain import pretrain
from r1kernels.train.report import measured, write_report
from r1kernels.train.rewards import Scorer, ScoringConfig
from r1kernels.train.rollout import TransformersSampler
from r1kernels.train.rundir import CONFIG, check_run_dir, claim
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny import arithmetic_problems

INTERRUPTED = 130
Base = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def train(config: Config, *, resume: bool = False, overwrite: bool = False, plain: bool = False) -> int:
    """Trains; returns the exit status: 0, or 130 when interrupted."""
    started = time.monotonic()
    _prepare(config)
    check_run_dir(config, resume=resume, overwrite=overwrite)
    problems, base = load_problems(config), None
    if config.model.path is not None and not resume:
        tokenizer = load_tokenizer(config.model.path)
        base = load_model(config.model.path, device=config.model.device), tokenizer
    with make_scorer(config) as scorer, claim(config, resume=resume, overwrite=overwrite):
        with Interrupt() as interrupt, Console(plain) as console:
            try:
                _train(config, base, problems, scorer, console, interrupt)
            except Interrupted as signal:
                console.say(f"stopped by {signal}; go on with: {_command('train', config, CONFIG)} --resume")
                return INTERRUPTED
        _conclude(config, time.monotonic() - started)
    return 0


def _train(
    config: Config,
    base: Base | None,
    problems: tuple[list[Problem], list[Problem]],
    scorer: Scorer,
    console: Console,
    interrupt: Interrupt,
) -> None:
    """Trains from the last checkpoint, or from `base`, or from the base that the settings name."""
    path = latest_checkpoint(config.run_dir)
    checkpoint = load_checkpoint(path) if path else None
    if checkpoint is not None:
        model = load_model(checkpoint.model_dir, device=config.model.device)
        tokenizer = load_tokenizer(checkpoint.model_dir)
    else:
        model, tokenizer = base or _base(config, console, interrupt)
    GRPOTrainer(
        config, model, tokenizer, *problems, scorer, console, interrupt,
        state=checkpoint.state if checkpoint else None,
    ).run()


def _conclude(config: Config, seconds: float) -> None:
    """Writes the report, and says what came out, where it is and what can be done with it."""
    run_dir = Path(config.run_dir)
    report, curves = write_report(run_dir)
    points = measured(read_metrics(run_dir / "metrics.jsonl"))
    first, last = points[0], points[-1]
    print(
        f"pass@1 {first['pass_at_1']:.1%} -> {last['pass_at_1']:.1%}, response length {first['eval_length']:.1f} -> "
        f"{last['eval_length']:.1f} tokens, in {seconds:.0f} s\n"
        f"report      {report}\ncurves      {curves}\nmetrics     {run_dir / 'metrics.jsonl'}\n"
        f"checkpoint  {latest_checkpoint(run_dir)}\n"
        f"next: {_command('eval', config)}\n"
        f"      {_command('train', config, CONFIG)} --resume --set grpo.steps=N"
    )


def _command(verb: str, config: Config, *parts: str) -> str:
    """A command about the run, as this process was called, that works from any directory."""
    program = Path(sys.argv[0])
    if program.name != "r1kernels":  # called as a library
        program = Path("r1kernels")
    elif shutil.which(program.name) != str(program):
        program = program.absolute()
    else:
        program = Path(program.name)
    return shlex.join([str(program), verb, str(Path(config.run_dir, *parts).absolute())])


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
        arithmetic_problems("train", data.train_size, *bounds, key="data.train_size"),
        arithmetic_problems("test", wanted, *bounds, key="eval.questions"),
    )


def _base(config: Config, console: Console, interrupt: Interrupt) -> Base:
    """The model that RL starts from."""
    if config.model.path is not None:
        tokenizer = load_tokenizer(config.model.path)
        return load_model(config.model.path, device=config.model.device), tokenizer
    model, tokenizer = pretrain(config, Path(config.run_dir) / "base", console, interrupt)
    return model.to(config.model.device), tokenizer


def make_scorer(config: Config) -> Scorer:
    """The rewards; none of their workers runs yet."""
    reward = config.reward
    try:
        return Scorer(reward.parts, ScoringConfig(workers=reward.workers, timeout_s=reward.timeout_s))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"'reward': {error}") from error


def _prepare(config: Config) -> None:
    """The device there, threads as configured, and no progress bars of transformers through the live table."""
    check_device(config.model.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
