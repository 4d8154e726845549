"""Completions from a vLLM server; vLLM itself is not needed here.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

The variable opens the end points that load new weights. With `processed_logprobs`, log-probs belong to the distribution
that tokens are drawn from; by default they are at temperature 1. Prompts and completions are sent as token ids, so that
nothing depends on how the server reads or writes text.

With `sampling_replay`, and sampling that leaves tokens out, the server also needs

    --return-sampling-mask --enable-scale-out

and its model runner V2, which needs Triton. vLLM documents this in docs/training/sampling_mask.md: all requests need
top_k > 0, and answers of the end point `/inference/v1/generate` have `sampling_mask`, a list of ids for each token.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from operator import contains, itemgetter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from r1kernels.rewards.endpoint import Endpoint, EndpointError, Endpoints
from r1kernels.train.checkpoint import save_model
from r1kernels.train.errors import StorageError, naming
from r1kernels.train.parallel import first, rank, ranks
from r1kernels.train.policy import Policy
from r1kernels.train.recipe import SamplerSettings
from r1kernels.train.rollout import Collector, Sampler, Sampling

MAX_ANSWER = 2**28  # bytes: the ids and log-probs of a group of long completions
REPLAY = "--return-sampling-mask --enable-scale-out"
NOT_FINITE = -9999.0  # vLLM writes -inf and NaN so
ALL_TOKENS = 2**31 - 1  # a server with --return-sampling-mask refuses top_k -1
Row = tuple[list[int], list[float], list[torch.Tensor]]  # token ids, their log-probs, and what sampling kept


class VLLMSampler(Sampler):
    """Asks vLLM servers, with one request for each run of equal prompts. Methods raise EndpointError.

    Requests have no seed. A server's sums depend on its other requests, so a seed would not make its answers
    repeatable; seeded sampling is slow; and in vLLM 0.32 on CPUs it stops the server when a prompt is split into
    chunks. The key in VLLM_API_KEY is sent if it is set. The exceptions of `check` end what waits for a server.
    """

    settings: SamplerSettings
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    weights_dir: Path
    send: Callable[[Policy], None]

    def __init__(self, settings: SamplerSettings, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], *,
                 check: Callable[[], None] = lambda: None, replay: bool = False) -> None:
        self.settings, self.tokenizer, self.stops = settings, tokenizer, stops
        self.weights_dir, self.version = Path(settings.weights_dir or os.devnull).resolve(), ""
        self.no_top_k: dict[Endpoint, int] = {}
        begin = rank() % len(settings.urls)  # so that ranks do not all begin with the same server
        urls = [url.rstrip("/").removesuffix("/v1") for url in settings.urls[begin:] + settings.urls[:begin]]
        self.servers: Endpoints = Endpoints(urls,
                                 os.environ.get("VLLM_API_KEY"), timeout_s=settings.timeout_s, max_body=MAX_ANSWER,
                                 concurrency=max(1, settings.requests // ranks()), check=check)
        try:
            found = self.servers.ask("get", "/server_info?config_format=json", itemgetter("vllm_config"))
        except EndpointError as error:
            raise EndpointError(f"{error}; expected vLLM 0.32 or newer, with VLLM_SERVER_DEV_MODE=1") from error
        self.send = settings.weights.call(self.servers).send if settings.weights else self._save_and_load
        for server, config in zip(self.servers.servers, found, strict=True):
            model = config["model_config"]
            self.no_top_k[server] = ALL_TOKENS if model.get("return_sampling_mask") else -1
            for option, given in {"--logprobs-mode processed_logprobs": model["logprobs_mode"] == "processed_logprobs",
                                  "--enable-sleep-mode": model["enable_sleep_mode"] or not settings.sleep,
                                  REPLAY: model.get("return_sampling_mask") or not replay}.items():
                if not given:
                    needs = "'sampling_replay'" if option == REPLAY else "'sampler'"
                    raise EndpointError(f"{server.url} was started without {option}, which {needs} needs")

    def draw(self, prompts: Sequence[str], sampling: Sampling) -> Collector:
        """One completion of each prompt of this rank's share. The servers choose their own batches."""
        found = Collector(self.tokenizer, prompts, self.stops)
        groups = [[*rows] for _, rows in itertools.groupby(found.rows, key=found.prompts.__getitem__)]
        requests = [partial(self._complete, found.prompts[rows[0]], len(rows), sampling) for rows in groups]
        for number, done in self.servers.share(requests):
            for row, (tokens, logprobs, kept) in zip(groups[number], done, strict=True):
                found.token_ids[row], found.logprobs[row], found.kept[row] = tokens, logprobs, kept
        self._check_version()
        return found

    def update(self, model: Policy | str | Path) -> None:
        """From now on, samples come from these weights. The servers load those of a directory, or of a name on the hub,
        from there. They empty their caches of prefixes. All ranks must call it; the first one speaks to the servers."""
        self.version: str = first(lambda: uuid.uuid4().hex)
        first(lambda: self._wake_up("weights"))
        self.send(model) if isinstance(model, Policy) else first(lambda: self._load(model))
        first(self._finish)

    def _wake_up(self, part: str) -> None:
        if self.settings.sleep:
            self.servers.ask("post", f"/wake_up?tags={part}")

    def _finish(self) -> None:
        self._wake_up("kv_cache")  # last, because loading needs memory too
        self.servers.ask("post", "/update_weight_version", body={"new_version": self.version})
        if not all(self.servers.ask("post", "/reset_prefix_cache", itemgetter("success"))):
            raise EndpointError(f"'sampler.urls' {self.settings.urls}: a server keeps prefixes of old weights, because "
                                "other requests are in flight")

    def sleep(self) -> None:
        """Servers on the device of the trainer free its memory, until `update` wakes them up with other weights."""
        if self.settings.sleep:
            first(lambda: self.servers.ask("post", "/sleep?level=2"))

    def close(self) -> None:
        self.servers.check = lambda: None  # it may be what ends the run
        if rank() == 0:
            with contextlib.suppress(EndpointError):
                if self.settings.sleep:
                    self.servers.ask("post", "/sleep?level=2")
            self._delete_weights()
        self.servers.close()

    def _load(self, path: str | Path) -> None:
        load = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        self.servers.ask("post", "/collective_rpc", body=load)

    def _save_and_load(self, policy: Policy) -> None:
        target = self.weights_dir / f"weights-{self.version}"
        with naming(f"cannot save weights to {target}", made=StorageError):  # safetensors has its own errors
            save_model(policy, target)
        first(lambda: self._load(target))
        if rank() == 0:
            self._delete_weights(but=target)

    def _delete_weights(self, but: Any = None) -> None:
        for old in {*self.weights_dir.glob("weights-*")} - {but}:
            shutil.rmtree(old, ignore_errors=True)

    def _check_version(self) -> None:
        """Refuses samples from other weights than this process loaded, if it loaded any."""
        versions = self.servers.ask("get", "/weight_info", itemgetter("weight_version")) if self.version else []
        for server, version in zip(self.servers.servers, versions, strict=False):
            if version != self.version:
                raise EndpointError(f"{server.url} sampled from weights of version {version!r}, expected "
                                    f"{self.version!r}; it was started again, or another run loads weights into it")

    async def _complete(self, prompt: list[int], count: int, sampling: Sampling, server: Endpoint) -> list[Row]:
        """`count` completions of a prompt. One end point speaks of tokens as text, the other has what sampling kept."""

        def read(answer: Any) -> list[Row]:
            found = {choice["index"]: choice for choice in answer["choices"]}
            return [self._row(found[index], sampling) for index in range(count)]

        chosen = {
            "n": count, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            # The server takes all other settings from the model's generation_config.json.
            "top_p": sampling.top_p, "top_k": sampling.top_k or self.no_top_k[server], "min_p": sampling.min_p,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": True, "stop_token_ids": self.stops, "logprobs": 0}
        if sampling.replay:
            path, body = "/inference/v1/generate", {"token_ids": prompt, "sampling_params": chosen}
        else:
            path, body = "/v1/completions", {"prompt": prompt, "return_tokens_as_token_ids": True, **chosen}
        return await server.request("post", path, read, body=body)

    def _row(self, choice: dict[str, Any], sampling: Sampling) -> Row:
        limit, kept = sampling.max_new_tokens, []
        if sampling.replay:
            ids, values = choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]
            if (kept := choice.get("sampling_mask")) is None:
                raise ValueError(f"no 'sampling_mask'; start the server with {REPLAY}")
            if len(kept) != len(ids) or not all(map(contains, kept, ids)):
                raise ValueError(f"'sampling_mask' has {len(kept)} sets for {len(ids)} tokens, expected a set for each "
                                 "token, with the token")
        else:
            ids = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
            values = choice["logprobs"]["token_logprobs"]
        logprobs = [*map(float, values)]
        if not all(0 <= token < len(self.tokenizer) for token in ids):
            raise ValueError(f"token ids {ids[:3]}, expected ids below {len(self.tokenizer)}")
        if len(ids) != len(logprobs) or not all(NOT_FINITE < value <= 0 for value in logprobs):
            raise ValueError(f"log-probs {logprobs[:3]} of {len(ids)} tokens, expected a finite one <= 0 for each")
        if not 0 < len(ids) <= limit or (len(ids) < limit and ids[-1] not in self.stops):
            raise ValueError(f"{len(ids)} tokens that end in {ids[-1:]}, expected {limit} or an end with {self.stops}")
        return ids, logprobs, [torch.tensor(part, dtype=torch.int32) for part in kept]
