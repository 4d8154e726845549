"""Completions from a vLLM server over HTTP; vLLM itself is not needed here.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

The first setting opens the end points that load new weights. Prompts go as token ids and come back as token ids with
their log-probs, so that nothing depends on how the server reads or writes text. `processed_logprobs` makes these of the
distribution that was sampled from; vLLM's default is that of temperature 1.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import os
import shutil
import socket
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.train.rollout import Completions, OnBatch, Sampling, completions, encode

POLL_S = 0.1
CONNECT_TIMEOUT_S, FIRST_WAIT_S, LONGEST_WAIT_S = 10.0, 0.5, 30.0
# Of the client errors, those that another attempt may not meet; servers' errors (5xx) are all of that kind.
_PASSING = (408, 425, 429)
# With the temperatures of the probe, processed log-probs of the likeliest token are far apart, raw ones equal.
_PROBE_TEMPERATURES, _PROBE_TOLERANCE = (1.0, 100.0), 1e-3


class VLLMError(RuntimeError):
    """The server cannot be reached, refuses, or answers with what is not understood; names it."""


class _Failed(Exception):
    """One attempt failed, and another may not."""


class VLLMSampler:
    """A `Sampler` that asks a vLLM server, with one request for each run of equal prompts.

    Seeds are drawn from torch's global generator. A server on a GPU may still answer the same request with other
    tokens: its sums depend on what else it computes at the time. Where `top_p` is below 1, log-probs are NaN: the
    server's are those after top-p.

    Args:
        url: such as http://localhost:8000. The environment's VLLM_API_KEY is sent along where there is one.
        stops: the tokens that end a completion.
        model: the name it is served under; None for the only one.
        weights_dir: where `update` leaves weights, under the same path for the server; None: the server keeps its own.
        device: of the completions' tensors.
        requests: how many are under way at once.
        timeout_s: how long one may take.
        retries: further attempts, with growing waits between them, where the connection or the server fails.
        check: called about ten times a second while completions are waited for; what it raises ends the rollout.

    Raises:
        VLLMError: there is no such server or model.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        *,
        model: str | None = None,
        weights_dir: str | Path | None = None,
        device: torch.device | str = "cpu",
        requests: int = 64,
        timeout_s: float = 3600.0,
        retries: int = 5,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
        except ValueError:  # a port that is no number
            known = False
        if not known:
            raise VLLMError(f"the server's url is {url!r}, expected one such as http://localhost:8000")
        self.url, self.tokenizer, self.stops, self.device, self.check = url, tokenizer, list(stops), device, check
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address = (parts.hostname, parts.port)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._timeout_s, self._attempts = timeout_s, retries + 1
        self._weights_dir = None if weights_dir is None else Path(weights_dir).resolve()
        self._updates = 0
        self._scales = False  # whether the server's log-probs are known to be of the temperature asked for
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._open: set[http.client.HTTPConnection] = set()
        self.model, self._longest = self._served(model)
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="vllm")

    def sample(self, prompts: Sequence[str], sampling: Sampling, on_batch: OnBatch | None = None) -> Completions:
        """One completion of each prompt; `sampling.batch_size` is the server's to choose."""
        prompt_ids, prompt_mask = encode(self.tokenizer, prompts, "cpu")
        ids = [row[keep].tolist() for row, keep in zip(prompt_ids, prompt_mask.bool(), strict=True)]
        longest = max(map(len, ids)) + sampling.max_new_tokens
        if self._longest is not None and longest > self._longest:
            raise VLLMError(
                f"{self.url} serves {self.model} with --max-model-len {self._longest}, expected {longest} at least: "
                f"the longest prompt and max_new_tokens {sampling.max_new_tokens}"
            )
        self._check_temperature(ids[0], sampling)
        seeds = torch.randint(2**62, (len(ids),)).tolist()
        runs = [list(run) for _, run in itertools.groupby(range(len(ids)), key=ids.__getitem__)]
        found: list[tuple[list[int], list[float]]] = [([], [])] * len(ids)
        texts = [""] * len(ids)
        futures = {self._pool.submit(self._complete, ids[run[0]], len(run), seeds[run[0]], sampling): run
                   for run in runs}
        try:
            pending = set(futures)
            while pending:
                self.check()
                done, pending = wait(pending, POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    run, rows = futures[future], future.result()
                    decoded = self.tokenizer.batch_decode([tokens for tokens, _ in rows], skip_special_tokens=True)
                    for row, tokens, text in zip(run, rows, decoded, strict=True):
                        found[row], texts[row] = tokens, text
                    if on_batch is not None:
                        on_batch(run, decoded, [len(tokens) for tokens, _ in rows])
        except BaseException:
            self._stop(futures)
            raise
        shape = (len(ids), sampling.max_new_tokens)
        token_ids, logprobs = torch.full(shape, self.tokenizer.pad_token_id), torch.zeros(shape)
        for row, (tokens, values) in enumerate(found):
            token_ids[row, : len(tokens)] = torch.tensor(tokens)
            logprobs[row, : len(tokens)] = torch.tensor(values) if sampling.top_p == 1 else math.nan
        lengths = torch.tensor([len(tokens) for tokens, _ in found])
        tensors = (tensor.to(self.device) for tensor in (prompt_ids, prompt_mask, token_ids, logprobs, lengths))
        return completions(*tensors, texts, torch.tensor(self.stops, device=self.device))

    def update(self, model: PreTrainedModel) -> None:
        """Leaves the weights where the server finds them, and has it load them and forget what it cached.

        The directory is whole before it has its name, and has a name of its own each time: servers cache by name.
        """
        if self._weights_dir is None:
            raise VLLMError(f"no weights_dir is set, expected a directory that {self.url} sees under the same path")
        self._updates += 1
        target = self._weights_dir / f"weights-{self._updates:06d}"
        writing = self._weights_dir / f".writing-{target.name}"
        try:
            for old in (writing, target):
                shutil.rmtree(old, ignore_errors=True)
            model.save_pretrained(writing)
            os.rename(writing, target)
        except Exception as error:  # safetensors has errors of its own
            shutil.rmtree(writing, ignore_errors=True)
            raise VLLMError(f"cannot save weights to {target}: {type(error).__name__}: {error}") from error
        self._request("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(target)}})
        self._request("POST", "/reset_prefix_cache")
        for old in self._weights_dir.glob("weights-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        self._stop({})
        self._pool.shutdown()
        if self._weights_dir is not None:
            for old in self._weights_dir.glob("weights-*"):
                shutil.rmtree(old, ignore_errors=True)

    def _complete(
        self, prompt: list[int], count: int, seed: int, sampling: Sampling, *, top: int = 0
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs of `count` completions; the i-th has the seed `seed + i`."""
        answer = self._request("POST", "/v1/completions", {
            "model": self.model,
            "prompt": prompt,
            "n": count,
            "seed": seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # What is not said here, the server takes from the model's generation_config.json.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": self.stops,
            "logprobs": top,
            "return_tokens_as_token_ids": True,
        })
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(count)):
                raise ValueError(f"{len(choices)} choices, expected {count}")
            return [self._read(choice, sampling.max_new_tokens, top=bool(top)) for choice in choices]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise VLLMError(
                f"{self.url} answers /v1/completions with what is not understood ({type(error).__name__}: {error}), "
                "expected token ids and log-probs, as vllm serve gives them"
            ) from error

    def _read(self, choice: dict[str, Any], limit: int, *, top: bool) -> tuple[list[int], list[float]]:
        given = choice["logprobs"]
        if given is None:
            raise ValueError("no logprobs")
        ids = [int(token.removeprefix("token_id:")) for token in given["tokens"] if token.startswith("token_id:")]
        values = [max(step.values()) for step in given["top_logprobs"]] if top else given["token_logprobs"]
        if not len(ids) == len(values) == len(given["tokens"]):
            raise ValueError(f"tokens such as {given['tokens'][:1]}, expected token_id:N and a log-prob for each")
        if not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
            raise ValueError("log-probs that are not numbers")
        if not 0 < len(ids) <= limit or (len(ids) < limit and ids[-1] not in self.stops):
            raise ValueError(
                f"{len(ids)} tokens, the last one {ids[-1:]}, and the reason {choice['finish_reason']!r}, expected "
                f"{limit} or an end with one of {self.stops}"
            )
        return ids, values

    def _check_temperature(self, prompt: list[int], sampling: Sampling) -> None:
        """Refuses a server whose log-probs are not of the temperature that it samples with."""
        if self._scales or sampling.temperature == 1 or sampling.top_p < 1:
            return
        low, high = (
            self._complete(prompt, 1, 0, Sampling(temperature, 1), top=1)[0][1][0]
            for temperature in _PROBE_TEMPERATURES
        )
        if abs(low - high) <= _PROBE_TOLERANCE:
            raise VLLMError(
                f"{self.url} gives log-probs of temperature 1, expected those of {sampling.temperature}: start it with "
                "--logprobs-mode processed_logprobs"
            )
        self._scales = True

    def _served(self, wanted: str | None) -> tuple[str, int | None]:
        """The model's name, and how many tokens it may see."""
        answer = self._request("GET", "/v1/models")
        try:
            models = {model["id"]: model.get("max_model_len") for model in answer["data"]}
        except (LookupError, TypeError, AttributeError) as error:
            raise VLLMError(f"{self.url} answers /v1/models with {str(answer)[:80]!r}, expected a list") from error
        name = next(iter(models), None) if wanted is None else wanted
        if name not in models or (wanted is None and len(models) > 1):
            raise VLLMError(f"the model is {wanted!r}, expected one that {self.url} serves: {', '.join(models)}")
        return name, models[name]

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, from JSON; None where it is empty."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self._attempts):
            # Also what a stopped rollout waits on.
            if attempt and self._stopping.wait(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S)):
                break
            try:
                status, text = self._exchange(method, path, data)
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                try:
                    return json.loads(text) if text.strip() else None
                except ValueError as error:
                    raise VLLMError(f"{self.url}{path} answers {text[:80]!r}, expected JSON") from error
            failure = f"HTTP {status}: {_message(text)}"
            if status < 500 and status not in _PASSING:
                hint = ""
                if status == 404 and not path.startswith("/v1/"):
                    hint = "; expected a server started with VLLM_SERVER_DEV_MODE=1"
                raise VLLMError(f"{self.url}{path}: {failure}{hint}")
        raise VLLMError(f"{self.url}{path} failed {attempt + 1} times, the last time with {failure}")

    def _exchange(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        connection = self._connection(*self._address, timeout=CONNECT_TIMEOUT_S)
        with self._lock:
            if self._stopping.is_set():
                raise ConnectionError("stopped")
            self._open.add(connection)
        try:
            connection.connect()
            if self._stopping.is_set():  # `_stop` may have come before there was a socket to close
                raise ConnectionError("stopped")
            connection.sock.settimeout(self._timeout_s)
            connection.request(method, self._prefix + path, data, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _stop(self, futures: dict[Future[Any], Any]) -> None:
        """Ends all requests; the server sees their connections close and drops them."""
        for future in futures:
            future.cancel()
        with self._lock:
            self._stopping.set()
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)
        wait(futures)
        self._stopping.clear()


def _message(text: bytes) -> str:
    """What a server says about an error, in either of vLLM's forms."""
    try:
        answer = json.loads(text)
        answer = answer.get("error", answer)
        return str(answer.get("message", answer) if isinstance(answer, dict) else answer)[:300]
    except (ValueError, AttributeError):
        return repr(text[:300])
