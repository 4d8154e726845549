"""The client of a vLLM server, against a server of the same protocol that samples from a real model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from rl_cases import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from r1kernels.rewards.endpoint import EndpointError
from r1kernels.train.errors import Interrupted, StorageError
from r1kernels.train.recipe import SamplerSettings
from r1kernels.train.rollout import Sampling, TransformersSampler, end_tokens
from r1kernels.train.vllm import VLLMSampler

PROMPTS = [prompt for prompt in ("3+4", "1+2+3+4+5+6", "9+9+9") for _ in range(4)]
# What `vllm serve` takes from a model's generation_config.json where a request does not say otherwise.
DEFAULTS = {"top_k": 1, "repetition_penalty": 5.0, "min_p": 0.9}


class Server(ThreadingHTTPServer):
    """What the client needs of `vllm serve`. `change` changes the completions; `fault` may answer instead."""

    daemon_threads = True

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.raw, self.dev_mode = model, tokenizer, False, True
        self.change, self.fault = lambda choices: choices, lambda handler: False
        self.log, self.lock = [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # connections that the client or a fault has closed

    @torch.no_grad()
    def complete(self, index, asked):
        generator, ids, values, tops = torch.Generator().manual_seed(index), [], [], []
        while len(ids) < asked["max_tokens"] and not (ids and ids[-1] in asked["stop_token_ids"]):
            logits = self.model(input_ids=torch.tensor([asked["prompt"] + ids])).logits[0, -1]
            sampled = (logits / asked["temperature"]).log_softmax(-1)
            shown = logits.log_softmax(-1) if self.raw else sampled
            ids.append(torch.multinomial(sampled.exp(), 1, generator=generator).item())
            values.append(shown[ids[-1]].item())
            best = shown.topk(asked["logprobs"]).indices.tolist()
            tops.append({f"token_id:{i}": shown[i].item() for i in (ids[-1], *best)})
        return {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": values, "top_logprobs": tops}


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
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "tiny"}]})
        elif self.path == "/v1/completions":
            asked = {**DEFAULTS, **body}
            plain = {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0, "ignore_eos": True}
            assert {name: asked[name] for name in plain} == plain and asked["return_tokens_as_token_ids"]
            with server.lock:
                found = [server.complete(index + len(asked["prompt"]), asked) for index in range(asked["n"])]
            choices = [{"index": i, "logprobs": logprobs} for i, logprobs in enumerate(found)][::-1]
            self.answer(200, {"choices": server.change(choices)})
        elif self.path == "/collective_rpc" and server.dev_mode:
            assert body["method"] == "reload_weights"
            with server.lock:
                server.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            self.answer(200, {"results": [None]})
        elif self.path == "/reset_prefix_cache" and server.dev_mode:
            self.answer(200, None)
        else:
            self.answer(404, {"detail": "Not Found"})

    do_GET = do_POST


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def server(tokenizer, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(make_model(tokenizer), tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def connect(server, model, tokenizer, tmp_path):
    opened = []

    def connect(**options):
        check = options.pop("check", lambda: None)
        settings = SamplerSettings(
            url=server.url, **{"weights_dir": str(tmp_path / "weights"), "timeout_s": 120.0, **options})
        opened.append(VLLMSampler(settings, tokenizer, end_tokens(model, tokenizer), check=check))
        return opened[-1]

    yield connect
    for sampler in opened:
        sampler.close()


def sample(sampler, sampling=Sampling(1.0, 6), **options):  # noqa: B008 - frozen
    return sampler.sample(PROMPTS, sampling, **options)


def gap(completions, model, temperature):
    """The largest difference between the server's log-probs and those of the model."""
    ids = torch.cat([completions.prompt_ids, completions.token_ids], 1)
    mask = torch.cat([completions.prompt_mask, completions.mask], 1).long()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits / temperature
    width = completions.token_ids.shape[1]
    logprobs = logits.log_softmax(-1)[:, -width - 1 : -1].gather(-1, completions.token_ids[..., None])[..., 0]
    return (logprobs - completions.logprobs)[completions.mask].abs().max().item()


def test_log_probs_are_those_of_the_trainer(connect, model, tokenizer):
    completions = sample(connect(), Sampling(0.7, 6))
    assert completions.finished.any() and not completions.finished.all()
    assert 0 < gap(completions, model, 0.7) < 1e-4
    oracle = sample(TransformersSampler(model, tokenizer), Sampling(0.7, 6))
    assert torch.equal(completions.prompt_ids, oracle.prompt_ids)
    assert torch.equal(completions.prompt_mask, oracle.prompt_mask)
    for name in ("token_ids", "mask", "logprobs", "finished"):
        assert getattr(completions, name).dtype == getattr(oracle, name).dtype
    for ids, mask, text, ended in zip(completions.token_ids, completions.mask, completions.texts, completions.finished,
                                      strict=True):
        assert tokenizer.decode(ids[mask], skip_special_tokens=True) == text
        assert (ids[mask][-1] == tokenizer.eos_token_id) == ended and (ended or mask.sum() == 6)


def test_the_server_gets_new_weights_and_forgets_old_ones(connect, server, model, tmp_path):
    sampler = connect()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 0.3 * torch.randn(16, 32)
    assert gap(sample(sampler), model, 1.0) > 1e-2
    for _ in range(2):
        sampler.update(model)
        assert gap(sample(sampler), model, 1.0) < 1e-4
    paths = [path for path, *_ in server.log]
    assert paths[paths.index("/collective_rpc") + 1] == "/reset_prefix_cache"
    loads = [body["kwargs"]["weights_path"] for path, body, _ in server.log if path == "/collective_rpc"]
    assert loads == [str(tmp_path / "weights" / f"weights-00000{number}") for number in (1, 2)]
    assert [entry.name for entry in (tmp_path / "weights").iterdir()] == ["weights-000002"]
    server.dev_mode = False
    with pytest.raises(EndpointError, match=r"collective_rpc.*404.*VLLM_SERVER_DEV_MODE=1"):
        sampler.update(model)
    sampler.close()
    assert not list((tmp_path / "weights").iterdir())


def test_weights_that_cannot_be_saved_are_named(connect, model, tmp_path, monkeypatch):
    def full(path):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"weights-000001.*No space left"):
        connect().update(model)


def test_groups_are_asked_for_together(connect, server):
    done = sample(connect(requests=3))
    assert len(set(done.texts)) > len(PROMPTS) // 2
    asked = [body for path, body, _ in server.log if path == "/v1/completions"][2:]
    assert [body["n"] for body in asked] == [4] * 3


def test_raw_log_probs_are_refused_before_the_run(connect, server):
    server.raw = True
    with pytest.raises(EndpointError, match=f"{server.url}.*--logprobs-mode processed_logprobs"):
        connect()


def with_logprobs(**values):
    return lambda choices: [{**choice, "logprobs": {**choice["logprobs"], **values}} for choice in choices]


@pytest.mark.parametrize(("change", "message"), [
    (with_logprobs(tokens=["token_id:7"] * 5 + ["token_id:9999"], token_logprobs=[-1.0] * 6), "ids below"),
    (with_logprobs(tokens=["token_id:-1"] * 6, token_logprobs=[-1.0] * 6), r"-1.*ids below"),
    (with_logprobs(tokens=["7"] * 5 + ["+"]), "ValueError"),
    (with_logprobs(token_logprobs=[0.5] * 6), "log-probs .0.5"),
    (with_logprobs(tokens=["token_id:7"] * 6, token_logprobs=[float("nan")] * 6), "log-probs .nan"),
    (with_logprobs(tokens=["token_id:7"] * 6, token_logprobs=[-float("inf")] * 6), "log-probs .-inf"),
    (with_logprobs(token_logprobs=[None] * 6), "TypeError"),
    (with_logprobs(tokens=["token_id:7"], token_logprobs=[-1.0]), r"1 tokens that end in .7., expected 6"),
    (with_logprobs(tokens=["token_id:7"] * 7, token_logprobs=[-1.0] * 7), "7 tokens"),
    (with_logprobs(tokens=[], token_logprobs=[]), "0 tokens"),
    (lambda choices: choices[1:], "KeyError: 3"),
    (lambda choices: [{"index": choice["index"], "logprobs": None} for choice in choices], "TypeError"),
    (lambda choices: None, "TypeError"),
])
def test_answers_that_cannot_be_right_are_refused(connect, server, change, message):
    sampler = connect()
    server.change = change
    with pytest.raises(EndpointError, match=f"{server.url}/v1 gave no usable answer to /completions .*{message}"):
        sample(sampler)


def test_no_key_follows_a_redirect(connect, server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    sampler = connect()
    assert server.log[-1][2]["Authorization"] == "Bearer secret"
    with Server(None, None) as other:
        server.fault = lambda handler: handler.answer(307, None, Location=f"{other.url}/v1/completions") or True
        with pytest.raises(EndpointError, match="307"):
            sample(sampler)
        assert not other.log


def test_what_passes_is_tried_again_and_what_does_not_is_named(connect, server):
    sampler, faults = connect(requests=1, served_name="other"), [503, 500]
    server.fault = lambda handler: bool(faults) and (handler.answer(faults.pop(), None) or True)
    assert len(sample(sampler).texts) == len(PROMPTS) and not faults
    assert {body["model"] for path, body, _ in server.log if path == "/v1/completions"} == {"other"}
    server.fault = lambda handler: handler.answer(400, {"message": "prompt is too long"}) or True
    with pytest.raises(EndpointError, match=r"400.*prompt is too long"):
        sample(sampler)


# Where a connection was just being made, the library that makes it leaves a coroutine behind.
@pytest.mark.filterwarnings("ignore:coroutine 'connect_tcp:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_does_not_wait_for_the_server(connect, server):
    release, started = threading.Event(), threading.Event()

    def hang(handler):
        started.set()
        return release.wait(600)

    def check():
        if started.is_set():
            raise Interrupted("SIGTERM")

    sampler = connect(requests=2, check=check)
    server.fault = hang
    with pytest.raises(Interrupted):
        sample(sampler)
    assert not release.is_set()
    server.fault = lambda handler: False
    started.clear()
    release.set()
    assert len(sample(sampler).texts) == len(PROMPTS)
