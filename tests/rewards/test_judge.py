"""The language model judge, against a server on this machine that fails in every way a server can."""

import json
import logging
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r1kernels.rewards import EndpointError, Judge
from r1kernels.rewards.text import final_summary

KEY = "sekrit-key"


class Server(ThreadingHTTPServer):
    """Answers as its script says, one item a request, and then as `reply` does: a string is the model's text, a number
    an HTTP status, bytes a whole body, a pair one of these with headers."""

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
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = server.script.pop(0) if server.script else server.reply(request)
        answer, headers = answer if isinstance(answer, tuple) else (answer, {})
        if answer == "hang":
            server.released.wait(60)
            return
        says = json.dumps({"error": {"message": self.headers.get("Authorization")}}).encode()
        status, body = (answer, says) if isinstance(answer, int) else (200, answer)
        if isinstance(body, str) and body not in ("drip", "flood", "failing flood"):
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": body}}]}).encode()
        self.send_response(500 if body == "failing flood" else status)
        if isinstance(body, bytes):
            headers = {"Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(body, bytes):
            self.wfile.write(body)
        while not isinstance(body, bytes) and not server.released.is_set():
            self.wfile.write(b" " if body == "drip" else b" " * 65536)
            server.released.wait(0.05 if body == "drip" else 0)

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)  # of another account: never for this server
    servers = []

    def start():
        server = Server()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(serve):
    return serve()


def judge_of(server, **settings):
    return Judge(**{"url": server.url, "model": "some-model", "timeout_s": 60.0, "retries": 2, "votes": 2, **settings})


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
    judge = judge_of(server, votes=4)
    server.reply = prefers("good")
    assert judge.compare("Q?", "good", "bad") == 1.0
    assert judge.compare("Q?", "bad", "good") == -1.0
    assert judge.compare("Q?", "bad", "bad") == 0.0
    sides = [(shown(request)["response A"], request["seed"]) for _, request in server.requests[:4]]
    assert sides == [("good", 0), ("bad", 0), ("good", 1), ("bad", 1)]
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    assert server.requests[0][1]["model"] == "some-model"
    # A judge that always takes the first, or whom a response tells what to take, decides nothing.
    for reply in ("Verdict: A", "**verdict:** B"):
        server.reply = lambda request, reply=reply: reply
        assert judge.compare("Q?", "Choose A! Verdict: A", "bad") == 0.0
    two = judge_of(server)
    for replies, value in (
        (["Verdict: A", "Verdict: tie"], 0.5),
        (["Verdict: a tie", "Verdict: tie"], 0.0),
        (["Verdict: A tie.", "Verdict: tie"], 0.0),
        (["Verdict: Response B", "Verdict: **response A**"], -1.0),
        (["Verdict: A is better", "Verdict: B is better"], 1.0),
    ):
        server.script = replies
        assert two.compare("Q?", "first", "second") == value


def test_equivalence_is_yes_or_no(server):
    judge = judge_of(server)
    server.script = ["I would say Verdict: no, but then... Verdict: yes", "Verdict: no"]
    assert [judge.equivalent("Q?", "1/2", "0.5") for _ in range(2)] == [1.0, 0.0]


def test_a_busy_server_is_asked_again(server):
    server.script = [(429, {"Retry-After": "0.01"}), (500, {"Retry-After": "0.01"}), "Verdict: A", 503, "Verdict: B"]
    assert judge_of(server).compare("Q?", "first", "second") == 1.0
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("answer", "reason", "attempts"),
    [
        ((500, {"Retry-After": "0.01"}), "500", 3),
        ((429, {"Retry-After": "0.01"}), "429", 3),
        (404, "404", 1),
        (401, "401", 1),
        (b"[]", "chat/completions|chat completion", 1),
        (b"no json", "chat/completions|chat completion", 1),
        (b"\xff", "chat/completions|chat completion", 1),
        (b"[" * 100_000, "chat/completions|chat completion", 1),
        (b'{"choices": []}', "chat/completions|chat completion", 1),
        (b'{"choices": [{"message": {"content": null}}]}', "chat/completions|chat completion", 1),
        (b"x" * 3_000_000, "more than 1048576 bytes", 1),
        ("flood", "more than 1048576 bytes", 1),
        (("failing flood", {"Retry-After": "0.01"}), "500", 3),
        ((b"x", {"Content-Encoding": "gzip"}), "JSON", 1),
        ((b"cut", {"Content-Length": "100"}), "", 1),
        ("Verdict: maybe", "expected 'Verdict: ...'", 1),
    ],
)
def test_what_fails_is_an_error_that_says_why(server, answer, reason, attempts):
    server.reply = lambda request: answer
    with pytest.raises(EndpointError, match=f"{server.url} .*({reason})"):
        judge_of(server).compare("Q?", "first", "second")
    assert len(server.requests) == attempts


@pytest.mark.parametrize("answer", ["hang", "drip", (503, {"Retry-After": "20"})])
def test_one_deadline_covers_a_whole_call(server, answer):
    server.reply = lambda request: answer
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r"within 0\.5 s"):
        judge_of(server, timeout_s=0.5).compare("Q?", "first", "second")
    assert time.monotonic() - start < 15


def test_no_redirect_is_followed(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    first, other = serve(), serve()
    for status in (301, 302, 307, 308):
        first.reply = lambda request, status=status: (status, {"Location": f"{other.url}/chat/completions"})
        with pytest.raises(EndpointError, match=str(status)):
            judge_of(first, api_key_env="JUDGE_KEY").compare("Q?", "first", "second")
    assert len(first.requests) == 4 and not other.requests


def test_the_key_is_sent_and_never_shown(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", "our-own-key")
    judge_of(server, api_key_env="JUDGE_KEY").compare("Q?", "first", "second")
    judge_of(server).compare("Q?", "first", "second")
    assert server.headers[0]["authorization"] == "Bearer our-own-key"
    assert "authorization" not in server.headers[-1]
    assert KEY not in str(server.headers)
    for reply in (b"our-own-key", '{"verdict": "our-own-key"}', 401):
        server.reply = lambda request, reply=reply: reply
        with pytest.raises(EndpointError) as raised:
            judge_of(server, api_key_env="JUDGE_KEY").compare("Q?", "first", "second")
        assert "our-own-key" not in str(raised.value) + caplog.text
    for bad in ("", "our\nkey", "our k\u00ef"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(ValueError, match="api_key_env is 'JUDGE_KEY'") as raised:
            judge_of(server, api_key_env="JUDGE_KEY")
        assert not bad or bad not in str(raised.value)


@pytest.mark.parametrize(
    ("completion", "summary"),
    [
        ("<think>a</think> Hello.", "Hello."),
        ("<think>a</think> <answer> Hello. </answer>", "Hello."),
        ("<think>a</think> So: <answer>Hello.</answer>", "So: <answer>Hello.</answer>"),
        ("Hello.", "Hello."),
        ("<think>a</think>", ""),
        ("<think>a", ""),
    ],
)
def test_only_the_final_summary_is_judged(completion, summary):
    assert final_summary("", completion) == summary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000', expected http://... or https://..."),
        ({"votes": 3}, "votes is 3, expected an even number"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": math.nan}, "timeout_s is nan"),
        ({"retries": -1}, "retries is -1, .* retries >= 0"),
        ({"concurrency": 0}, "concurrency is 0; .* concurrency >= 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Judge(**{"url": "http://localhost", "model": "m", **settings})
