"""Settings of scoring, as a recipe's `scoring:` key gives them. Free of torch, like the rest of this package."""

import math
from dataclasses import dataclass
from typing import Literal

SandboxKind = Literal["auto", "bubblewrap", "unshare", "none"]


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind any endpoint that speaks OpenAI's chat completions.

    Args:
        url: up to and without `/chat/completions`, such as http://localhost:8000/v1.
        model: its name there.
        api_key_env: environment variable that holds the key; None sends none.
        timeout_s: seconds for one answer.
        retries: further attempts after a failed one, with exponential back-off; then the sample is unscorable.
        votes: answers asked for one comparison, half of them with the sides swapped.
        temperature: of the judge's answers; at 0 more than two votes say nothing new.
        concurrency: requests under way at once.
    """

    url: str
    model: str
    api_key_env: str | None = None
    timeout_s: float = 60.0
    retries: int = 4
    votes: int = 4
    temperature: float = 0.7
    concurrency: int = 16

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge.url is {self.url!r}, expected http://... or https://...")
        if self.votes < 2 or self.votes % 2:
            raise ValueError(f"judge.votes is {self.votes}, expected an even number: half of them swap the sides")
        _check_positive(self, "judge.", "timeout_s", "concurrency")
        for name in ("retries", "temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"judge.{name} is {getattr(self, name)}, expected at least 0")


@dataclass(frozen=True)
class ScoringConfig:
    """How samples are scored.

    Args:
        workers: worker processes at most; none starts before a sample needs one.
        timeout_s: wall-clock seconds one judgement may take, and one program under test.
        memory_mb: MiB of address space of one worker, and of one program under test.
        sandbox: what model-written programs run in; "auto" is bubblewrap, else unshare, else a refusal, and "none" is
            no protection at all.
        overlong_buffer: tokens before the limit in which the overlong penalty grows from 0 to 1.
        judge: the endpoint of the reward "judge".
    """

    workers: int = 1
    timeout_s: float = 5.0
    memory_mb: int = 512
    sandbox: SandboxKind = "auto"
    overlong_buffer: int = 4096
    judge: JudgeConfig | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "", "workers", "timeout_s", "memory_mb", "overlong_buffer")


def _check_positive(settings: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{prefix}{name} must be positive, got {value!r}")
