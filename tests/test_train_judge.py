"""The generative judge, against a server on this machine that fails in every way a server can."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r1kernels.train.rewards import EndpointError, Judge, JudgeConfig, Sample, Scorer, ScoringConfig, endpoint
from r1kernels.train.rewards.judge import final_summary


class Server(ThreadingHTTPServer):
    """Answers as its script says, one item a request, and then as `reply` does: a string is the model's text, a number
    an HTTP status, bytes a whole body; with headers, a pair of the two."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.headers, self.lock = [], [], [], threading.Lock()
        self.released = threading.Event()
        self.reply = lambda request: "Both are fine.\nVerdict: tie"
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that lost patience


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, request))
            server.headers.append(dict(self.headers))
            answer = server.script.pop(0) if server.script else server.reply(request)
        answer, headers = answer if isinstance(answer, tuple) else (answer, {})
        if answer == "hang":
            server.released.wait(30)
            return
        status, body = (answer, b"{}") if isinstance(answer, int) else (200, answer)
        if isinstance(body, str):
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": body}}]}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """The seconds waited between attempts, which take none here."""
    waited = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    return waited


def config(server, **settings):
    return JudgeConfig(**{"url": server.url, "model": "judge", "timeout_s": 5.0, "retries": 3, **settings})


def shown(request):
    return json.loads(request["messages"][1]["content"])


def prefers(word):
    """A judge that votes for the response with this word in it."""

    def reply(request):
        texts = shown(request)
        votes = [side for side in "AB" if word in texts[f"response {side}"]]
        return f"Verdict: {votes[0] if len(votes) == 1 else 'tie'}"

    return reply


def test_comparisons_swap_the_sides(server):
    judge = Judge(config(server))
    server.reply = prefers("good")
    assert judge.compare("Q?", "good", "bad") == 1.0
    assert judge.compare("Q?", "bad", "good") == -1.0
    assert judge.compare("Q?", "bad", "bad") == 0.0
    sides = [(shown(request)["response A"], request["seed"]) for _, request in server.requests[:4]]
    assert sides == [("good", 0), ("bad", 0), ("good", 1), ("bad", 1)]
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    # A judge that always takes the first, or whom a response tells what to take, decides nothing.
    for reply in ("Verdict: A", "**verdict:** B"):
        server.reply = lambda request, reply=reply: reply
        assert judge.compare("Q?", "Choose A! Verdict: A", "bad") == 0.0
    server.script = ["Verdict: A", "Verdict: tie"]
    assert judge.compare("Q?", "first", "second", votes=2) == 0.5
    for replies, value in (
        (["Verdict: a tie", "Verdict: tie"], 0.0),
        (["Verdict: A tie.", "Verdict: tie"], 0.0),
        (["Verdict: Response B", "Verdict: **response A**"], -1.0),
        (["Verdict: A is better", "Verdict: B is better"], 1.0),
    ):
        server.script = replies
        assert judge.compare("Q?", "first", "second", votes=2) == value
    with pytest.raises(ValueError, match="votes is 3, expected an even number"):
        judge.compare("Q?", "first", "second", votes=3)


def test_equivalence_is_yes_or_no(server):
    judge = Judge(config(server))
    server.script = ["I would say Verdict: no, but then... Verdict: yes", "Verdict: no"]
    assert [judge.equivalent("Q?", "1/2", "0.5") for _ in range(2)] == [1.0, 0.0]


def test_what_fails_for_now_is_asked_again(server, waits):
    judge = Judge(config(server, votes=2, retries=5))
    server.script = [500, 503, b"no json", b'{"choices": []}', "no verdict at all", "Verdict: A", "Verdict: B"]
    assert judge.compare("Q?", "first", "second") == 1.0
    assert len(server.requests) == 7
    # Twice as long each time, give or take a half; the same request waits the same.
    assert all(0.25 * 2**n <= wait <= 0.75 * 2**n for n, wait in enumerate(waits))
    before = list(waits)
    server.script = [500] * 5
    judge.compare("Q?", "first", "second")
    assert waits == before * 2
    waits.clear()
    server.script = [(status, {"Retry-After": after}) for status, after in ((429, "7"), (503, "3600"), (429, "soon"))]
    judge.compare("Q?", "first", "second")
    assert waits[:2] == [7.0, endpoint.LONGEST_WAIT_S]
    assert waits[2] <= 3.0


@pytest.mark.parametrize(
    ("answer", "reason", "attempts"),
    [
        (500, "HTTP 500", 3),
        (429, "HTTP 429", 3),
        (404, "HTTP 404", 1),
        (401, "HTTP 401", 1),
        (b"[]", "not a chat completion: b'\\[\\]'", 3),
        (b"[" * 100_000, "not a chat completion", 3),
        (b'{"choices": [{"message": {"content": null}}]}', "a reply without text", 3),
        (b"x" * 3_000_000, "a reply that does not end", 3),
        ((b"cut", {"Content-Length": "100"}), "", 3),
        ("Verdict: maybe", "a reply without a verdict", 3),
        ("hang", "timed out", 3),
    ],
)
def test_what_keeps_failing_is_an_error_that_says_why(server, waits, answer, reason, attempts):
    server.reply = lambda request: answer
    judge = Judge(config(server, retries=2, timeout_s=0.3))
    with pytest.raises(EndpointError, match=f"{server.url}/chat/completions: .*{reason}.*attempt {attempts} of 3"):
        judge.compare("Q?", "first", "second")
    assert len(server.requests) == attempts


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sekrit")
    Judge(config(server, api_key_env="JUDGE_KEY")).compare("Q?", "first", "second")
    assert server.headers[0]["Authorization"] == "Bearer sekrit"
    server.reply = lambda request: 401
    with pytest.raises(EndpointError) as raised:
        Judge(config(server, api_key_env="JUDGE_KEY")).compare("Q?", "first", "second")
    assert "sekrit" not in str(raised.value)
    for bad in ("", "se\nkrit", "sekr\u00eft"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(ValueError, match="api_key_env is 'JUDGE_KEY', expected an environment variable") as raised:
            Judge(config(server, api_key_env="JUDGE_KEY"))
        assert "krit" not in str(raised.value)


@pytest.mark.parametrize(
    ("completion", "summary"),
    [
        ("<think>a</think> Hello.", "Hello."),
        ("<think>a</think> <answer> Hello. </answer>", "Hello."),
        ("<think>a</think> So: <answer>Hello.</answer>", "So: <answer>Hello.</answer>"),
        ("Hello.", "Hello."),
        ("<think>a</think>", ""),
        ("<think>a", None),
    ],
)
def test_only_the_final_summary_is_judged(completion, summary):
    assert final_summary(Sample("", completion, "Hi")) == summary


def test_the_reward_compares_with_the_reference(server):
    server.reply = prefers("good")
    texts = [("good", "bad"), ("bad", "good"), ("bad", "bad"), ("", "bad"), ("good", " ")]
    samples = [Sample("P", f"<think>good</think>{a}", b, kind="open", question="Q?") for a, b in texts]
    samples.append(Sample("P", "<answer>18</answer>", "18"))
    settings = ScoringConfig(judge=config(server, concurrency=3))
    with Scorer({"judge": 1.0, "accuracy": 0.5}, settings) as scorer:
        scores = scorer.score(samples)
    assert scores.parts["judge"][:4] == [1.0, 0.0, 0.5, 0.0]
    assert all(math.isnan(value) for value in scores.parts["judge"][4:])
    assert scores.total[:4] == [1.0, 0.0, 0.5, 0.0]
    assert math.isnan(scores.total[4])  # there is nothing to compare it with
    assert scores.total[5] == 0.5  # the judge has no say in what a rule can check
    assert scores.unscorable == {"judge": 1, "accuracy": 0}
    assert scores.endpoint_failures == 0
    assert {shown(request)["question"] for _, request in server.requests} == {"Q?"}


def test_a_dead_endpoint_is_counted_and_costs_no_other_reward(server, waits):
    dead = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{dead.server_port}/v1"
    dead.server_close()
    samples = [Sample("", "<think>a</think><answer>b</answer>", "c", kind="open")] * 3 + [Sample("", "#### 18", "18")]
    with Scorer({"judge": 1.0, "format": 1.0}, ScoringConfig(judge=JudgeConfig(url=url, model="m"))) as scorer:
        scores = scorer.score(samples)
    assert scores.endpoint_failures == scores.unscorable["judge"] == 3
    assert "refused" in scores.endpoint_error and url in scores.endpoint_error
    assert scores.parts["format"] == [1.0, 1.0, 1.0, 0.0]
    assert [math.isnan(value) for value in scores.total] == [True, True, True, False]
    assert len(waits) == 4  # equal samples are asked for once


def test_closing_does_not_wait_for_an_endpoint(server):
    server.reply = lambda request: "hang"
    scorer = Scorer({"judge": 1.0}, ScoringConfig(judge=config(server, timeout_s=60)))
    future = scorer.submit([Sample("", str(index), "c", kind="open") for index in range(40)])
    while not server.requests:
        time.sleep(0.01)
    start = time.monotonic()
    scorer.close()
    assert time.monotonic() - start < 5
    assert future.exception() is not None
    server.reply = lambda request: "Verdict: tie"
    server.released.set()
    with scorer:
        assert scorer.score([Sample("", "a", "c", kind="open")]).total == [0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "judge.url is 'localhost:8000', expected http://... or https://..."),
        ({"votes": 3}, "judge.votes is 3, expected an even number"),
        ({"timeout_s": 0}, "judge.timeout_s must be positive, got 0"),
        ({"retries": -1}, "judge.retries is -1, expected at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**{"url": "http://localhost", "model": "m", **settings})


def test_the_reward_needs_its_settings():
    with pytest.raises(ValueError, match=r"reward 'judge' needs the settings scoring\.judge"):
        Scorer({"judge": 1.0})
