"""A client of a server that speaks OpenAI's API, for judges and samplers: `Endpoint`, on the openai package.

Whatever the server does, a request ends: one deadline holds for a whole request, retries included, and bodies have a
largest size. Redirects are not followed, so that no key reaches another host.
"""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from concurrent.futures import Future
from typing import Any

MAX_MESSAGE = 4096  # bytes of a server's own error message


class EndpointError(RuntimeError):
    """The server gave no usable answer. The message says why; it never holds the key."""


class Endpoint:
    """Sends JSON requests and receives JSON answers.

    Args:
        url: address that paths are added to.
        key: sent as a bearer token; None sends none.
        timeout_s: seconds for one request, retries included.
        retries: further attempts when the server cannot be reached or is busy (HTTP 408, 409, 429, 5xx).
        concurrency: requests in flight at once.
        max_body: most bytes of an answer.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 60.0, retries: int = 4,
                 concurrency: int = 16, max_body: int = 2**20):
        import openai

        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}, expected http://... or https://...")
        # Other settings of the environment, such as an organization, are not this server's business. With the last
        # header, the client hands over a response before its body is read.
        self._headers: dict[str, Any] = {
            "Accept-Encoding": "identity", "OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit(),
            "X-Stainless-Raw-Response": "stream", **({} if key else {"Authorization": openai.Omit()}),
        }
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_close_failed]})
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=retries, timeout=timeout_s,
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
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()  # where the wait was interrupted

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, decoded; None if it is empty. `path` is added to the url unless it is a url itself.

        Raises:
            EndpointError: there is no answer, or it is not JSON.
        """
        try:
            async with self._slots:
                text = await asyncio.wait_for(self._body(method, path, body), self._timeout_s)
        except asyncio.TimeoutError:
            raise EndpointError(f"{self.url} gave no answer within {self._timeout_s:g} s") from None
        except Exception as error:  # of the client, or of the connection while the body is read
            reason = f"{type(error).__name__}: {error.__cause__ or error}"
            raise EndpointError(f"{self.url} gave no usable answer to {path} ({reason:.400})") from None
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            raise EndpointError(f"{self.url} answered {path} with {text[:60]!r}, expected JSON") from None

    async def _body(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        send = self._client.post if method == "POST" else self._client.get
        arguments = {} if body is None else {"body": body}
        response = await send(path, cast_to=object, options={"headers": self._headers}, **arguments)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ValueError("the body is compressed, which was not asked for")
            text = b""
            async for chunk in response.iter_bytes():
                text += chunk
                if len(text) > self._max_body:
                    raise ValueError(f"the body has more than {self._max_body} bytes")
            return text
        finally:
            await response.close()


async def _close_failed(response: Any) -> None:
    """Reads the message of a failure if it is short, and closes failures and redirects: their bodies have any size."""
    if response.status_code >= 300:
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) <= MAX_MESSAGE:
            await response.aread()
        await response.aclose()


def _serve(loop: asyncio.AbstractEventLoop, client: Any) -> None:
    loop.run_forever()
    loop.run_until_complete(client.close())
    loop.close()
