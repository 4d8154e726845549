"""Weights go to vLLM servers over NCCL, from GPU to GPU, in place of files: see README.md. vLLM is not needed here.

The trainer is rank 0 of an NCCL group, and the workers of the servers follow. The servers are told the names and shapes
of all weights, and then the trainer broadcasts one after another.
"""

from __future__ import annotations

import base64
import itertools
import threading
from concurrent.futures import Future
from operator import itemgetter

import torch
from torch.cuda import nccl
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from r1kernels.rewards import EndpointError
from r1kernels.rewards.endpoint import Endpoints
from r1kernels.train.parallel import first, rank
from r1kernels.train.policy import Policy


class NCCLWeights:
    """Methods raise EndpointError. They end if a server fails, because NCCL would wait for it without end."""

    def __init__(self, servers: Endpoints) -> None:
        self.servers, self.group = servers, None
        for server, config in zip(servers.servers, servers.ask("get", "/server_info?config_format=json"), strict=True):
            found = config["vllm_config"]["weight_transfer_config"] or {}
            if found.get("backend") != "nccl":
                raise EndpointError(f"{server.url} was started without --weight-transfer-config.backend nccl")

    def join(self, device: torch.device) -> object:
        """The NCCL group of this process and all workers."""
        sizes, joined = self.servers.ask("get", "/get_world_size", itemgetter("world_size")), Future()
        size, key = 1 + sum(sizes), nccl.unique_id()

        def join() -> None:
            try:
                with torch.cuda.device(device):
                    group = nccl.init_rank(size, key, 0)
                    nccl.all_reduce([torch.zeros(1, device=device)], comms=[group])  # which vLLM's workers do first
                joined.set_result(group)
            except Exception as error:
                joined.set_exception(EndpointError(f"cannot form an NCCL group of {size} processes: {error!r}"))

        threading.Thread(target=join, daemon=True).start()
        known = {"nccl_unique_id_b64": base64.b64encode(key).decode(), "world_size": size}
        ranks = itertools.accumulate(sizes[:-1], initial=1)
        return self.servers.wait([joined, *(
            server.start(server.request("post", "/init_weight_transfer_engine", bool,
                                        body={"init_info": known | {"rank_offset": rank}}))
            for server, rank in zip(self.servers.servers, ranks, strict=True))])[0]

    def send(self, policy: Policy) -> None:
        """Sends the weights, with adapters merged, under their names in a checkpoint. All ranks must call it."""
        state = {name: weight for name, weight in policy.weights(policy.dtype) if rank() == 0}
        first(lambda: self._send(policy.model, state))

    def _send(self, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
        weights = {name: weight.contiguous() for name, weight in revert_weight_conversion(model, state).items()}
        info = {"names": [*weights], "shapes": [[*weight.shape] for weight in weights.values()],
                "dtype_names": [str(weight.dtype).removeprefix("torch.") for weight in weights.values()]}
        self.group = self.group or self.join(model.device)
        self.servers.ask("post", "/start_weight_update")
        receiving = [server.start(server.request("post", "/update_weights", bool, body={"update_info": info}))
                     for server in self.servers.servers]
        with torch.cuda.device(model.device):
            for weight in weights.values():
                nccl.broadcast([weight], comms=[self.group])
                sent = torch.cuda.Event()
                sent.record()
                while not sent.query():
                    self.servers.ended(receiving, 0.001)
        self.servers.wait(receiving)
        self.servers.ask("post", "/finish_weight_update")
