"""Weights over NCCL, against doubles of the servers and of NCCL. It has no test on a GPU."""

import contextlib
import copy
import threading

import pytest
import torch
import yaml
from nccl_double import NCCL
from rl_cases import make_model, make_tokenizer, policy_of, stage_of
from supervised_cases import EXAMPLES
from vllm_cases import serving

from r1kernels.rewards import EndpointError
from r1kernels.train.errors import Interrupted
from r1kernels.train.rollout import Sampling


@pytest.fixture
def servers(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tokenizer = make_tokenizer()
    with serving(make_model(tokenizer, 1), tokenizer) as one, serving(make_model(tokenizer, 2), tokenizer) as other:
        for server in (one, other):
            server.transfer = {"backend": "nccl"}
        one.workers = 2
        yield [one, other]


@pytest.fixture
def connect(servers, tmp_path, monkeypatch):
    """A sampler of the README's recipe, with a double of NCCL; `check` as in a stage."""
    with contextlib.ExitStack() as stack:

        def connect(check=lambda: None):
            readme = (EXAMPLES / "nccl/README.md").read_text(encoding="utf-8")
            given = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
            sampler = given["sampler"] | {"urls": [server.url for server in servers], "timeout_s": 60.0}
            stage = stage_of(tmp_path, [f".sampler={sampler}", f".import_from=['{EXAMPLES}/nccl']"])
            monkeypatch.setattr(stage.interrupt, "check", check)
            import nccl_weights

            nccl = NCCL()
            stack.enter_context(nccl.in_place(monkeypatch, nccl_weights))
            for server in servers:
                server.nccl = nccl
            model = make_model(make_tokenizer())
            found = stage.sampler("base", loaded=False)
            stack.callback(found.close)
            return found, model

        yield connect


def test_every_worker_of_every_server_receives_every_weight(connect, servers):
    sampler, model = connect()
    for factor in (1.0, 1.5):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight *= factor
        sampler.update(policy_of(copy.deepcopy(model)))
        for server in servers:
            assert all(map(torch.equal, server.model.state_dict().values(), model.state_dict().values()))
    assert [server.ranks for server in servers] == [range(1, 3), range(3, 4)]
    paths = [path for path, *_ in servers[0].log]
    assert paths.count("/init_weight_transfer_engine") == 1 and "/collective_rpc" not in paths
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"]
    assert [path for path in paths if path in update] == 2 * update
    assert len(sampler.sample(["1+1", "2+2"], Sampling(1.0, 4)).texts) == 2


def test_tied_weights_are_sent_once_and_rounded_ones_as_they_are(connect, servers):
    sampler, model = connect()
    sampler.update(policy_of(copy.deepcopy(model), torch.bfloat16))
    [body] = servers[0].bodies("/update_weights")
    assert "model.embed_tokens.weight" in body["update_info"]["names"]
    assert "lm_head.weight" not in body["update_info"]["names"]
    assert {*body["update_info"]["dtype_names"]} == {"bfloat16"}


def test_a_server_without_the_option_is_refused(connect, servers):
    servers[1].transfer = None
    with pytest.raises(EndpointError, match=f"{servers[1].url} .*--weight-transfer-config.backend nccl"):
        connect()


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"])
def test_a_server_that_fails_ends_it_at_once(connect, servers, path):
    """Others wait for it, as NCCL does."""
    sampler, model = connect()
    servers[1].fault = lambda handler: handler.path == path and (handler.answer(400, {"detail": "no"}) or True)
    with pytest.raises(EndpointError, match=f"{servers[1].url} .*{path}"):
        sampler.update(policy_of(copy.deepcopy(model)))


def test_a_stop_ends_it(connect, servers):
    def check():
        if servers[1].bodies("/update_weights"):
            raise Interrupted("SIGTERM")

    sampler, model = connect(check)
    end = threading.Event()
    servers[1].fault = lambda handler: handler.path == "/update_weights" and end.wait(60)
    with pytest.raises(Interrupted):
        sampler.update(policy_of(copy.deepcopy(model)))
    end.set()
