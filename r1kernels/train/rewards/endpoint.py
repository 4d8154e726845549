"""Asking a model behind an endpoint that speaks OpenAI's chat completions, and asking again when it fails."""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from .settings import JudgeConfig

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
MAX_REPLY_BYTES = 2**20
# Of the client errors, those that another attempt may not meet; servers' errors (5xx) are all of that kind.
PASSING = (408, 409, 425, 429)


class EndpointError(RuntimeError):
    """The endpoint gave no usable answer, after all attempts. The message says what the last one met."""


class _Failed(Exception):
    """One attempt failed; `wait` is what the server asked for in seconds, None for no wish."""

    def __init__(self, reason: str, *, wait: float | None = None, final: bool = False):
        super().__init__(reason)
        self.wait, self.final = wait, final


class Endpoint:
    """A client of one model; safe to use from many threads.

    Raises:
        ValueError: the environment variable of the key is not set, or holds what no header can carry.
    """

    def __init__(self, config: JudgeConfig):
        self._config = config
        self._url = config.url.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                raise ValueError(
                    f"judge.api_key_env is {config.api_key_env!r}, expected an environment variable that holds a key "
                    "(printable ASCII)"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, system: str, user: str, read: Callable[[str], T | None], *, seed: int = 0) -> T:
        """What `read` makes of the model's reply; None from it counts as a failed attempt.

        Between attempts there is a wait, twice as long each time and with a jitter that depends on the request alone,
        or as long as the server's Retry-After says.

        Raises:
            EndpointError: every attempt failed, or one in a way that cannot pass, such as a refused key.
        """
        body = json.dumps({
            "model": self._config.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": self._config.temperature,
            "seed": seed,
        }).encode()
        jitter = random.Random(body)
        attempts = self._config.retries + 1
        for attempt in range(attempts):
            try:
                value = read(self._reply(body))
                if value is None:
                    raise _Failed("a reply without a verdict")
                return value
            except _Failed as failure:
                last = failure
            if last.final or attempt + 1 == attempts:
                break
            wait = FIRST_WAIT_S * 2**attempt * jitter.uniform(0.5, 1.5) if last.wait is None else last.wait
            time.sleep(min(wait, LONGEST_WAIT_S))
        raise EndpointError(f"{self._url}: {last} (attempt {attempt + 1} of {attempts})")

    def _reply(self, body: bytes) -> str:
        request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
        deadline = time.monotonic() + self._config.timeout_s
        data = b""
        try:
            with urllib.request.urlopen(request, timeout=self._config.timeout_s) as response:
                while chunk := response.read1(65536):
                    data += chunk
                    if len(data) > MAX_REPLY_BYTES or time.monotonic() > deadline:
                        raise _Failed("a reply that does not end")
        except urllib.error.HTTPError as error:
            with error:
                final = error.code < 500 and error.code not in PASSING
                wait = _seconds(error.headers.get("Retry-After"))
                raise _Failed(f"HTTP {error.code} {error.reason}", wait=wait, final=final) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(str(getattr(error, "reason", "") or error or type(error).__name__)) from None
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Failed(f"not a chat completion: {data[:80]!r}") from None
        if not isinstance(content, str):
            raise _Failed(f"a reply without text: {data[:80]!r}")
        return content


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in its form of whole seconds; the form of a date is left to the back-off."""
    return float(retry_after) if retry_after and retry_after.strip().isdecimal() else None
