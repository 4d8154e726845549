"""A server that answers as `vllm serve` does, as far as the client needs it, and samples from a real model."""

import base64
import contextlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import torch
from transformers import AutoModelForCausalLM

# What `vllm serve` takes from a model's generation_config.json where a request does not say otherwise.
DEFAULTS = {"top_k": 1, "repetition_penalty": 5.0, "min_p": 0.9}
LOADING = threading.Lock()  # transformers cannot load two models at the same time


class Server(ThreadingHTTPServer):
    """`change` changes the completions; `fault` may answer instead, and `wait` is called before completions."""

    daemon_threads = True

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.logprobs_mode, self.dev_mode = model, tokenizer, "processed_logprobs", True
        self.change, self.fault, self.wait = lambda choices: choices, lambda handler: False, lambda: None
        self.log, self.lock, self.version = [], threading.Lock(), "default"
        self.sleep_mode, self.asleep, self.sampling_mask = True, set(), False
        self.transfer, self.workers, self.nccl, self.updating = None, 1, None, False
        self.in_flight, self.most_in_flight, self.cache_in_use = 0, 0, False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path):
        """What was sent to a path so far."""
        return [body for one, body, _ in self.log if one == path]

    def handle_error(self, request, client_address):
        pass  # connections that the client or a fault has closed

    @torch.no_grad()
    def complete(self, index, asked):
        """A choice of `/v1/completions`, or of `/inference/v1/generate`, which has what sampling kept: top-k."""
        prompt = asked.get("token_ids") or asked["prompt"]
        generator, ids, values, sets = torch.Generator().manual_seed(index + len(prompt)), [], [], []
        while len(ids) < asked["max_tokens"] and not (ids and ids[-1] in asked["stop_token_ids"]):
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            kept = logits.topk(min(asked["top_k"] % 2**31, len(logits))).indices  # -1 is all
            sampled = torch.full_like(logits, -math.inf).scatter(0, kept, logits[kept] / asked["temperature"])
            sampled = sampled.log_softmax(-1)
            sets.append(kept.tolist())
            ids.append(torch.multinomial(sampled.exp(), 1, generator=generator).item())
            values.append(sampled[ids[-1]].item())
        if "token_ids" not in asked:
            return {"index": index, "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": values}}
        content = [{"token_id": token, "logprob": value} for token, value in zip(ids, values, strict=True)]
        return {"index": index, "token_ids": ids, "logprobs": {"content": content}, "sampling_mask": sets}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, value, **headers):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        with server.lock:
            server.log.append((self.path, body, self.headers))
        if server.fault(self):
            return
        route = urlsplit(self.path)
        found = getattr(self, route.path.strip("/").replace("/", "_"), None)
        if found is None or not (server.dev_mode or route.path.startswith("/v1/")):
            self.answer(404, {"detail": "Not Found"})
        else:
            self.answer(200, found(body, parse_qs(route.query)))

    do_GET = do_POST

    def server_info(self, body, query):
        assert query == {"config_format": ["json"]}
        model = {"logprobs_mode": self.server.logprobs_mode, "enable_sleep_mode": self.server.sleep_mode,
                 "return_sampling_mask": self.server.sampling_mask}
        return {"vllm_config": {"model_config": model, "weight_transfer_config": self.server.transfer}}

    def v1_completions(self, body, query):
        server, asked = self.server, {**DEFAULTS, **body}
        assert not server.asleep
        plain = {"repetition_penalty": 1.0, "min_p": 0.0, "ignore_eos": True}
        assert {name: asked[name] for name in plain} == plain
        assert "token_ids" in asked or asked["return_tokens_as_token_ids"]
        assert asked["top_k"] > 0 if server.sampling_mask else asked["top_k"] == -1
        with server.lock:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        server.wait()
        with server.lock:
            found = [server.complete(index, asked) for index in range(asked["n"])]
            server.in_flight -= 1
        return {"choices": server.change(found[::-1])}

    def inference_v1_generate(self, body, query):
        assert self.server.sampling_mask
        return self.v1_completions({"token_ids": body["token_ids"], **body["sampling_params"]}, query)

    def collective_rpc(self, body, query):
        assert body["method"] == "reload_weights" and "weights" not in self.server.asleep
        with LOADING:
            self.server.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        return {"results": [None]}

    def update_weight_version(self, body, query):
        self.server.version = body["new_version"]
        return {"success": True, "new_version": self.server.version}

    def weight_info(self, body, query):
        return {"weight_version": self.server.version}

    def get_world_size(self, body, query):
        return {"world_size": self.server.workers}

    def init_weight_transfer_engine(self, body, query):
        assert self.server.transfer == {"backend": "nccl"}
        info = body["init_info"]
        self.server.ranks = range(info["rank_offset"], info["rank_offset"] + self.server.workers)
        self.server.nccl.join(base64.b64decode(info["nccl_unique_id_b64"]), self.server.ranks, info["world_size"])
        return {"message": "Weight transfer initialized"}

    def start_weight_update(self, body, query):
        self.server.updating = True
        return {"message": "Weight update started"}

    def update_weights(self, body, query):
        assert self.server.updating
        info = body["update_info"]
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            for rank in self.server.ranks:
                weight = self.server.nccl.receive(rank)
                assert (str(weight.dtype), [*weight.shape]) == (f"torch.{dtype}", shape)
            with torch.no_grad():
                self.server.model.get_parameter(name).copy_(weight)
        return {"message": "Weights updated"}

    def finish_weight_update(self, body, query):
        assert self.server.updating
        self.server.updating = False
        return {"message": "Weight update finished"}

    def sleep(self, body, query):
        assert query == {"level": ["2"]}
        self.server.asleep, self.server.model = {"weights", "kv_cache"}, None
        return {"status": "sleeping", "level": 2}

    def wake_up(self, body, query):
        self.server.asleep -= {*query["tags"]}
        return {"status": "sleeping" if self.server.asleep else "awake", "tags": query["tags"]}

    def reset_prefix_cache(self, body, query):
        assert not self.server.asleep
        return {"success": not self.server.cache_in_use}


@contextlib.contextmanager
def serving(model, tokenizer):
    with Server(model, tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
