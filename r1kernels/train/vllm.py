"""Completions from a vLLM server; vLLM itself is not needed here.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

The variable opens the end points that load new weights. With `processed_logprobs`, log-probs belong to the distribution
that tokens are drawn from; by default they are at temperature 1. Prompts and completions are sent as token ids, so that
nothing depends on how the server reads or writes text.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.rewards.endpoint import Endpoint, EndpointError
from r1kernels.train.errors import StorageError
from r1kernels.train.lora import mergeable
from r1kernels.train.recipe import SamplerSettings
from r1kernels.train.rollout import Collector, Completions, Sampling

POLL_S = 0.1
MAX_ANSWER = 2**28  # bytes: the ids and log-probs of a group of long completions
PROBE_TEMPERATURE, PROBE_TOP = 2.0, 5  # the highest temperature that vLLM allows; a server adds the sampled token
Row = tuple[list[int], list[float], list[float]]  # token ids, their log-probs, those of the likeliest first tokens


class VLLMSampler:
    """Asks a vLLM server, with one request for each run of equal prompts. Methods raise EndpointError.

    Requests have no seed. A server's sums depend on its other requests, so a seed would not make its answers
    repeatable; seeded sampling is slow; and in vLLM 0.32 on CPUs it stops the server when a prompt is split into
    chunks. The key in VLLM_API_KEY is sent if it is set.

    `check` is called about ten times a second while requests are in flight; its exceptions end the rollout.
    """

    def __init__(self, settings: SamplerSettings, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], *,
                 device: torch.device | str = "cpu", check: Callable[[], None] = lambda: None) -> None:
        self.url, self.tokenizer, self.stops = settings.url.rstrip("/").removesuffix("/v1"), tokenizer, list(stops)
        self.device, self.check, self.weights_dir, self.updates = device, check, Path(settings.weights_dir).resolve(), 0
        self.endpoint = Endpoint(f"{self.url}/v1", os.environ.get("VLLM_API_KEY"), timeout_s=settings.timeout_s,
                                 concurrency=settings.requests, max_body=MAX_ANSWER)
        self.model = settings.served_name or self.endpoint.wait(
            self.endpoint.request("get", "/models", lambda answer: answer["data"][0]["id"]))
        self._check_logprobs()

    def sample(self, prompts: Sequence[str], sampling: Sampling) -> Completions:
        """One completion of each prompt. The server chooses its own batches."""
        found, pending = Collector(self.tokenizer, prompts, self.stops), {}
        for prompt, group in itertools.groupby(range(len(prompts)), key=found.prompts.__getitem__):
            rows = list(group)
            pending[self.endpoint.start(self._complete(prompt, len(rows), sampling))] = rows
        try:
            while pending:
                self.check()
                for future in wait(pending, POLL_S, return_when=FIRST_COMPLETED).done:
                    for row, (tokens, logprobs, _) in zip(pending.pop(future), future.result(), strict=True):
                        found.token_ids[row], found.logprobs[row] = tokens, logprobs
        finally:
            for future in pending:  # the server sees the connections close and drops the requests
                future.cancel()
        return found.completions(self.device)

    def update(self, model: PreTrainedModel) -> None:
        """Writes the weights, and has the server load them and empty its cache of prefixes."""
        self.updates += 1
        target = self.weights_dir / f"weights-{self.updates:06d}"  # servers cache by name, so each has its own
        try:
            mergeable(model).save_pretrained(target)
        except Exception as error:  # safetensors has its own errors
            raise StorageError(f"cannot save weights to {target}: {error!r}") from error
        load = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
        try:
            for path, body in (("/collective_rpc", load), ("/reset_prefix_cache", {})):
                self.endpoint.wait(self.endpoint.request("post", self.url + path, lambda answer: None, body=body))
        except EndpointError as error:
            raise EndpointError(f"{error}; start the server with VLLM_SERVER_DEV_MODE=1") from error
        for old in {*self.weights_dir.glob("weights-*")} - {target}:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        self.endpoint.close()
        for old in self.weights_dir.glob("weights-*"):
            shutil.rmtree(old, ignore_errors=True)

    async def _complete(self, prompt: list[int], count: int, sampling: Sampling, top: int = 0) -> list[Row]:
        """`count` completions of a prompt, with the log-probs of the `top` likeliest first tokens."""

        def read(answer: Any) -> list[Row]:
            found = {choice["index"]: choice["logprobs"] for choice in answer["choices"]}
            return [self._row(found[index], sampling.max_new_tokens) for index in range(count)]

        return await self.endpoint.request("post", "/completions", read, body={
            "model": self.model, "prompt": prompt, "n": count, "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p,
            # The server takes all other settings from the model's generation_config.json.
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": True, "stop_token_ids": self.stops, "logprobs": top, "return_tokens_as_token_ids": True})

    def _row(self, found: dict[str, Any], limit: int) -> Row:
        ids = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        logprobs = [float(value) for value in found["token_logprobs"]]
        if not all(0 <= token < len(self.tokenizer) for token in ids):
            raise ValueError(f"token ids {ids[:3]}, expected ids below {len(self.tokenizer)}")
        if len(ids) != len(logprobs) or not all(-math.inf < value <= 0 for value in logprobs):
            raise ValueError(f"log-probs {logprobs[:3]} of {len(ids)} tokens, expected a finite one <= 0 for each")
        if not 0 < len(ids) <= limit or (len(ids) < limit and ids[-1] not in self.stops):
            raise ValueError(f"{len(ids)} tokens that end in {ids[-1:]}, expected {limit} or an end with {self.stops}")
        return ids, logprobs, sorted(map(float, found["top_logprobs"][0].values()), reverse=True)

    def _check_logprobs(self) -> None:
        """Refuses a server whose log-probs do not belong to its sampling temperature."""
        gaps = []
        for temperature in (1.0, PROBE_TEMPERATURE):
            answer = self.endpoint.wait(self._complete(self.stops[:1], 1, Sampling(temperature, 1), PROBE_TOP))
            likeliest = answer[0][2][:PROBE_TOP]
            gaps.append(likeliest[0] - likeliest[-1])
        if not 0 < gaps[1] < 0.9 * gaps[0]:  # half of it, but for rounding
            raise EndpointError(f"{self.url} gives raw log-probs; start it with --logprobs-mode processed_logprobs")
