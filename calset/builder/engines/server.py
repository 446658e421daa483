"""OpenAI-compatible servers (vLLM, SGLang) as an engine: the least loaded is asked, a dead one's requests move on.

One request a sample, answered whole: a stream of events would tell a slow server from a dead one, at the price of a
message a token; instead each server's health is asked for beside the requests, and the connections are kept alive.
What is sent and believed is in ``openai_api``; here is who is asked, how often, how long, and how many bytes of an
answer are read. Requests go straight to the servers: proxies of the environment are not used. Tested with vLLM 0.32.
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
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calset.builder.engines import openai_api
from calset.builder.engines.base import CLOSED, RESUME_HINT, Completion, Request, RequestFeed, wait_on
from calset.builder.model.sampling import Sampling
from calset.errors import EngineError, InputError
from calset.io.retry import Backoff, asked_seconds

if TYPE_CHECKING:
    from calset.builder.model.info import ModelInfo

T = TypeVar("T")
KEY_VARIABLE = "CALSET_API_KEY"
CONCURRENCY = 64
PROBE_SECONDS = 300.0  # for one token; a server's first request may compile something
QUEUE_SECONDS = 600.0  # that a request may wait in the server's own queue, on top of its tokens' time
PAUSE_SECONDS = 60.0  # between two tries of a failing server at most
ASKED_PAUSE_SECONDS = 600.0  # what a server may ask for by Retry-After at most
ATTEMPTS = 4  # of a request, when servers that answer others fail on it
IDLE_SECONDS = 2.0  # that a free connection is kept: vLLM closes one after 5, and a race would look like a failure
PLAIN = ("", "identity")  # content encodings
_DONE = object()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for, and how often it may fail. Seconds, but for ``failures``.

    Raises:
        InputError: a value that is no positive number.
    """

    connect_timeout: float = 10.0
    read_timeout: float | None = None  # of one completion; by default ten minutes and its max_tokens at the next
    slowest_tokens_per_second: float = 1.0  # of one trace, on a server that is busy but well
    probe_every: float = 15.0  # between two looks at each server's health
    backoff: float = 2.0  # the longest first pause of a failing server; each further one may be twice as long
    failures: int = 6  # in a row, one a pause, before a server is dropped
    restart_timeout: float = 300.0  # for one to come back when none is left

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.name == "read_timeout":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise InputError(f"{entry.name} must be a positive number, not {value!r}")

    def read_seconds(self, max_tokens: int) -> float:
        """How long the answer to one request may take."""
        return self.read_timeout or QUEUE_SECONDS + max_tokens / self.slowest_tokens_per_second


OPTIONS = frozenset({"concurrency", "verbose", "served_model", *(entry.name for entry in fields(Patience))})


class _Unavailable(Exception):
    """No answer: no connection, one that broke, a timeout, an answer too long or compressed, HTTP 5xx, or a request
    that the server aborted."""

    def __init__(self, why: str, *, pause: float | None = None, timed_out: bool = False) -> None:
        super().__init__(why)
        self.pause, self.timed_out = pause, timed_out


class _Busy(Exception):
    """HTTP 429, and how long the server asked to be left alone."""

    def __init__(self, pause: float | None) -> None:
        super().__init__("HTTP 429")
        self.pause = pause


@dataclass(slots=True)
class _Job:
    request: Request
    failures: int = 0
    refused_since: float | None = None  # by HTTP 429


@dataclass(slots=True, eq=False)
class _Server:
    """What is known of one server. Lives in the loop's thread."""

    url: str
    most: int  # requests at once
    limit: float  # the same, less where the server said 429
    served: str = ""
    version: str = "unknown"
    alive: bool = True
    why: str = ""  # it was dropped
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    trial: asyncio.Task[None] | None = None
    row: int = 0  # failures in a row, one a pause
    turned_away: int = 0  # 429s in a row
    paused_until: float = 0.0  # on the monotonic clock

    def takes(self, now: float) -> bool:
        """Whether it may be sent a request; one at a time while it is in doubt."""
        if not self.alive or now < self.paused_until or len(self.tasks) >= int(self.limit):
            return False
        return not self.row or self.trial is None

    def succeeded(self) -> None:
        self.row = 0
        self.turned_away = 0
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def failed(self, sent: float, patience: Patience, asked: float | None = None) -> None:
        """One more failure in a row, and a pause; what was sent before the last pause ended tells nothing new."""
        now = time.monotonic()
        if sent < self.paused_until:
            return
        self.row += 1
        self.paused_until = now + _pause(patience, self.row, asked)

    def busy(self, patience: Patience, asked: float | None) -> None:
        """Half as much from now on; each success lets it take a little more."""
        now = time.monotonic()
        if now >= self.paused_until:
            self.limit = max(1.0, self.limit / 2)
            self.turned_away += 1
            self.paused_until = now + _pause(patience, self.turned_away, asked)
        elif asked is not None:
            self.paused_until = max(self.paused_until, now + _pause(patience, self.turned_away, asked))

    def back(self) -> None:
        self.alive, self.limit, self.paused_until = True, float(self.most), 0.0
        self.row = 0


def _pause(patience: Patience, times: int, asked: float | None) -> float:
    backoff = Backoff(patience.backoff, PAUSE_SECONDS, longest_asked=ASKED_PAUSE_SECONDS)
    return backoff.seconds(times, None if asked is None else min(asked, backoff.longest_asked))


async def _read(answer: Any, most: int) -> bytes:
    """The body of an answer that is being streamed; of an error's the first bytes alone.

    Raises:
        _Unavailable: it is longer than ``most`` bytes, or compressed.
    """
    encoding = openai_api.one_line(answer.headers.get("Content-Encoding", "")).lower()
    if not answer.is_success:
        most = openai_api.ERROR_BYTES if encoding in PLAIN else 0
    elif encoding not in PLAIN:
        raise _Unavailable(f"its answer is compressed ({encoding}), which was not asked for: switch that off there")
    body = bytearray()
    async for chunk in answer.aiter_raw():
        body += chunk
        if len(body) > most:
            if answer.is_success:
                raise _Unavailable(f"its answer is longer than {most:,} bytes, which no such answer needs")
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
        self._servers = [_Server(url, most, float(most)) for url in urls]
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
            task = asyncio.create_task(_Stream(self, requests, sampling, results).run())

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
        self, server: _Server, request: Request, sampling: Sampling, read_seconds: float | None = None
    ) -> Completion:
        """Ask one server for one completion.

        Raises:
            _Unavailable, _Busy: to be tried again.
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
            raise _Unavailable("it gave up on a request")
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
            _Unavailable, _Busy: to be tried again.
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
            raise _Unavailable(f"no answer within {read_seconds:,.0f} seconds", timed_out=True) from error
        except httpx2.RequestError as error:
            said = openai_api.one_line(self._hide(str(error)))
            raise _Unavailable(f"{type(error).__name__}{': ' if said else ''}{said}") from error
        if answer.is_success:
            return body
        pause = asked_seconds(answer.headers, time.time())
        if answer.status_code == 429:
            raise _Busy(pause)
        said = openai_api.error_text(answer.status_code, self._hide(body.decode(errors="replace")))
        if answer.status_code >= 500:
            raise _Unavailable(said, pause=pause)
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

    async def healthy(self, server: _Server) -> str | None:
        """None, or why not. A server without ``/health`` is well when it answers at all."""
        try:
            await self._send(server.url, "GET", "/health", read_seconds=3 * self._patience.connect_timeout)
        except _Unavailable as error:
            return str(error)
        except (_Busy, EngineError):
            return None
        return None

    async def answers(self, server: _Server) -> bool:
        """Whether it completes one token, as a proof that a request failed by itself."""
        try:
            await self.complete(server, self._probe, Sampling(temperature=0.0), PROBE_SECONDS)
        except _Busy:
            return True
        except (_Unavailable, EngineError):
            return False
        return True

    # --- looking at a server before it is used --------------------------------------------------------------------

    async def _inspect_all(self) -> None:
        found = await asyncio.gather(*(self.inspect(server) for server in self._servers), return_exceptions=True)
        for server, error in zip(self._servers, found, strict=True):
            if isinstance(error, (_Unavailable, _Busy)):
                raise EngineError(
                    f"the server {server.url} does not answer ({error}); start it, wait until it is up, or leave it out"
                ) from error
            if isinstance(error, BaseException):
                raise error
        if len(versions := {server.version for server in self._servers}) > 1:
            self.warn(f"the servers run different versions: {', '.join(sorted(versions))}")

    async def inspect(self, server: _Server) -> None:
        """What it serves, whether that is long enough, and whether its token ids come back.

        Raises:
            _Unavailable, _Busy: it does not answer now.
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

    async def _version(self, server: _Server, software: str | None) -> str:
        """``vllm 0.32.0``: /version is vLLM's, /server_info SGLang's."""
        for path in ("/version", "/server_info"):
            with suppress(_Unavailable, _Busy, EngineError):
                answer = await self._send(server.url, "GET", path, read_seconds=3 * self._patience.connect_timeout)
                found = self._json(server.url, answer)
                if isinstance(found, dict) and isinstance(found.get("version"), str):
                    return openai_api.one_line(f"{software or ''} {found['version']}")
        return openai_api.one_line(software or "") or "unknown"


class _Stream:
    """One ``ServerEngine.stream``: which request goes where, and when again."""

    def __init__(
        self, engine: ServerEngine, requests: Iterable[Request], sampling: Sampling, results: queue.SimpleQueue[Any]
    ) -> None:
        self._engine, self._sampling, self._results = engine, sampling, results
        self._servers, self._patience = engine._servers, engine._patience
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._waiting: deque[_Job] = deque()  # failed once, or moved on
        self._error: BaseException | None = None
        self._ending = False
        self._feed = RequestFeed(requests, notify=self._notify)

    def _notify(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self) -> None:
        watches = [asyncio.create_task(self._watch(server)) for server in self._servers]
        try:
            while not self._finished():
                await self._revive()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._next_pause_end())
                self._wake.clear()
        finally:
            self._ending = True
            self._feed.close()
            tasks = [*watches, *(task for server in self._servers for task in server.tasks)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self) -> bool:
        """Send what can be sent; whether nothing is left to send or to wait for."""
        if self._error is not None:
            raise self._error
        while (server := self._freest()) is not None and (job := self._next_job(server)) is not None:
            task = asyncio.create_task(self._serve(job, server))
            server.tasks.add(task)
            if server.row:
                server.trial = task
            task.add_done_callback(lambda task, server=server: self._ended(task, server))
        return not self._waiting and not any(server.tasks for server in self._servers) and self._feed.exhausted

    def _freest(self) -> _Server | None:
        now = time.monotonic()
        return min((s for s in self._servers if s.takes(now)), key=lambda s: len(s.tasks) / s.limit, default=None)

    def _next_job(self, server: _Server) -> _Job | None:
        """What failed before goes first; but to a server in doubt another one, so that one bad request drops none."""
        fresh = self._feed.take(1) if server.row or not self._waiting else []
        if fresh:
            return _Job(fresh[0])
        return self._waiting.popleft() if self._waiting else None

    def _next_pause_end(self) -> float | None:
        now = time.monotonic()
        ends = [server.paused_until - now for server in self._servers if server.alive and server.paused_until > now]
        return min(ends, default=None)

    def _ended(self, task: asyncio.Task[None], server: _Server) -> None:
        server.tasks.discard(task)
        if server.trial is task:
            server.trial = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
        self._wake.set()

    async def _serve(self, job: _Job, server: _Server) -> None:
        try:
            await self._try(job, server)
        except asyncio.CancelledError:
            if self._ending:
                raise
            self._waiting.append(job)  # its server was dropped

    async def _try(self, job: _Job, server: _Server) -> None:
        sent = time.monotonic()
        try:
            completion = await self._engine.complete(server, job.request, self._sampling)
        except _Busy as error:
            self._turned_away(job, server, error)
        except _Unavailable as error:
            await self._failed(job, server, error, sent)
        else:
            server.succeeded()
            self._results.put(completion)

    def _turned_away(self, job: _Job, server: _Server, error: _Busy) -> None:
        """429 says that the server is well: nothing is counted against it, but the request may not wait for ever."""
        now = time.monotonic()
        job.refused_since = job.refused_since or now
        server.busy(self._patience, error.pause)
        if (waited := now - job.refused_since) > self._patience.read_seconds(job.request.max_tokens):
            raise EngineError(
                f"{server.url} has turned a request away (HTTP 429) for {waited:,.0f} seconds; lower --concurrency, or "
                f"free the server; {RESUME_HINT}"
            )
        self._waiting.append(job)

    async def _failed(self, job: _Job, server: _Server, error: _Unavailable, sent: float) -> None:
        """Whose fault it is: the request's, when the server completes another one; else the server's, in the end."""
        job.failures += 1
        server.failed(sent, self._patience, error.pause)
        spent = job.failures >= ATTEMPTS or error.timed_out
        doubtful = server.row >= self._patience.failures or error.timed_out
        if spent or doubtful:
            if await self._engine.answers(server):
                server.succeeded()
                if spent:
                    self._give_up(job, server, error, sent)
                    return
            elif doubtful and server.alive:
                self._drop(server, str(error))
        self._waiting.append(job)

    def _give_up(self, job: _Job, server: _Server, error: _Unavailable, sent: float) -> None:
        """An error as the request's own result."""
        more = " (--engine-option read_timeout=SECONDS gives them longer)" if error.timed_out else ""
        self._engine.warn(
            f"requests that kept failing at {server.url}, which answers others, are recorded as errors: {error}{more}; "
            "--retry error runs them again"
        )
        self._results.put(Completion(job.request.key, (), "error", time.monotonic() - sent))

    def _drop(self, server: _Server, why: str) -> None:
        server.alive, server.why = False, why
        self._engine.warn(f"the server {server.url} was dropped ({why}); its requests moved on")
        for task in server.tasks - {asyncio.current_task()}:
            task.cancel()
        self._wake.set()

    async def _watch(self, server: _Server) -> None:
        """Find out when it dies without a word while it holds requests, and when it is back."""
        while True:
            await asyncio.sleep(self._patience.probe_every)
            await self._look(server)

    async def _look(self, server: _Server) -> None:
        if not server.alive:
            await self._readmit(server)
            return
        sent = time.monotonic()
        why = await self._engine.healthy(server)
        if why is not None and server.alive:
            server.failed(sent, self._patience)
            if server.row >= self._patience.failures:
                self._drop(server, why)

    async def _readmit(self, server: _Server) -> None:
        try:
            await self._engine.inspect(server)
        except (_Unavailable, _Busy, EngineError, InputError) as error:
            server.why = str(error)
            return
        server.back()
        self._engine.warn(f"the server {server.url} is back")
        self._wake.set()

    async def _revive(self) -> None:
        """Wait for one to come back before the stream ends for want of a server."""
        deadline = time.monotonic() + self._patience.restart_timeout
        while not any(server.alive for server in self._servers):
            await self._look_at_all(max(deadline, time.monotonic() + 3 * self._patience.connect_timeout))
            if any(server.alive for server in self._servers):
                self._wake.set()
                return
            left = deadline - time.monotonic()
            if left <= 0:
                reasons = "; ".join(f"{server.url}: {server.why}" for server in self._servers)
                raise EngineError(f"no server is left ({reasons}); start one, then {RESUME_HINT}")
            await asyncio.sleep(min(left, self._patience.probe_every))

    async def _look_at_all(self, deadline: float) -> None:
        """Until one is back, all were looked at, or it is too late: one that hangs keeps nobody waiting."""
        looks = {asyncio.create_task(self._readmit(server)) for server in self._servers}
        try:
            waiting = set(looks)
            while waiting and (left := deadline - time.monotonic()) > 0:
                seconds = min(left, self._patience.probe_every)
                _, waiting = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if any(server.alive for server in self._servers):
                    return
        finally:
            for look in looks:
                look.cancel()
            await asyncio.gather(*looks, return_exceptions=True)
