"""A client of a server that speaks OpenAI's API, for judges and samplers, on the openai package.

Whatever the server does, a request ends: one deadline holds for a whole request, retries included, and bodies have a
largest size. Redirects are not followed, so that no key reaches another host.
"""

import asyncio
import contextlib
import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

MAX_MESSAGE = 4096  # bytes of a server's own error message


class EndpointError(RuntimeError):
    """The server gave no usable answer. The message says why; it never holds the key."""


class Endpoint:
    """Sends JSON requests and receives JSON answers, at most `concurrency` at once.

    `timeout_s` is for one request, with its `retries` after failed connections and HTTP 408, 409, 429 and 5xx. A `key`
    is sent as a bearer token.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 60.0, retries: int = 4,
                 concurrency: int = 16, max_body: int = 2**20):
        import openai

        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}, expected http://... or https://...")
        if not (0 < timeout_s < float("inf") and retries >= 0 and concurrency >= 1):
            raise ValueError(f"timeout_s is {timeout_s}, retries is {retries}, concurrency is {concurrency}; expected "
                             "timeout_s > 0, retries >= 0, concurrency >= 1")
        # OpenAI's settings in the environment are for another server. The last header delays the reading of bodies.
        self._options = {"headers": {
            "Accept-Encoding": "identity", "OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit(),
            **({} if key else {"Authorization": openai.Omit()}), "X-Stainless-Raw-Response": "stream"}}
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_close_failed]})
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key or "no key", max_retries=retries, timeout=timeout_s,
                                          http_client=http)
        self.url, self._timeout_s, self._max_body = url, timeout_s, max_body
        self._slots, self._loop = asyncio.Semaphore(concurrency), asyncio.new_event_loop()
        threading.Thread(target=_serve, args=(self._loop, self._client), name="endpoint", daemon=True).start()
        self.close = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def start(self, coroutine: Any) -> Future:
        """Runs a coroutine, such as `request(...)`, in the background. Cancelling the future ends the request."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine: Any) -> Any:
        """The result of a coroutine."""
        return self.start(coroutine).result()

    async def request(self, method: str, path: str, read: Callable[[Any], Any], **body: Any) -> Any:
        """The result of `read(decoded answer)`; its exceptions become EndpointError. `path` may be a whole url."""
        try:
            async with self._slots:
                text = await asyncio.wait_for(self._body(method, path, **body), self._timeout_s)
            return read(json.loads(text) if text.strip() else None)
        except asyncio.TimeoutError:
            raise EndpointError(f"{self.url} gave no answer within {self._timeout_s:g} s") from None
        except Exception as error:  # of the client, of the connection while the body is read, of JSON, or of `read`
            reason = f"{type(error).__name__}: {error.__cause__ or error}".replace(self._client.api_key, "[key]")
            raise EndpointError(f"{self.url} gave no usable answer to {path} ({reason:.400})") from None

    async def _body(self, method: str, path: str, **body: Any) -> bytearray:
        response = await getattr(self._client, method)(path, cast_to=object, options=self._options, **body)
        text = bytearray()
        async with contextlib.aclosing(response.http_response) as answer:
            async for chunk in answer.aiter_raw():  # never decompressed
                text += chunk
                if len(text) > self._max_body:
                    raise ValueError(f"the body has more than {self._max_body} bytes")
        return text


async def _close_failed(response: Any) -> None:
    """Reads the message of a failure if it is short. Closes failures and redirects, whose bodies can have any size."""
    if response.status_code >= 300:
        if int(response.headers.get("Content-Length", MAX_MESSAGE + 1)) <= MAX_MESSAGE:
            await response.aread()
        await response.aclose()


def _serve(loop: asyncio.AbstractEventLoop, client: Any) -> None:
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.wait({*tasks, loop.create_task(client.close())}))
    loop.close()
