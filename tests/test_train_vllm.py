"""The client of a vLLM server, against a server of the same protocol that samples from a real model."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1kernels.train import vllm
from r1kernels.train.importance import ImportanceConfig, importance_weights
from r1kernels.train.interrupt import Interrupted
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rollout import Sampling, TransformersSampler, end_tokens
from r1kernels.train.tiny import CorpusConfig, TinyConfig, make_model, make_tokenizer
from r1kernels.train.update import Rollout, rollout_logprobs
from r1kernels.train.vllm import VLLMError, VLLMSampler

PROMPTS = [prompt for prompt in ("Compute 3+4", "Compute 1+2+3+4+5+6", "Compute 9+9+9") for _ in range(4)]
# What `vllm serve` takes from a model's generation_config.json where a request does not say otherwise.
DEFAULTS = {"top_k": 1, "repetition_penalty": 5.0, "temperature": 0.01, "top_p": 0.1, "max_tokens": 2, "min_p": 0.9}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CorpusConfig(), 6, seed=0)


@pytest.fixture
def model(tokenizer):
    model = make_model(TinyConfig(hidden_size=32, intermediate_size=32, layers=2, heads=2), tokenizer, seed=0).eval()
    with torch.no_grad():  # so that some completions end and some do not
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 4
    return model


class Server(ThreadingHTTPServer):
    """What the client needs of `vllm serve`; `faults` are taken one a request before it is answered."""

    daemon_threads = True

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = model, tokenizer
        self.processed, self.dev_mode, self.names = True, True, {"tiny": 64}
        self.faults, self.change, self.log, self.lock = [], lambda answer: answer, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # connections that the client or a fault has closed

    @torch.no_grad()
    def complete(self, prompt, seed, asked):
        generator, ids, values, tops = torch.Generator().manual_seed(seed), [], [], []
        reason = "length"
        while len(ids) < asked["max_tokens"]:
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            sampled = (logits / asked["temperature"]).log_softmax(-1)
            shown = sampled if self.processed else logits.log_softmax(-1)
            ids.append(torch.multinomial(sampled.exp(), 1, generator=generator).item())
            values.append(shown[ids[-1]].item())
            best = [shown.argmax().item()] if asked["logprobs"] else []
            tops.append({f"token_id:{i}": shown[i].item() for i in (ids[-1], *best)})
            if ids[-1] in asked["stop_token_ids"]:
                reason = "stop"
                break
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": reason,
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in ids], "token_logprobs": values, "top_logprobs": tops,
                "text_offset": [0] * len(ids),
            },
        }


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, value):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        with server.lock:
            server.log.append((self.path, body, dict(self.headers)))
            fault = server.faults.pop(0) if server.faults else None
        if fault is not None and fault(self):
            return
        if self.path == "/v1/models":
            models = [{"id": name, "object": "model", "max_model_len": most} for name, most in server.names.items()]
            self.answer(200, {"object": "list", "data": models})
        elif self.path == "/v1/completions":
            asked = {**DEFAULTS, **{name: value for name, value in body.items() if value is not None}}
            plain = {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0}
            assert {name: asked[name] for name in plain} == plain and asked["ignore_eos"]
            assert asked["return_tokens_as_token_ids"]
            with server.lock:
                found = [server.complete(body["prompt"], body["seed"] + i, asked) for i in range(body["n"])]
            choices = [{"index": i, **choice} for i, choice in enumerate(found)][::-1]
            self.answer(200, server.change({"model": body["model"], "choices": choices}))
        elif self.path == "/collective_rpc" and server.dev_mode:
            assert body["method"] == "reload_weights"
            with server.lock:
                server.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            self.answer(200, {"results": [None]})
        elif self.path == "/reset_prefix_cache" and server.dev_mode:
            self.answer(200, None)
        else:
            self.answer(404, {"detail": "Not Found"})


def says(status, message):
    def fault(handler):
        handler.answer(status, {"error": {"message": message, "code": status}})
        return True

    return fault


def hangs_up(handler):
    handler.connection.close()
    return True


@pytest.fixture
def server(model, tokenizer):
    with Server(make_copy(model), tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def make_copy(model):
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.fixture
def connect(server, model, tokenizer, monkeypatch):
    monkeypatch.setattr(vllm, "FIRST_WAIT_S", 0.01)
    opened = []

    def connect(**options):
        opened.append(VLLMSampler(server.url, tokenizer, end_tokens(model, tokenizer), **options))
        return opened[-1]

    yield connect
    for sampler in opened:
        sampler.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vllm")]


def sample(sampler, sampling, prompts=PROMPTS, seed=0, **options):
    with torch_seeded(seed, "vllm"):
        return sampler.sample(prompts, sampling, **options)


def gap(completions, model, temperature, settings=ImportanceConfig("truncate")):  # noqa: B008 - frozen
    """Weights and metrics between the rollout and the model that is trained."""
    zeros = torch.zeros_like(completions.logprobs)
    rollout = Rollout(
        completions.prompt_ids, completions.prompt_mask, completions.token_ids, completions.mask,
        zeros[:, 0], zeros, zeros,
    )
    batches = torch.arange(len(zeros)).split(5)
    trained = rollout_logprobs(model, rollout, batches, temperature=temperature, check=lambda: None)
    return importance_weights(completions.logprobs, trained, completions.mask, settings)


def test_log_probs_are_those_of_the_trainer(connect, model, tokenizer):
    completions = sample(connect(), Sampling(0.7, 48))
    assert completions.finished.any() and not completions.finished.all()
    weights, metrics = gap(completions, model, 0.7)
    assert 0 < metrics["logprob_gap_max"] < 1e-4 and metrics["importance_cut"] == 0
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-4)
    for row, text in enumerate(completions.texts):
        ids = completions.token_ids[row][completions.mask[row]].tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert (ids[-1] == tokenizer.eos_token_id) == bool(completions.finished[row])
        assert completions.finished[row] or len(ids) == 48
    oracle = sample(TransformersSampler(model, tokenizer), Sampling(0.7, 48))
    assert torch.equal(completions.prompt_ids, oracle.prompt_ids)
    assert torch.equal(completions.prompt_mask, oracle.prompt_mask)
    for name in ("token_ids", "mask", "logprobs", "finished"):
        assert getattr(completions, name).dtype == getattr(oracle, name).dtype


def test_the_gap_of_other_weights_shows_until_the_server_has_them(connect, server, model, tmp_path):
    sampler = connect(weights_dir=tmp_path / "weights")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.3 * torch.randn(32, 32)
    weights, stale = gap(sample(sampler, Sampling(1.0, 12)), model, 1.0)
    assert stale["logprob_gap_mean"] > 1e-2 and stale["rollout_kl_k3"] > 1e-4 and stale["importance_ess"] < 1
    assert weights.max() <= 2.0 and not torch.allclose(weights, torch.ones_like(weights), atol=1e-2)
    for _ in range(2):
        sampler.update(model)
        _, fresh = gap(sample(sampler, Sampling(1.0, 12)), model, 1.0)
        assert fresh["logprob_gap_max"] < 1e-4
    loads = [body["kwargs"]["weights_path"] for path, body, _ in server.log if path == "/collective_rpc"]
    assert loads == [str(tmp_path / "weights" / f"weights-00000{number}") for number in (1, 2)]
    paths = [path for path, *_ in server.log]
    assert paths[paths.index("/collective_rpc") + 1] == "/reset_prefix_cache"
    assert [entry.name for entry in (tmp_path / "weights").iterdir()] == ["weights-000002"]
    sampler.close()
    assert not list((tmp_path / "weights").iterdir())


def test_seeds_decide_and_differ_between_rows(connect, server):
    sampler, before = connect(requests=3), torch.get_rng_state()
    first, again, other = (sample(sampler, Sampling(1.0, 8), seed=seed).texts for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) > len(PROMPTS) // 2
    assert torch.equal(before, torch.get_rng_state())
    asked = [body for path, body, _ in server.log if path == "/v1/completions"]
    assert [body["n"] for body in asked] == [4] * 9 and len({body["seed"] for body in asked}) == 6


def test_rows_are_reported_as_they_come(connect):
    reports = []
    done = sample(connect(requests=1), Sampling(1.0, 8), on_batch=lambda *report: reports.append(report))
    assert len(reports) == 3 and sorted(row for rows, *_ in reports for row in rows) == list(range(12))
    for rows, texts, lengths in reports:
        assert texts == [done.texts[row] for row in rows] and lengths == done.lengths[rows].tolist()


def test_log_probs_of_another_temperature_are_refused(connect, server, model):
    server.processed = False
    sampler = connect()
    assert gap(sample(sampler, Sampling(1.0, 6)), model, 1.0)[1]["logprob_gap_max"] < 1e-4
    with pytest.raises(VLLMError, match=r"expected those of 0\.7: start it with --logprobs-mode processed_logprobs"):
        sample(sampler, Sampling(0.7, 6))
    # An evaluation needs no log-probs; those after top-p are not passed on.
    completions = sample(sampler, Sampling(0.6, 6, top_p=0.95))
    assert completions.logprobs[completions.mask].isnan().all()
    with pytest.raises(ValueError, match="has log-prob nan in the rollout"):
        gap(completions, model, 0.6)


def test_what_passes_is_tried_again(connect, server):
    sampler = connect(requests=1)
    calm = sample(sampler, Sampling(1.0, 6)).texts
    server.faults = [says(503, "busy"), hangs_up, says(429, "slow down"), says(500, "oh")]
    assert sample(sampler, Sampling(1.0, 6)).texts == calm
    server.faults = [says(500, "EngineCore died")] * 99
    with pytest.raises(VLLMError, match="completions failed 6 times, the last time with HTTP 500: EngineCore died"):
        sample(sampler, Sampling(1.0, 6))
    server.faults = []
    assert sample(sampler, Sampling(1.0, 6)).texts == calm
    server.faults = [says(400, "prompt is too long")]
    count = len(server.log)
    with pytest.raises(VLLMError, match="HTTP 400: prompt is too long"):
        sample(sampler, Sampling(1.0, 6), prompts=PROMPTS[:1])
    assert len(server.log) == count + 1


def without(key):
    def change(answer):
        for choice in answer["choices"]:
            choice["logprobs"].pop(key)
        return answer

    return change


def with_choice(**values):
    return lambda answer: {"choices": [{**choice, **values} for choice in answer["choices"]]}


@pytest.mark.parametrize("change, message", [
    (without("tokens"), "KeyError: 'tokens'"),
    (without("token_logprobs"), "KeyError: 'token_logprobs'"),
    (with_choice(logprobs=None), "no logprobs"),
    (with_choice(logprobs={"tokens": ["7", "+"], "token_logprobs": [-1.0, -1.0]}), "tokens such as .*token_id:N"),
    (with_choice(logprobs={"tokens": ["token_id:7"], "token_logprobs": [None]}), "log-probs that are not numbers"),
    (with_choice(logprobs={"tokens": ["token_id:7"], "token_logprobs": [-1.0]}), r"1 tokens, the last one \[7\], and"),
    (with_choice(logprobs={"tokens": [], "token_logprobs": []}), "0 tokens"),
    (lambda answer: {"choices": answer["choices"][1:]}, "3 choices, expected 4"),
    (lambda answer: {"object": "error"}, "KeyError: 'choices'"),
    (lambda answer: [], "TypeError"),
])
def test_answers_of_another_protocol_are_refused(connect, server, change, message):
    server.change = change
    with pytest.raises(VLLMError, match=f"answers /v1/completions with what is not understood .*{message}"):
        sample(connect(), Sampling(1.0, 6))


def test_a_stop_does_not_wait_for_the_server(connect, server):
    release, started = threading.Event(), threading.Event()

    def hangs(handler):
        started.set()
        release.wait(30)
        return hangs_up(handler)

    def check():
        if started.is_set():
            raise Interrupted("SIGTERM")

    sampler = connect(requests=2, check=check)
    server.faults = [hangs] * 2
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        sample(sampler, Sampling(1.0, 6))
    assert time.monotonic() - begun < 20  # the server would have taken 30
    release.set()
    started.clear()
    server.faults = []
    assert len(sample(sampler, Sampling(1.0, 6)).texts) == len(PROMPTS)


def test_servers_and_models_that_are_not_there(connect, server, tokenizer, model, tmp_path, monkeypatch):
    for url in ("localhost:8000", "ftp://localhost", "http://", "http://localhost:port"):
        with pytest.raises(VLLMError, match=f"the server's url is '{url}', expected one such as http"):
            VLLMSampler(url, tokenizer, [1])
    with pytest.raises(VLLMError, match=r"/v1/models failed 2 times, the last time with ConnectionRefusedError"):
        VLLMSampler("http://127.0.0.1:1", tokenizer, [1], retries=1)
    with pytest.raises(VLLMError, match=r"the model is 'other', expected one that .* serves: tiny"):
        connect(model="other")
    with pytest.raises(VLLMError, match=r"serves tiny with --max-model-len 64, expected \d+ at least"):
        sample(connect(), Sampling(1.0, 60))
    server.names["second"] = None
    with pytest.raises(VLLMError, match=r"the model is None, expected one that .* serves: tiny, second"):
        connect()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    sampler = connect(model="second", weights_dir=tmp_path)
    assert sample(sampler, Sampling(1.0, 60)).token_ids.shape[1] <= 60
    assert {body["model"] for path, body, _ in server.log if path == "/v1/completions"} == {"second"}
    assert server.log[-1][2]["Authorization"] == "Bearer secret"
    server.dev_mode = False
    with pytest.raises(VLLMError, match=r"collective_rpc: HTTP 404.* started with VLLM_SERVER_DEV_MODE=1"):
        sampler.update(model)
    with pytest.raises(VLLMError, match="no weights_dir is set"):
        connect(model="tiny").update(model)
    (tmp_path / "file").touch()
    with pytest.raises(VLLMError, match=r"cannot save weights to .*: "):
        connect(model="tiny", weights_dir=tmp_path / "file").update(model)


def test_the_url_may_end_with_v1(connect, server, tokenizer):
    sampler = VLLMSampler(server.url + "/v1/", tokenizer, [tokenizer.eos_token_id])
    assert math.isfinite(sample(sampler, Sampling(1.0, 4)).logprobs.sum())
    sampler.close()
