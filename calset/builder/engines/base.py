"""The engine protocol: prompt token ids in, completion token ids out, each as soon as it is done.

Must not know: problems, grading or the catalog.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from calset.builder.model.sampling import Sampling
from calset.errors import EngineError, InputError

T = TypeVar("T")

CLOSED = "this engine is closed"
RESUME_HINT = "what was saved stays; run the same command again to continue"


class EngineUnavailable(InputError):
    """The engine's package is installed but cannot be imported; nothing was started."""


def wait_on(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> T:
    """What ``work`` gives on a loop that runs in another thread.

    Raises:
        EngineError: the engine was closed meanwhile: a loop that was stopped leaves what it was given undone, for ever.
    """
    try:
        given = asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError as error:  # the loop is closed
        work.close()
        raise EngineError(CLOSED) from error
    while not concurrent.futures.wait([given], timeout=0.5).done:
        if not thread.is_alive():
            work.close()
            raise EngineError(CLOSED)
    if given.cancelled():
        raise EngineError(CLOSED)
    return given.result()


@dataclass(frozen=True, slots=True)
class Request:
    """One unit of work. ``key`` comes back on the completion; ``max_tokens`` counts completion tokens.

    ``json_schema`` (as JSON text): the completion is to be JSON of that schema. An engine that cannot see to it samples
    freely; whoever asks must read what comes leniently.
    """

    key: str
    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returned for a request: its own token ids, the stop token included when it sampled one."""

    key: str
    token_ids: tuple[int, ...]
    finish_reason: str  # the engine's own string: stop, length, abort, error, repetition
    seconds: float


@runtime_checkable
class Engine(Protocol):
    """A running inference engine on one model folder or Hub id.

    It may also have ``warnings``, what it noted while it ran, for the report; and ``shares_cores``, whether processes
    of its own compute on this machine's processors: what feeds them then does not interrupt them, and deals with what
    comes out a little later, in one go.
    """

    name: str
    version: str
    max_model_len: int
    loaded: str  # the revision of the weights that answer now

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish, in any order, pulling requests lazily.

        The next request may be long in coming: an adaptive build decides it from completions that this stream has yet
        to yield. So an engine that runs several at once pulls through a ``RequestFeed`` and goes on with what it has;
        one that runs one at a time may simply iterate.

        Raises:
            EngineError: the engine died; completions already yielded stand.
        """
        ...

    def cancel(self) -> None:
        """End the running stream soon, from any thread; what is in flight is dropped. A later stream works again."""
        ...

    def load_weights(self, model: Path, revision: str) -> None:
        """Put the weights of another checkpoint of the same architecture and tokenizer into the running engine.

        Raises:
            EngineError: the checkpoint does not fit the engine; the old weights stay.
        """
        ...

    def close(self) -> None:
        """Free the device; may be called twice."""
        ...


class RequestFeed:
    """Requests pulled by a thread of their own, so that an engine's loop never waits for the next one.

    Args:
        requests: what ``Engine.stream`` was given; its ``next`` may block.
        ahead: requests pulled ahead of ``take`` at most. Few: an adaptive build decides late, and better, what comes
            next.
        notify: called from the feeding thread when there is a request again and at the end.
    """

    def __init__(self, requests: Iterable[Request], *, ahead: int = 16, notify: Callable[[], object] | None = None):
        self._requests, self._ahead, self._notify = requests, ahead, notify
        self._pulled: deque[Request] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        # A daemon: when a stream is dropped while ``next`` blocks, nobody can wake it.
        threading.Thread(target=self._pull, name="calset-feed", daemon=True).start()

    def _pull(self) -> None:
        try:
            for request in self._requests:
                with self._changed:
                    self._pulled.append(request)
                    self._changed.notify_all()
                    was_empty = len(self._pulled) == 1
                if was_empty:  # else whoever takes has left some for want of room, and comes again
                    self._tell()
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._pulled) < self._ahead)
                    if self._closed:
                        return
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._tell()

    def _tell(self) -> None:
        if self._notify is not None and not self._closed:
            self._notify()

    def take(self, most: int, *, timeout: float = 0.0) -> list[Request]:
        """Up to ``most`` requests that are there; waits up to ``timeout`` seconds for the first, or for the end.

        Raises:
            whatever the iterable raised, once what came before it is taken.
        """
        with self._changed:
            if most > 0 and timeout > 0:
                self._changed.wait_for(lambda: self._pulled or self._ended, timeout)
            taken = [self._pulled.popleft() for _ in range(min(most, len(self._pulled)))]
            self._changed.notify_all()
            if not taken and not self._pulled and self._error is not None:
                raise self._error
            return taken

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left, and nothing will come."""
        with self._changed:
            return self._ended and not self._pulled and self._error is None

    def close(self) -> None:
        """Pull no more; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors checkpoint, from the headers alone."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def check_same_shapes(old: Path, new: Path) -> dict[str, tuple[int, ...]]:
    """Refuse a checkpoint whose tensors differ in name or shape: vLLM would only warn and keep stale weights.

    Returns:
        tensor name -> shape.

    Raises:
        EngineError: naming the first tensor that differs.
    """
    want, have = tensor_shapes(old), tensor_shapes(new)
    if not have:
        raise EngineError(f"{new} holds no safetensors weights to load")
    differing = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    if want and differing:
        name = differing[0]
        raise EngineError(
            f"{new} does not fit the running engine: {name} is {have.get(name)} there and {want.get(name)} in {old} "
            f"({len(differing)} tensors differ); start a new engine on it"
        )
    return have
