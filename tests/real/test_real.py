"""Against a real model and a real vLLM server. `make test-real` sets both up and runs this; CI does not.

R1KERNELS_REAL_MODEL is the directory of the model, R1KERNELS_REAL_VLLM the virtual environment of vLLM.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from r1kernels.rewards import EndpointError, Judge
from r1kernels.train.cli import main
from r1kernels.train.model import load_model, load_tokenizer
from r1kernels.train.recipe import SamplerSettings
from r1kernels.train.rollout import Sampling, end_tokens
from r1kernels.train.update import completion_logprobs
from r1kernels.train.vllm import VLLMSampler

MODEL, VLLM = (os.environ.get(f"R1KERNELS_REAL_{name}") for name in ("MODEL", "VLLM"))
pytestmark = pytest.mark.skipif(not (MODEL and VLLM), reason="needs a real model and server: run `make test-real`")
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["The capital of France is"] * 6 + ["2 + 2 ="] * 6
GAP = 0.1  # mean |log-prob of the bfloat16 server - log-prob of the float32 trainer|; 0.03 where it was measured


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL), load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("vllm") / "log"
    command = [f"{VLLM}/bin/vllm", "serve", MODEL, "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs",
               "32", "--host", "127.0.0.1", "--port", str(port), "--logprobs-mode", "processed_logprobs"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT)
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(2)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def sampler(model, server, tmp_path):
    settings = SamplerSettings(url=server, weights_dir=str(tmp_path / "weights"), timeout_s=600.0)
    sampler = VLLMSampler(settings, model[1], end_tokens(*model))
    yield sampler
    sampler.close()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (0.7, 1.0), (1.0, 1.0), (0.6, 0.9), (1.0, 0.9)])
def test_samples_and_their_log_probs(model, sampler, temperature, top_p):
    done = sampler.sample(PROMPTS, Sampling(temperature, 12, top_p))
    assert done.logprobs.isfinite().all() and (done.logprobs[done.mask] <= 0).all()
    assert len(set(done.texts[:6])) > 1  # the members of a group differ
    ours = completion_logprobs(model[0], done, [torch.arange(len(PROMPTS))], temperature)
    gap = (ours - done.logprobs)[done.mask]
    # After top-p, the server's log-probs are those of fewer tokens, which share the probability of the others.
    assert gap.abs().mean() < GAP if top_p == 1 else gap.mean() < GAP and gap.min() > torch.tensor(0.9).log() - 1


def test_new_weights_are_used(model, sampler):
    before = sampler.sample(PROMPTS[:1], Sampling(0.6, 8))
    changed = load_model(MODEL)
    with torch.no_grad():
        changed.get_output_embeddings().weight.mul_(0.0)
    try:
        sampler.update(changed)  # all tokens are equally likely now
        flat = sampler.sample(PROMPTS[:1], Sampling(1.0, 8))
        expected = -torch.tensor(float(changed.get_output_embeddings().weight.shape[0])).log()
        torch.testing.assert_close(flat.logprobs[flat.mask], expected.expand(int(flat.mask.sum())), atol=0.05, rtol=0)
    finally:
        sampler.update(model[0])
    again = sampler.sample(PROMPTS[:1], Sampling(0.6, 8))
    assert (again.logprobs.sum() - before.logprobs.sum()).abs() < 40 and again.logprobs.sum() > flat.logprobs.sum()


def test_a_prompt_longer_than_the_server_takes_is_an_error(sampler):
    with pytest.raises(EndpointError, match="/completions"):
        sampler.sample(["word " * 2000], Sampling(1.0, 8))


def test_the_judge_asks_the_same_server(server):
    judge = Judge(f"{server}/v1", MODEL, votes=2, timeout_s=600)
    try:
        assert -1 <= judge.compare("What is 2 + 2?", "It is 4.", "I do not know.") <= 1
    except EndpointError as error:  # so small a model may give no verdict
        assert "Verdict" in str(error)


def test_a_step_of_grpo_on_the_real_model(tmp_path):
    changes = [f"run_dir={tmp_path}/run", f"stages.base.path={MODEL}", "stages.r1_zero.steps=1", "eval.questions=2",
               "eval.samples=1", "stages.r1_zero.questions=1", "stages.r1_zero.minibatches=1"]
    with pytest.raises(SystemExit) as end:
        main(["train", str(ROOT / "recipes/smollm2.yaml"), "--plain", "--set", *changes])
    assert not end.value.code
    lines = [json.loads(line) for line in (tmp_path / "run/r1_zero/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["first_ratio_deviation"] < 1e-2 and lines[-1]["step"] == 1

