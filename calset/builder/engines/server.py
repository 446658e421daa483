"""OpenAI-compatible servers (vLLM, SGLang) as an engine.

One request a sample, answered whole: a stream of events would tell a slow server from a dead one, at the price of a
message a token; instead each server's health is asked for beside the requests, and the connections are kept alive.
What is sent and believed is in ``openai_api``, who is asked in ``balancer``; here is how a request is sent, and how
many bytes of an answer are read. Requests go straight to the servers: proxies of the environment are not used. Tested
with vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import http.cookiejar
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calset.builder.engines import openai_api
from calset.builder.engines.balancer import Balancer
from calset.builder.engines.base import CLOSED, Completion, Request, wait_on
from calset.builder.engines.replica import Busy, Patience, Server, Unavailable
from calset.builder.model.sampling import Sampling
from calset.errors import EngineError, InputError
from calset.io.retry import asked_seconds

if TYPE_CHECKING:
    from calset.builder.model.info import ModelInfo

T = TypeVar("T")
KEY_VARIABLE = "CALSET_API_KEY"
CONCURRENCY = 64
PROBE_SECONDS = 300.0  # for one token; a server's first request may compile something
IDLE_SECONDS = 2.0  # that a free connection is kept: vLLM closes one after 5, and a race would look like a failure
PLAIN = ("", "identity")  # content encodings
_DONE = object()


OPTIONS = frozenset({"concurrency", "verbose", "served_model", *(entry.name for entry in fields(Patience))})


async def _read(answer: Any, most: int) -> bytes:
    """The body of an answer that is being streamed; of an error's the first bytes alone.

    Raises:
        Unavailable: it is longer than ``most`` bytes, or compressed.
    """
    encoding = openai_api.one_line(answer.headers.get("Content-Encoding", "")).lower()
    if not answer.is_success:
        most = openai_api.ERROR_BYTES if encoding in PLAIN else 0
    elif encoding not in PLAIN:
        raise Unavailable(f"its answer is compressed ({encoding}), which was not asked for: switch that off there")
    body = bytearray()
    async for chunk in answer.aiter_raw():
        body += chunk
        if len(body) > most:
            if answer.is_success:
                raise Unavailable(f"its answer is longer than {most:,} bytes, which no such answer needs")
            break
    return bytes(body[:most])


class ServerEngine:
    """One or several running servers that hold the same model.

    Nothing here sees a server's weights: ``loaded`` is the revision of the model that the caller named, and it is the
    caller's word that the servers hold it. A key, where the servers want one, comes from the environment variable
    CALSET_API_KEY and goes nowhere else.

    Args:
        urls: the servers' roots, e.g. ``http://localhost:8000``.
        max_model_len: prompt and completion tokens that each must hold.
        concurrency: requests in flight at each server at most; 64 when None. A server that answers 429 gets fewer.
        served_model: the model's name at the servers, when they serve several.
        patience: a ``Patience``'s own fields, e.g. ``read_timeout=7200``.

    Attributes:
        warnings: what went wrong and was dealt with: servers dropped and back, requests given up.

    Raises:
        InputError: an option out of its range, a model that is not served, or one with too short a context.
        EngineError: a server that does not answer, or that gives no token ids.
    """

    name = "server"

    def __init__(
        self,
        model: ModelInfo,
        *,
        urls: Sequence[str],
        max_model_len: int,
        concurrency: int | None = None,
        served_model: str | None = None,
        verbose: bool = False,  # every engine takes it; a server logs where it runs
        **patience: Any,
    ) -> None:
        self.warnings: list[str] = []
        self.max_model_len = max_model_len
        self.loaded = model.revision
        self._model, self._served_model = model, served_model
        self._patience = Patience(**patience)
        self._stops = tuple(model.eos_token_ids)
        self._probe = Request("probe", model.prompt_ids("1 + 1 ="), 0, 1)
        most = concurrency or CONCURRENCY
        self._servers = [Server(url, most, float(most)) for url in urls]
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._running: asyncio.Task[None] | None = None
        self._client: Any = None
        self._closing = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="calset-server", daemon=True)
        self._thread.start()
        try:
            self._client = self._wait(self._open_client())
            self._wait(self._inspect_all())
        except BaseException:
            self.close()
            raise
        self.version = ", ".join(dict.fromkeys(server.version for server in self._servers))

    # --- the engine protocol --------------------------------------------------------------------------------------

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions as they finish; at most ``concurrency`` requests are in flight at each server.

        A request that keeps failing on servers that answer others comes back with the finish reason ``error`` and no
        tokens.

        Raises:
            EngineError: no server is left, one refused a request (HTTP 4xx), or an answer is not what was served.
        """
        if self._closed:
            raise EngineError(CLOSED)
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ended = threading.Event()

        async def begin() -> asyncio.Task[None]:
            if self._closed:  # by another thread, whose _finish would not see this task
                raise EngineError(CLOSED)
            task = asyncio.create_task(Balancer(self, self._servers, self._patience, requests, sampling, results).run())

            # Not by the stream itself: a task cancelled before its first step runs none of its code.
            def finish(task: asyncio.Task[None]) -> None:
                if not task.cancelled() and (error := task.exception()) is not None:
                    results.put(error)
                results.put(_DONE)
                ended.set()

            task.add_done_callback(finish)
            self._running = task
            return task

        self._wait(begin())
        try:
            while (item := results.get()) is not _DONE:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.cancel()
            ended.wait(timeout=30)
            self._running = None

    def cancel(self) -> None:
        """End the running stream; the servers stop working on what they were asked as its connections close."""
        running = self._running
        if running is not None:
            with suppress(RuntimeError):  # the loop is closed, and nothing runs
                self._loop.call_soon_threadsafe(running.cancel)

    def load_weights(self, model: Path, revision: str) -> None:
        """Not through a server's public interface.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            f"a running server's weights cannot be exchanged; start another one on {model} and give its address"
        )

    def close(self) -> None:
        """End the stream, the connections and the loop; the servers go on. May be called twice, from any thread."""
        with self._closing:
            if self._loop.is_closed():
                return
            self._closed = True
            with suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result(timeout=30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
            if not self._thread.is_alive():
                self._loop.close()

    async def _finish(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return wait_on(work, self._loop, self._thread)

    def warn(self, text: str) -> None:
        """Once: a server that comes and goes for a week says so twice, not a thousand times."""
        if text not in self.warnings:
            self.warnings.append(text)

    # --- talking to one server ------------------------------------------------------------------------------------

    async def _open_client(self) -> Any:
        import httpx2

        # A completion may take an hour without a byte: keepalive shows a peer that vanished, and keeps NAT entries.
        options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 5)):
            if hasattr(socket, name):
                options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS)
        # Of a compressed answer nobody can tell from what has come how much it will be.
        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(limits=limits, socket_options=options),
            headers=headers,
            # A cookie would tie all requests to one machine behind an address, and a server could send ever more.
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=())),
            timeout=httpx2.Timeout(self._patience.connect_timeout, pool=None),
        )

    async def complete(
        self, server: Server, request: Request, sampling: Sampling, read_seconds: float | None = None
    ) -> Completion:
        """Ask one server for one completion.

        Raises:
            Unavailable, Busy: to be tried again.
            EngineError: not to be tried again.
        """
        body = openai_api.completion_body(request, sampling, server.served, self._stops)
        began = time.monotonic()
        seconds = read_seconds or self._patience.read_seconds(request.max_tokens)
        most = openai_api.answer_bytes(request)
        answer = await self._send(server.url, "POST", "/v1/completions", read_seconds=seconds, most=most, json=body)
        token_ids, reason = openai_api.read_completion(
            self._json(server.url, answer), request, self._stops, server.url, self._model.n_vocabulary
        )
        if reason == "abort":  # as vLLM does to all of them when it is told to end
            raise Unavailable("it gave up on a request")
        return Completion(request.key, token_ids, reason, time.monotonic() - began)

    async def _send(
        self,
        url: str,
        method: str,
        path: str,
        *,
        read_seconds: float,
        most: int = openai_api.OTHER_BYTES,
        json: Any = None,
    ) -> bytes:
        """Send one request and read the whole answer; a connection whose answer is not read to its end is closed.

        Args:
            read_seconds: that the answer may take from the request on, to its last byte.
            most: bytes that the answer may have.

        Raises:
            Unavailable, Busy: to be tried again.
            EngineError: not to be tried again.
        """
        import httpx2

        connect = self._patience.connect_timeout
        timeout = httpx2.Timeout(connect, read=read_seconds, write=max(connect, 60.0), pool=None)
        try:
            # httpx2's read timeout is between two bytes: a server that drips would hold a request for ever.
            async with asyncio.timeout(connect + read_seconds):
                async with self._client.stream(method, url + path, json=json, timeout=timeout) as answer:
                    body = await _read(answer, most)
        except (httpx2.ReadTimeout, TimeoutError) as error:
            raise Unavailable(f"no answer within {read_seconds:,.0f} seconds", timed_out=True) from error
        except httpx2.RequestError as error:
            said = openai_api.one_line(self._hide(str(error)))
            raise Unavailable(f"{type(error).__name__}{': ' if said else ''}{said}") from error
        if answer.is_success:
            return body
        pause = asked_seconds(answer.headers, time.time())
        if answer.status_code == 429:
            raise Busy(pause)
        said = openai_api.error_text(answer.status_code, self._hide(body.decode(errors="replace")))
        if answer.status_code >= 500:
            raise Unavailable(said, pause=pause)
        if answer.status_code in (401, 403):
            raise EngineError(f"{url} wants a key: {said}; put it into the environment variable {KEY_VARIABLE}")
        raise EngineError(f"{url} refused a request: {said}")

    def _json(self, url: str, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            said = openai_api.one_line(self._hide(answer[: openai_api.LINE].decode(errors="replace")))[:80]
            raise EngineError(
                f"{url} answered with something that is not JSON ({said}); is it an OpenAI-compatible server?"
            ) from error

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    async def healthy(self, server: Server) -> str | None:
        """None, or why not. A server without ``/health`` is well when it answers at all."""
        try:
            await self._send(server.url, "GET", "/health", read_seconds=3 * self._patience.connect_timeout)
        except Unavailable as error:
            return str(error)
        except (Busy, EngineError):
            return None
        return None

    async def answers(self, server: Server) -> bool:
        """Whether it completes one token, as a proof that a request failed by itself."""
        try:
            await self.complete(server, self._probe, Sampling(temperature=0.0), PROBE_SECONDS)
        except Busy:
            return True
        except (Unavailable, EngineError):
            return False
        return True

    # --- looking at a server before it is used --------------------------------------------------------------------

    async def _inspect_all(self) -> None:
        found = await asyncio.gather(*(self.inspect(server) for server in self._servers), return_exceptions=True)
        for server, error in zip(self._servers, found, strict=True):
            if isinstance(error, (Unavailable, Busy)):
                raise EngineError(
                    f"the server {server.url} does not answer ({error}); start it, wait until it is up, or leave it out"
                ) from error
            if isinstance(error, BaseException):
                raise error
        if len(versions := {server.version for server in self._servers}) > 1:
            self.warn(f"the servers run different versions: {', '.join(sorted(versions))}")

    async def inspect(self, server: Server) -> None:
        """What it serves, whether that is long enough, and whether its token ids come back.

        Raises:
            Unavailable, Busy: it does not answer now.
            InputError, EngineError: it cannot be used.
        """
        seconds = 3 * self._patience.connect_timeout
        answer = await self._send(server.url, "GET", "/v1/models", read_seconds=seconds)
        served = openai_api.choose_model(self._json(server.url, answer), self._model, self._served_model, server.url)
        if served.max_model_len is not None and served.max_model_len < self.max_model_len:
            raise InputError(
                f"{server.url} serves at most {served.max_model_len} tokens of prompt and completion, and "
                f"{self.max_model_len} are needed; start it with a larger --max-model-len, or lower --max-tokens "
                "where the command has it"
            )
        if not openai_api.looks_like(served, self._model):
            theirs = openai_api.one_line(served.root or served.name)
            self.warn(f"{server.url} serves {theirs}; its traces are recorded as {self._model.model}'s")
        server.served = served.name
        server.version = await self._version(server, served.software)
        await self.complete(server, self._probe, Sampling(temperature=0.0), PROBE_SECONDS)

    async def _version(self, server: Server, software: str | None) -> str:
        """``vllm 0.32.0``: /version is vLLM's, /server_info SGLang's."""
        for path in ("/version", "/server_info"):
            with suppress(Unavailable, Busy, EngineError):
                answer = await self._send(server.url, "GET", path, read_seconds=3 * self._patience.connect_timeout)
                found = self._json(server.url, answer)
                if isinstance(found, dict) and isinstance(found.get("version"), str):
                    return openai_api.one_line(f"{software or ''} {found['version']}")
        return openai_api.one_line(software or "") or "unknown"
