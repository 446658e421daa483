"""Requests shared out among servers: the least loaded is asked, a dead one's requests move on.

Must not know: HTTP.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from calset.builder.engines.base import RESUME_HINT, Completion, Request, RequestFeed
from calset.builder.engines.replica import Busy, Job, Patience, Server, Unavailable
from calset.builder.model.sampling import Sampling
from calset.errors import EngineError, InputError

ATTEMPTS = 4  # of a request, when servers that answer others fail on it


class Client(Protocol):
    """Calls to one server, as ``ServerEngine`` makes them."""

    async def complete(self, server: Server, request: Request, sampling: Sampling) -> Completion: ...

    async def healthy(self, server: Server) -> str | None: ...

    async def answers(self, server: Server) -> bool: ...

    async def inspect(self, server: Server) -> None: ...

    def warn(self, text: str) -> None: ...


class Balancer:
    """Decides for one stream of requests which server gets which, and when again."""

    def __init__(
        self,
        client: Client,
        servers: Sequence[Server],
        patience: Patience,
        requests: Iterable[Request],
        sampling: Sampling,
        results: queue.SimpleQueue[Any],
    ) -> None:
        self._client, self._sampling, self._results = client, sampling, results
        self._servers, self._patience = servers, patience
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._waiting: deque[Job] = deque()  # failed once, or moved on
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

    def _freest(self) -> Server | None:
        now = time.monotonic()
        return min((s for s in self._servers if s.takes(now)), key=lambda s: len(s.tasks) / s.limit, default=None)

    def _next_job(self, server: Server) -> Job | None:
        """What failed before goes first; but to a server in doubt another one, so that one bad request drops none."""
        fresh = self._feed.take(1) if server.row or not self._waiting else []
        if fresh:
            return Job(fresh[0])
        return self._waiting.popleft() if self._waiting else None

    def _next_pause_end(self) -> float | None:
        now = time.monotonic()
        ends = [server.paused_until - now for server in self._servers if server.alive and server.paused_until > now]
        return min(ends, default=None)

    def _ended(self, task: asyncio.Task[None], server: Server) -> None:
        server.tasks.discard(task)
        if server.trial is task:
            server.trial = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
        self._wake.set()

    async def _serve(self, job: Job, server: Server) -> None:
        try:
            await self._try(job, server)
        except asyncio.CancelledError:
            if self._ending:
                raise
            self._waiting.append(job)  # its server was dropped

    async def _try(self, job: Job, server: Server) -> None:
        sent = time.monotonic()
        try:
            completion = await self._client.complete(server, job.request, self._sampling)
        except Busy as error:
            self._turned_away(job, server, error)
        except Unavailable as error:
            await self._failed(job, server, error, sent)
        else:
            server.succeeded()
            self._results.put(completion)

    def _turned_away(self, job: Job, server: Server, error: Busy) -> None:
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

    async def _failed(self, job: Job, server: Server, error: Unavailable, sent: float) -> None:
        """Whose fault it is: the request's, when the server completes another one; else the server's, in the end."""
        job.failures += 1
        server.failed(sent, self._patience, error.pause)
        spent = job.failures >= ATTEMPTS or error.timed_out
        doubtful = server.row >= self._patience.failures or error.timed_out
        if spent or doubtful:
            if await self._client.answers(server):
                server.succeeded()
                if spent:
                    self._give_up(job, server, error, sent)
                    return
            elif doubtful and server.alive:
                self._drop(server, str(error))
        self._waiting.append(job)

    def _give_up(self, job: Job, server: Server, error: Unavailable, sent: float) -> None:
        """An error as the request's own result."""
        more = " (--engine-option read_timeout=SECONDS gives them longer)" if error.timed_out else ""
        self._client.warn(
            f"requests that kept failing at {server.url}, which answers others, are recorded as errors: {error}{more}; "
            "--retry error runs them again"
        )
        self._results.put(Completion(job.request.key, (), "error", time.monotonic() - sent))

    def _drop(self, server: Server, why: str) -> None:
        server.alive, server.why = False, why
        self._client.warn(f"the server {server.url} was dropped ({why}); its requests moved on")
        for task in server.tasks - {asyncio.current_task()}:
            task.cancel()
        self._wake.set()

    async def _watch(self, server: Server) -> None:
        """Find out when it dies without a word while it holds requests, and when it is back."""
        while True:
            await asyncio.sleep(self._patience.probe_every)
            await self._look(server)

    async def _look(self, server: Server) -> None:
        if not server.alive:
            await self._readmit(server)
            return
        sent = time.monotonic()
        why = await self._client.healthy(server)
        if why is not None and server.alive:
            server.failed(sent, self._patience)
            if server.row >= self._patience.failures:
                self._drop(server, why)

    async def _readmit(self, server: Server) -> None:
        try:
            await self._client.inspect(server)
        except (Unavailable, Busy, EngineError, InputError) as error:
            server.why = str(error)
            return
        server.back()
        self._client.warn(f"the server {server.url} is back")
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
