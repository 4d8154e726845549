"""The client of vLLM servers, against servers of the same protocol that sample from a real model."""

import contextlib
import copy
import dataclasses
import json
import threading

import pytest
import torch
from rl_cases import make_model, make_tokenizer, policy_of, stage_of
from vllm_cases import Server, serving

from r1kernels.rewards.endpoint import EndpointError
from r1kernels.train import reject
from r1kernels.train.errors import DataError, Interrupted, StorageError
from r1kernels.train.evaluate import evaluate_model
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.recipe import SamplerSettings
from r1kernels.train.rollout import Sampling, TransformersSampler, end_tokens
from r1kernels.train.stage import Stage
from r1kernels.train.vllm import VLLMSampler

PROMPTS = [prompt for prompt in ("3+4", "1+2+3+4+5+6", "9+9+9") for _ in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def server(tokenizer, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(make_model(tokenizer), tokenizer) as server:
        yield server


@pytest.fixture
def second(tokenizer):
    with serving(make_model(tokenizer, seed=1), tokenizer) as server:
        yield server


@pytest.fixture
def connect(server, model, tokenizer, tmp_path):
    opened = []

    def connect(**options):
        check, replay = options.pop("check", lambda: None), options.pop("replay", False)
        given = {"urls": [server.url], "weights_dir": str(tmp_path / "weights"), "timeout_s": 120.0, **options}
        settings = SamplerSettings(kind="vllm", **given)
        opened.append(VLLMSampler(settings, tokenizer, end_tokens(model, tokenizer), check=check,
                                  replay=replay))
        return opened[-1]

    yield connect
    for sampler in opened:
        if sampler.servers.servers[0].close.alive:
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
    versions = []
    for _ in range(2):
        sampler.update(policy_of(copy.deepcopy(model)))
        versions.append(server.version)
        assert gap(sample(sampler), model, 1.0) < 1e-4
    paths = [path for path, *_ in server.log]
    assert paths.index("/collective_rpc") < paths.index("/reset_prefix_cache")
    loads = [body["kwargs"]["weights_path"] for body in server.bodies("/collective_rpc")]
    assert loads == [str(tmp_path / "weights" / f"weights-{version}") for version in versions]
    assert [entry.name for entry in (tmp_path / "weights").iterdir()] == [f"weights-{versions[1]}"]
    sampler.close()
    assert not list((tmp_path / "weights").iterdir())


def test_weights_that_cannot_be_saved_are_named(connect, model, tmp_path, monkeypatch):
    def full(path, **options):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"/weights-\w+: .*No space left"):
        connect().update(policy_of(model))


def test_groups_are_asked_for_together(connect, server):
    done = sample(connect(requests=3))
    assert len(set(done.texts)) > len(PROMPTS) // 2
    assert [body["n"] for body in server.bodies("/v1/completions")] == [4] * 3


@pytest.mark.parametrize(("name", "value", "message"), [
    ("logprobs_mode", "raw_logprobs", "--logprobs-mode processed_logprobs"),
    ("sleep_mode", False, "--enable-sleep-mode"),
    ("dev_mode", False, "/server_info.*404.*VLLM_SERVER_DEV_MODE=1"),
])
def test_a_server_that_was_started_otherwise_is_refused_before_the_run(connect, server, second, name, value, message):
    setattr(second, name, value)
    with pytest.raises(EndpointError, match=f"{second.url} .*{message}"):
        connect(urls=[server.url, second.url], sleep=True)


def with_logprobs(**values):
    return lambda choices: [{**choice, "logprobs": {**choice["logprobs"], **values}} for choice in choices]


@pytest.mark.parametrize(("change", "message"), [
    (with_logprobs(tokens=["token_id:7"] * 5 + ["token_id:9999"], token_logprobs=[-1.0] * 6), "ids below"),
    (with_logprobs(tokens=["token_id:-1"] * 6, token_logprobs=[-1.0] * 6), r"-1.*ids below"),
    (with_logprobs(tokens=["7"] * 5 + ["+"]), "ValueError"),
    (with_logprobs(token_logprobs=[0.5] * 6), "log-probs .0.5"),
    (with_logprobs(tokens=["token_id:7"] * 6, token_logprobs=[float("nan")] * 6), "log-probs .nan"),
    (with_logprobs(tokens=["token_id:7"] * 6, token_logprobs=[-float("inf")] * 6), "log-probs .-inf"),
    (with_logprobs(tokens=["token_id:7"] * 6, token_logprobs=[-9999.0] * 6), "log-probs .-9999"),
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
    with pytest.raises(EndpointError, match=f"{server.url} gave no usable answer to /v1/completions .*{message}"):
        sample(sampler)


KEPT = Sampling(0.7, 6, top_k=5, replay=True)


def test_the_server_says_what_sampling_kept(connect, server, model):
    """Log-probs are over the sets. Other requests to this server need a top-k too, which then keeps every token."""
    server.sampling_mask = True
    done = sample(connect(replay=True), KEPT)
    asked = [body["sampling_params"] for body in server.bodies("/inference/v1/generate")]
    assert [(one["n"], one["top_k"]) for one in asked] == [(4, 5)] * 3
    for row, (ids, counts) in enumerate(done.supports):
        assert ids.dtype == counts.dtype == torch.int32 and counts.tolist() == [5] * done.lengths[row]
        prompt, tokens = done.prompt_ids[row][done.prompt_mask[row]], done.token_ids[row][done.mask[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
        kept = ids.long().view(-1, 5)
        expected = logits.gather(-1, kept).log_softmax(-1)[kept == tokens[:, None]]
        torch.testing.assert_close(done.logprobs[row][done.mask[row]], expected, rtol=1e-4, atol=1e-4)
    whole = sample(connect(), Sampling(1.0, 6))
    assert whole.supports is None and gap(whole, model, 1.0) < 1e-4
    assert all(body["top_k"] > 10**6 for body in server.bodies("/v1/completions"))


def without(key):
    return lambda choices: [{name: value for name, value in choice.items() if name != key} for choice in choices]


def with_sets(change):
    return lambda choices: [{**choice, "sampling_mask": change(choice["sampling_mask"])} for choice in choices]


@pytest.mark.parametrize(("change", "message"), [
    (without("sampling_mask"), "'sampling_mask'.*--return-sampling-mask --enable-scale-out"),
    (with_sets(lambda sets: None), "'sampling_mask'.*--return-sampling-mask --enable-scale-out"),
    (with_sets(lambda sets: sets[1:]), r"'sampling_mask' has \d sets for \d tokens"),
    (with_sets(lambda sets: [*sets, [1]]), r"'sampling_mask' has \d sets for \d tokens"),
    (with_sets(lambda sets: [[], *sets[1:]]), "'sampling_mask'.*with the token"),
    (with_sets(lambda sets: [[999] * len(one) for one in sets]), "'sampling_mask'.*with the token"),
    (with_sets(lambda sets: [[*one, 2**40] for one in sets]), "RuntimeError.*overflow"),
    (with_sets(lambda sets: 3), "TypeError"),
    (without("token_ids"), "KeyError: 'token_ids'"),
    (without("logprobs"), "KeyError: 'logprobs'"),
    (lambda choices: [{**choice, "logprobs": {"content": []}} for choice in choices], "log-probs .. of"),
])
def test_sets_that_cannot_be_right_are_refused(connect, server, change, message):
    server.sampling_mask = True
    sampler = connect(replay=True)
    server.change = change
    with pytest.raises(EndpointError, match=f"{server.url} .*/inference/v1/generate .*{message}"):
        sample(sampler, KEPT)


def test_a_server_without_sets_is_refused_where_they_are_needed(connect, server, second):
    server.sampling_mask = True
    with pytest.raises(EndpointError, match=f"{second.url} .*--return-sampling-mask .*'sampling_replay'"):
        connect(urls=[server.url, second.url], replay=True)


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
    sampler, faults = connect(requests=1), [503, 500]
    server.fault = lambda handler: bool(faults) and (handler.answer(faults.pop(), None) or True)
    assert len(sample(sampler).texts) == len(PROMPTS) and not faults
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


def test_servers_share_the_requests_and_each_has_few_in_flight(connect, server, second, model):
    """The first is slow, so the second gets most of the work; neither has more than two requests at once."""
    sampler, release = connect(urls=[server.url, f"{second.url}/v1/"], requests=2), threading.Event()
    sampler.update(policy_of(copy.deepcopy(model)))
    server.wait = lambda: release.wait(60)

    def wait():
        if len(second.bodies("/v1/completions")) == 8:
            release.set()

    second.wait = wait
    prompts = [str(number) for number in range(10)]
    done = sampler.sample(prompts, Sampling(1.0, 6))
    assert [len(one.bodies("/v1/completions")) for one in (server, second)] == [2, 8]
    assert server.most_in_flight == 2 and second.most_in_flight <= 2
    asked = [body["prompt"] for one in (server, second) for body in one.bodies("/v1/completions")]
    assert sorted(asked) == sorted(
        ids[mask].tolist() for ids, mask in zip(done.prompt_ids, done.prompt_mask, strict=True))
    assert gap(done, model, 1.0) < 1e-4  # both have the same weights, whatever they had before


def test_servers_load_weights_at_the_same_time(connect, server, second, model):
    both = threading.Barrier(2, timeout=600)

    def meet(handler):
        return handler.path == "/collective_rpc" and both.wait() > 1

    server.fault = second.fault = meet
    sampler = connect(urls=[server.url, second.url])
    sampler.update(policy_of(copy.deepcopy(model)))
    assert server.version == second.version != "default"


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc"])
def test_a_server_that_fails_is_named(connect, server, second, model, path):
    sampler = connect(urls=[server.url, second.url])
    sampler.update(policy_of(copy.deepcopy(model)))
    second.fault = lambda handler: handler.path == path and (handler.answer(400, {"message": "no"}) or True)
    with pytest.raises(EndpointError, match=f"{second.url} .*{path}"):
        sampler.update(policy_of(copy.deepcopy(model)))
        sample(sampler)


def test_samples_of_a_server_that_was_started_again_are_refused(connect, server, second, model):
    sampler, version = connect(urls=[server.url, second.url]), second.version
    sampler.update(policy_of(copy.deepcopy(model)))
    sample(sampler)
    second.version = version
    with pytest.raises(EndpointError, match=f"{second.url} .*'default'"):
        sample(sampler)


def test_an_old_cache_of_prefixes_is_refused(connect, server, model):
    server.cache_in_use = True
    with pytest.raises(EndpointError, match=f"'sampler.urls'.*{server.url}.*prefixes of old weights"):
        connect().update(policy_of(model))


def test_servers_on_the_trainers_device_sleep_during_updates(connect, server, model):
    """The weights wake up first, and are loaded before memory is used for the cache."""
    sampler = connect(sleep=True)
    sampler.sleep()
    for _ in range(2):
        sampler.update(policy_of(copy.deepcopy(model)))
        assert gap(sample(sampler), model, 1.0) < 1e-4
        sampler.sleep()
        assert server.asleep
    paths = [path for path, *_ in server.log]
    first = paths.index("/wake_up?tags=weights")
    assert paths[first : first + 5] == [
        "/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/update_weight_version",
        "/reset_prefix_cache"]
    sampler.update(policy_of(copy.deepcopy(model)))
    sampler.close()
    assert server.asleep
    other = connect()
    other.sleep()
    other.close()
    assert [path for path, *_ in server.log][-1] == "/server_info?config_format=json"  # no request to sleep


def test_the_end_of_a_run_does_not_hide_why_it_ends(connect, server, model):
    def check():
        if server.bodies("/v1/completions"):
            raise Interrupted("SIGTERM")

    sampler = connect(sleep=True, check=check)
    sampler.update(policy_of(copy.deepcopy(model)))
    server.fault = lambda handler: handler.path.startswith("/sleep") and (handler.answer(400, None) or True)
    with pytest.raises(Interrupted), contextlib.closing(sampler):
        sample(sampler)
    assert server.bodies("/sleep?level=2")


class TestStages:
    """Every stage that samples asks the server, which loads a finished model from its directory."""

    @pytest.fixture
    def stage(self, server, tmp_path, monkeypatch):
        def no_model(*arguments, **options):
            raise AssertionError("a model is loaded only to sample")

        def stage(*overrides, load=False):
            found = stage_of(tmp_path, [f".sampler.urls=[{server.url}]", ".sampler.kind=vllm",
                                        f".sampler.weights_dir={tmp_path}/weights", ".eval.questions=3", *overrides])
            if not load:
                monkeypatch.setattr(Stage, "load_model", no_model)
            return found

        return stage

    @pytest.mark.parametrize("config", [True, False])
    def test_evaluation(self, stage, server, tmp_path, config):
        one = stage()
        if not config:
            (tmp_path / "base/generation_config.json").unlink()
        found = evaluate_model(one, "base")
        assert found["questions"] == 3 and found["length"] > 0
        assert [body["kwargs"]["weights_path"] for body in server.bodies("/collective_rpc")] == [str(tmp_path / "base")]
        assert all(body["stop_token_ids"] == [1] for body in server.bodies("/v1/completions"))
        assert (tmp_path / "base/model.safetensors").exists()

    def test_rejection(self, stage, server, tmp_path):
        one = stage(".stages.traces={kind: reject, model: base, problems: [sums], questions: 2, "
                    "max_new_tokens: 6}")
        one = dataclasses.replace(one, settings=one.recipe.stages["traces"])
        with pytest.raises(DataError, match="'samples': 32"):  # noise answers no question
            reject.run(one)
        assert [body["n"] for body in server.bodies("/v1/completions")] == [16] * 2

    def test_grpo_with_its_evaluations(self, stage, server, tmp_path):
        summary = GRPOTrainer(stage("steps=2", ".sampler.sleep=true", load=True)).run()
        assert len(server.bodies("/collective_rpc")) == 3
        assert summary["evaluation"]["questions"] == 3
        # Two evaluations of 3 questions and two rollouts of 4.
        assert len(server.bodies("/v1/completions")) == 2 * 3 + 2 * 4
        assert len(server.bodies("/sleep?level=2")) == 3  # and the end of the stage
        lines = [json.loads(line) for line in (tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()]
        assert all(line["logprob_gap_max"] < 1e-3 for line in lines[:2])

    def test_grpo_over_what_the_server_kept(self, stage, server, tmp_path):
        server.sampling_mask = True
        GRPOTrainer(stage("steps=1", "top_k=5", load=True)).run()
        line = json.loads((tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()[0])
        assert line["logprob_gap_max"] < 1e-3 and line["first_ratio_deviation"] < 1e-4
        assert len(server.bodies("/inference/v1/generate")) == 4 and len(server.bodies("/v1/completions")) == 2 * 3
        server.sampling_mask = False
        with pytest.raises(EndpointError, match=f"{server.url} .*--return-sampling-mask"):
            GRPOTrainer(stage("steps=1", "top_k=5", load=True))

    def test_a_run_that_goes_on_with_updates_leaves_the_device_to_them(self, stage, server, tmp_path):
        """The checkpoint holds a rollout, and the server is awake."""
        one = stage("steps=1", ".sampler.sleep=true", load=True)
        trainer = GRPOTrainer(one)
        trainer.update = lambda *arguments: (_ for _ in ()).throw(Interrupted("SIGTERM"))
        with pytest.raises(Interrupted):
            trainer.run()
        server.log.clear()
        GRPOTrainer(one).run()
        paths = [path for path, *_ in server.log if path.startswith(("/sleep", "/wake_up", "/collective"))]
        assert paths[:2] == ["/sleep?level=2", "/wake_up?tags=weights"]
