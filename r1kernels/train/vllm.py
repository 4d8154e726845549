"""Completions from a vLLM server; vLLM itself is not needed here.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

The variable opens the end points that load new weights. With `processed_logprobs`, log-probs are those of the
distribution that tokens are drawn from; by default they are of temperature 1. Prompts and completions travel as token
ids, so that nothing depends on how the server reads or writes text.
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
from r1kernels.train.errors import ServerError
from r1kernels.train.rollout import Collector, Completions, OnBatch, Sampling

POLL_S = 0.1
MAX_ANSWER = 2**28  # bytes: the ids and log-probs of a group of long completions
PROBE_TEMPERATURE, PROBE_TOP = 2.0, 5  # the highest temperature that vLLM allows; a server adds the sampled token

Rows = list[tuple[list[int], list[float]]]  # token ids and log-probs of completions


class VLLMSampler:
    """Samples from a vLLM server as `TransformersSampler` does, with one request for each run of equal prompts.

    Seeds come from torch's global generator. A server may still answer the same request with other tokens: its sums
    depend on what else it computes at the time.

    Args:
        url: address of the server, such as http://localhost:8000. The key in VLLM_API_KEY is sent if it is set.
        stops: the tokens that end a completion.
        model: name of the model on the server; None if there is only one.
        weights_dir: where `update` writes weights, under the same path for the server.
        device: of the tensors that are returned.
        requests: requests in flight at once.
        timeout_s: seconds for one request, retries included.
        check: called about ten times a second while requests are in flight; what it raises ends the rollout.

    Raises:
        ServerError: the server cannot be reached, serves no such model, or its log-probs are of temperature 1.
    """

    def __init__(
        self, url: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], *, model: str | None = None,
        weights_dir: str | Path | None = None, device: torch.device | str = "cpu", requests: int = 64,
        timeout_s: float = 3600.0, check: Callable[[], None] = lambda: None,
    ) -> None:
        self.url, self.tokenizer, self.stops = url.rstrip("/").removesuffix("/v1"), tokenizer, list(stops)
        self.device, self.check, self.updates = device, check, 0
        self.weights_dir = None if weights_dir is None else Path(weights_dir).resolve()
        key = os.environ.get("VLLM_API_KEY")
        self.endpoint = Endpoint(f"{self.url}/v1", key, timeout_s=timeout_s, concurrency=requests, max_body=MAX_ANSWER)
        self.model, self.positions = self._find_model(model)
        self._check_logprobs()

    def sample(self, prompts: Sequence[str], sampling: Sampling, on_batch: OnBatch | None = None) -> Completions:
        """One completion of each prompt. The server chooses its own batches."""
        found = Collector(self.tokenizer, prompts, self.stops, on_batch)
        ids, longest = found.prompts, max(map(len, found.prompts)) + sampling.max_new_tokens
        if self.positions is not None and longest > self.positions:
            raise ServerError(f"{self.url} serves {self.model} with --max-model-len {self.positions}; expected at "
                              f"least {longest} for the longest prompt and max_new_tokens {sampling.max_new_tokens}")
        seeds = torch.randint(2**62, (len(ids),)).tolist()
        runs = [list(run) for _, run in itertools.groupby(range(len(ids)), key=ids.__getitem__)]
        pending = {self.endpoint.start(self._complete(ids[run[0]], len(run), seeds[run[0]], sampling)): run
                   for run in runs}
        try:
            while pending:
                self.check()
                for future in wait(pending, POLL_S, return_when=FIRST_COMPLETED).done:
                    rows = pending.pop(future)
                    for row, (tokens, values) in zip(rows, future.result(), strict=True):
                        found.token_ids[row], found.logprobs[row] = tokens, values
                    found.finish(rows)
        except EndpointError as error:
            raise ServerError(str(error)) from error
        finally:
            for future in pending:  # the server sees the connections close and drops the requests
                future.cancel()
        return found.completions(self.device)

    def update(self, model: PreTrainedModel) -> None:
        """Writes the weights, and has the server load them and empty its cache of prefixes."""
        if self.weights_dir is None:
            raise ServerError(f"'weights_dir' is missing; expected a directory that {self.url} sees under the same path")
        self.updates += 1
        target = self.weights_dir / f"weights-{self.updates:06d}"  # servers cache by name, so each has its own
        try:
            shutil.rmtree(target, ignore_errors=True)
            model.save_pretrained(target)
        except Exception as error:  # safetensors has its own errors
            raise ServerError(f"cannot save weights to {target}: {type(error).__name__}: {error}") from error
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(target)}})
        self._post("/reset_prefix_cache")
        self._remove_weights(target)

    def close(self) -> None:
        self.endpoint.close()
        self._remove_weights(None)

    def _remove_weights(self, kept: Path | None) -> None:
        for old in self.weights_dir.glob("weights-*") if self.weights_dir else ():
            if old != kept:
                shutil.rmtree(old, ignore_errors=True)

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        try:
            self.endpoint.wait(self.endpoint.request("POST", self.url + path, body))
        except EndpointError as error:
            raise ServerError(f"{error}; start the server with VLLM_SERVER_DEV_MODE=1") from error

    async def _complete(self, prompt: list[int], count: int, seed: int, sampling: Sampling, *, top: int = 0) -> Any:
        """`count` completions of a prompt; with `top`, the log-probs of the likeliest first tokens instead."""
        answer = await self.endpoint.request("POST", "/completions", {
            "model": self.model, "prompt": prompt, "n": count, "seed": seed, "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p,
            # What is not said here, the server takes from the model's generation_config.json.
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": True, "stop_token_ids": self.stops, "logprobs": top, "return_tokens_as_token_ids": True,
        })
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(count)):
                raise ValueError(f"{len(choices)} choices, expected {count}")
            if top:
                return sorted(map(float, choices[0]["logprobs"]["top_logprobs"][0].values()), reverse=True)
            return [self._read(choice, sampling.max_new_tokens) for choice in choices]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(
                f"{self.url} sent an unexpected response ({type(error).__name__}: {error}); expected token ids with "
                "their log-probs, as vllm serve gives them") from error

    def _read(self, choice: dict[str, Any], limit: int) -> tuple[list[int], list[float]]:
        ids = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        values, most = choice["logprobs"]["token_logprobs"], len(self.tokenizer)
        if len(ids) != len(values) or not all(isinstance(value, float | int) and value <= 0 for value in values):
            raise ValueError(f"log-probs {values[:3]} of {len(ids)} tokens, expected one for each, at most 0")
        if not all(math.isfinite(value) for value in values) or not all(0 <= token < most for token in ids):
            raise ValueError(f"ids {ids[:3]} or log-probs {values[:3]}, expected ids below {most} and finite log-probs")
        if not 0 < len(ids) <= limit or (len(ids) < limit and ids[-1] not in self.stops):
            raise ValueError(f"{len(ids)} tokens that end in {ids[-1:]}, with reason {choice['finish_reason']!r}, "
                             f"expected {limit} or an end with one of {self.stops}")
        return ids, values

    def _check_logprobs(self) -> None:
        """Refuses a server whose log-probs are not those of the temperature that it samples with."""
        prompt = [self.stops[0]]
        try:
            gaps = [values[0] - values[PROBE_TOP - 1] for values in (
                self.endpoint.wait(self._complete(prompt, 1, 0, Sampling(temperature, 1), top=PROBE_TOP))
                for temperature in (1.0, PROBE_TEMPERATURE))]
        except EndpointError as error:
            raise ServerError(str(error)) from error
        if not 0 < gaps[1] < 0.9 * gaps[0]:  # half of it, but for rounding
            raise ServerError(f"{self.url} gives log-probs of temperature 1; start it with --logprobs-mode "
                              "processed_logprobs")

    def _find_model(self, wanted: str | None) -> tuple[str, int | None]:
        """The model's name, and how many tokens it may see."""
        try:
            answer = self.endpoint.wait(self.endpoint.request("GET", "/models"))
            models = {model["id"]: model.get("max_model_len") for model in answer["data"]}
        except EndpointError as error:
            raise ServerError(str(error)) from error
        except (LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url} sent an unexpected list of models ({type(error).__name__})") from error
        name = next(iter(models), None) if wanted is None else wanted
        if name not in models or (wanted is None and len(models) > 1):
            raise ServerError(f"the model is {wanted!r}; expected one that {self.url} serves: {', '.join(models)}")
        return name, models[name]
